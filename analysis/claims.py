"""The claims over the normalisation families: what the paper says, its negative controls, and what it leaves out.

A claim is one entry of `CLAIMS`: which reads test it, and one expression that says whether a read holds it. To add a
claim, add an entry. An expression sees the columns of `reads`, on a forward read also

- `log_lambda_v`: log10 of the variance along v, cut like the depth at what the projection resolves,
- `log_lambda_v_as_executed`: the same of the output that the model itself computed, in its dtype,
- `random_<column>`: the mean over seeds of `RANDOM_COLUMNS` of the model's reads at random initialisation,
- `twin_depth`, `twin_depth_standard_error`: the depth of the same model with another norm (`TWIN`),

and on a functional read

- `kept_still`, `moved`: over its maps and steps, in decades, the least factor by which a random direction changed the
  outputs more than a LayerNorm's compensated dead direction, and the largest one for RMSNorms' gamma^-1. A factor is
  one of KL divergences, or, where there are no logits, of squared changes of the last hidden state. Steps from 0.01 on.
- `not_gauge`, `off_regular`, `unit_order`: how many of its compensated directions are no gauge, how far from 1 the
  order of a random direction is at most, and the least order of a planted dead unit.

Where it is null, the read cannot test the claim.
"""

from typing import NamedTuple

import polars as pl

RANDOM_COLUMNS = [
    "log_lambda_v",
    "log_lambda_v_as_executed",
    "num_dead_1e6",
    "num_learned",
    "depth_predicted",
    "lambda_v_standard_error",
]
# Twins are trained alike and differ in the norm only: their ids are equal but for the family's name.
TWIN = pl.col("model").str.replace("layernorm|rmsnorm", "*")


_NO_VALUE = pl.lit(None, dtype=pl.Float64)


class Claim(NamedTuple):
    """One claim: `holds` is a boolean expression over a read, `value` the number that it judges (null: none).

    `margin` is how far the value is on the right side of the threshold, in the value's unit (null: none), and `error`
    the value's standard error from the sample of tokens (null: not known).
    """

    statement: str
    family: str  # layernorm, rmsnorm or any
    reads: tuple[str, ...]
    holds: pl.Expr
    threshold: str
    value: pl.Expr
    unit: str
    margin: pl.Expr
    error: pl.Expr = _NO_VALUE


def _kept_log_lambda_v() -> pl.Expr:
    """log10 of `max(lambda_v, lbar 10^-depth_limit)`; a zero without a known limit is undefined."""
    limit = pl.col("lambda_mean") * pl.lit(10.0).pow(-pl.col("depth_limit"))
    kept = pl.max_horizontal(pl.col("lambda_v"), limit)
    return pl.when(kept > 0).then(kept.log10())


def _at_least(name: str, value: pl.Expr, limit: float, unit: str, strict: bool = False) -> tuple[pl.Expr | str, ...]:
    margin = value - limit
    holds = margin > 0 if strict else margin >= 0
    return holds, f"{name} {'>' if strict else '>='} {limit:g}", value, unit, margin


def _at_most(name: str, value: pl.Expr, limit: float, unit: str, strict: bool = False) -> tuple[pl.Expr | str, ...]:
    margin = limit - value
    holds = margin > 0 if strict else margin >= 0
    return holds, f"{name} {'<' if strict else '<='} {limit:g}", value, unit, margin


def _within(name: str, error: pl.Expr, limit: float, unit: str) -> tuple[pl.Expr | str, ...]:
    margin = limit - error.abs()
    return margin >= 0, f"|{name}| <= {limit:g}", error, unit, margin


def _equals(name: str, value: pl.Expr, wanted: int) -> tuple[pl.Expr | str, ...]:
    return value == wanted, f"{name} = {wanted}", value, "dimensions", _NO_VALUE


def _claim(
    statement: str,
    family: str,
    reads: tuple[str, ...],
    judged: tuple[pl.Expr | str, ...],
    error: pl.Expr = _NO_VALUE,
) -> Claim:
    return Claim(statement, family, reads, *judged)._replace(error=error)  # type: ignore[arg-type]


def _both(a: str, b: str) -> pl.Expr:
    """Standard error of the difference of two independent numbers, from the columns of theirs."""
    return (pl.col(a) ** 2 + pl.col(b) ** 2).sqrt()


LOG_LAMBDA_V = _kept_log_lambda_v()
LOG_LAMBDA_V_AS_EXECUTED = pl.when(pl.col("lambda_mean") > 0).then(
    pl.col("lambda_mean").log10() - pl.col("depth_as_executed")
)
# u_D is arbitrary inside a kernel of two or more dimensions: alignment carries no claim there.
_ALIGNMENT = pl.when(pl.col("num_zero_scales").fill_null(0) < 2).then(pl.col("alignment"))
_CENTRED = pl.col("stream_centred").fill_null(False)  # an RMSNorm is then a LayerNorm, and no control
_NO_ZEROS = pl.col("num_zero_scales").fill_null(0) == 0
_SLOPE = pl.col("precision_slope")
_DEEPENING = pl.col("random_log_lambda_v") - pl.col("log_lambda_v")
_EXECUTED_DEEPENING = pl.col("random_log_lambda_v_as_executed") - pl.col("log_lambda_v_as_executed")
# In the closed form only HM(gamma^2) moves in training: the depths of equal architectures differ by log10 of its ratio.
_PREDICTED_DEEPENING = pl.col("depth_predicted") - pl.col("random_depth_predicted")
_MORE_DEAD = pl.col("num_dead_1e6") - pl.col("random_num_dead_1e6")
_MORE_LEARNED = pl.col("num_learned") - pl.col("random_num_learned")
_CONTROL_DEPTH = (pl.col("lambda_mean") / pl.col("lambda_control")).log10()
_DEPTH_ERROR = pl.col("depth_standard_error")
_DEEPENING_ERROR = _both("lambda_v_standard_error", "random_lambda_v_standard_error")
_AS_EXPECTED = pl.col("family") == pl.col("family_expected")

_DEAD_SHARE, _DEAD_COUNT = pl.col("dead_parameters_share"), pl.col("dead_parameters")

RANDOM, TRAINED, FORWARD, PARAMETERS = ("random",), ("trained",), ("random", "trained"), ("parameters",)
FUNCTIONAL = ("functional",)

CLAIMS = {
    "layernorm-random-aligned": _claim(
        "LayerNorm at random initialisation: the bottom eigenvector is the inverse-scale direction, to four decimals.",
        "layernorm", RANDOM, _at_least("alignment", _ALIGNMENT, 0.99995, "cosine"),
    ),
    "rmsnorm-random-unaligned": _claim(
        "RMSNorm at random initialisation (control): the bottom eigenvector is not the inverse-scale direction.",
        "rmsnorm", RANDOM, _at_most("alignment", pl.when(~_CENTRED).then(_ALIGNMENT), 0.99995, "cosine", strict=True),
    ),
    "rmsnorm-inverse-scale-alive": _claim(
        "RMSNorm, random or trained (control): the variance along the inverse-scale direction is no rounding error.",
        "rmsnorm", FORWARD, _at_most("depth", pl.when(~_CENTRED).then(pl.col("depth")), 4, "decades", strict=True),
        _DEPTH_ERROR,
    ),
    "rmsnorm-centred-kernel": _claim(
        "RMSNorm of a centred stream, random or trained: the variance along the inverse-scale direction is rounding, "
        "as a LayerNorm's; such models are no controls.",
        "rmsnorm", FORWARD, _at_least("depth", pl.when(_CENTRED).then(pl.col("depth")), 4, "decades"),
        _DEPTH_ERROR,
    ),
    "random-direction-alive": _claim(
        "Any family, random or trained (control): a random direction is as alive as the mean eigenvalue.",
        "any", FORWARD, _at_most("log10(mean / control)", _CONTROL_DEPTH, 1, "decades"),
    ),
    "layernorm-kernel-contained": _claim(
        "Trained LayerNorm: the dead subspace predicted from the scales lies inside the measured one.",
        "layernorm", TRAINED, _at_least("containment", pl.col("containment"), 0.9999, "cosine"),
    ),
    "layernorm-kernel-exact": Claim(
        "LayerNorm without zero scales, random or trained: the kernel is algebraic, rounding alone fills it.",
        "layernorm", FORWARD, pl.when(_NO_ZEROS).then(pl.col("kernel_exact")), "precision slope > 0.5", _SLOPE, "slope",
        _SLOPE - 0.5,
    ),
    "rmsnorm-kernel-inexact": Claim(
        "RMSNorm, random or trained (control): nothing along the inverse-scale direction is filled by rounding alone.",
        "rmsnorm", FORWARD, pl.when(~_CENTRED).then(~pl.col("kernel_exact")), "precision slope <= 0.5", _SLOPE, "slope",
        0.5 - _SLOPE,
    ),
    "layernorm-one-algebraic": _claim(
        "LayerNorm without zero scales, random or trained: exactly one dead direction is algebraic.",
        "layernorm", FORWARD, _equals("algebraic count", pl.when(_NO_ZEROS).then(pl.col("num_algebraic")), 1),
    ),
    "rmsnorm-none-algebraic": _claim(
        "RMSNorm, random or trained (control): no dead direction is algebraic.",
        "rmsnorm", FORWARD, _equals("algebraic count", pl.col("num_algebraic"), 0),
    ),
    "layernorm-deepens": _claim(
        "LayerNorm: training deepens the direction, lambda_v at the last checkpoint is below that at random "
        "initialisation; the norm replayed in float32.",
        "layernorm", TRAINED, _at_least("log10(random / trained lambda_v)", _DEEPENING, 0, "decades", strict=True),
        _DEEPENING_ERROR,
    ),
    "layernorm-deepens-as-executed": _claim(
        "LayerNorm: the same of the outputs as the model computed them, in the dtype that it ran in.",
        "layernorm", TRAINED,
        _at_least("log10(random / trained lambda_v, as executed)", _EXECUTED_DEEPENING, 0, "decades", strict=True),
    ),
    "deepening-predicted": _claim(
        "LayerNorm: the scales alone predict how much lambda_v falls in training.",
        "layernorm", TRAINED,
        _within("predicted - measured deepening", _PREDICTED_DEEPENING - _DEEPENING, 0.5, "decades"),
        _DEEPENING_ERROR,
    ),
    "depth-predicted": _claim(
        "LayerNorm, at random initialisation and at the last checkpoint: the scales alone predict the depth.",
        "layernorm", FORWARD,
        _within("predicted - measured", pl.col("depth_predicted") - pl.col("depth"), 0.5, "decades"),
        _DEPTH_ERROR,
    ),
    "more-dead-directions": _claim(
        "Any family: after training more directions are dead at 1e-6 of the mean than at random initialisation.",
        "any", TRAINED, _at_least("trained - random count", _MORE_DEAD, 0, "dimensions", strict=True),
    ),
    "learned-dead-directions": _claim(
        "Any family: training opens dead directions that are not algebraic, dead in float64 as in float32.",
        "any", TRAINED, _at_least("trained - random learned count", _MORE_LEARNED, 0, "dimensions", strict=True),
    ),
    "twins-separate": _claim(
        "Twins that differ in the norm only: the LayerNorm twin is deeper by far, random and trained.",
        "layernorm", FORWARD, _at_least("depth - twin's depth", pl.col("depth") - pl.col("twin_depth"), 4, "decades"),
        _both("depth_standard_error", "twin_depth_standard_error"),
    ),
    "blocks-preserved": Claim(
        "Any family, random or trained: no block collapses a direction of the residual stream.",
        "any", FORWARD, pl.col("blocks_preserved"), "no collapsed block", pl.col("worst_block_ratio"), "ratio",
        _NO_VALUE,
    ),
    "layernorm-dead-parameters": Claim(
        "LayerNorm: parameter directions are dead by construction; the value is their share of all parameters.",
        "layernorm", ("random", "parameters"), _DEAD_COUNT > 0, "count > 0", _DEAD_SHARE, "share", _DEAD_SHARE,
    ),
    "rmsnorm-no-dead-parameters": Claim(
        "RMSNorm (control): without zero scales no parameter direction is dead by construction.",
        "rmsnorm", ("random", "parameters"), pl.when(_NO_ZEROS).then(_DEAD_COUNT == 0), "count = 0", _DEAD_SHARE,
        "share", -_DEAD_SHARE,
    ),
    "layernorm-outputs-keep-still": _claim(
        "Linear maps that a LayerNorm feeds, moved along its dead direction: the outputs change by 1e-6 at most of "
        "what a random direction of the same size does.",
        "any", FUNCTIONAL, _at_least("log10(random / dead change)", pl.col("kept_still"), 6, "decades"),
    ),
    "rmsnorm-outputs-move": _claim(
        "Linear maps that an RMSNorm feeds, moved along its inverse scales (control): the outputs change.",
        "any", FUNCTIONAL, _at_most("log10(random / inverse-scale change)", pl.col("moved"), 4, "decades", strict=True),
    ),
    "layernorm-directions-gauge": _claim(
        "Linear maps that a LayerNorm feeds: its dead direction is a gauge, nothing moves at any step.",
        "any", FUNCTIONAL, _at_most("compensated directions that move", pl.col("not_gauge"), 0, "dimensions"),
    ),
    "random-directions-regular": _claim(
        "Linear maps that a norm feeds, any family (control): along a random direction the outputs move in first "
        "order.",
        "any", FUNCTIONAL, _at_most("|k - 1|", pl.col("off_regular"), 0.1, ""),
    ),
    "dead-units-singular": _claim(
        "Hidden units planted dead (control): their weights in and out, moved jointly, move the outputs in second "
        "order at least.",
        "any", FUNCTIONAL, _at_least("k", pl.col("unit_order"), 1.9, ""),
    ),
    "classified": Claim(
        "Any family: the parameters alone tell the normalisation family that the registry expects.",
        "any", PARAMETERS, _AS_EXPECTED, "family as expected", _NO_VALUE, "", _NO_VALUE,
    ),
}  # fmt: skip
