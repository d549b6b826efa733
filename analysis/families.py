"""The comparison across normalisation families: each claim a row, with how many models hold it.

A claim is one entry of `CLAIMS`: which reads test it, and one expression that says whether a read holds it. To add a
claim, add an entry. The reads offered to a claim are one row each of

- random: the newest read at random initialisation of each (model, protocol, dtype),
- trained: its read at the last checkpoint, with the random read's numbers beside it as `random_<column>`,
- parameters: every checkpoint's.

A model, here (model, protocol), holds a claim when all its tested reads do. Where the expression is null the claim
cannot be tested.
"""

from typing import NamedTuple

import polars as pl

from analysis.lines import LINE, forward_lines, parameter_reads
from analysis.results import collected, finite


class Claim(NamedTuple):
    """One claim: `holds` is a boolean expression over a read, `value` the number that it judges (null: none)."""

    statement: str
    family: str  # layernorm, rmsnorm or any
    reads: tuple[str, ...]
    holds: pl.Expr
    threshold: str
    value: pl.Expr
    unit: str


def _kept_lambda_v(prefix: str = "") -> pl.Expr:
    """Variance along v, cut like the depth at what the projection resolves: `max(lambda_v, lbar 10^-depth_limit)`."""
    limit = pl.col(f"{prefix}lambda_mean") * pl.lit(10.0).pow(-pl.col(f"{prefix}depth_limit"))
    kept = pl.max_horizontal(pl.col(f"{prefix}lambda_v"), limit)
    return pl.when(kept > 0).then(kept)  # a zero without a known limit is undefined, not infinitely deep


# u_D is arbitrary inside a kernel of two or more dimensions: alignment carries no claim there.
_ALIGNMENT = pl.when(pl.col("num_zero_scales").fill_null(0) < 2).then(pl.col("alignment"))
_WITHOUT_ZEROS = pl.col("num_zero_scales").fill_null(0) == 0
_DEEPENING = (_kept_lambda_v("random_") / _kept_lambda_v()).log10()
_MORE_DEAD = pl.col("num_dead_1e6") - pl.col("random_num_dead_1e6")
_PREDICTION_ERROR = pl.col("depth_predicted") - pl.col("depth")
_NO_VALUE = pl.lit(None, dtype=pl.Float64)

RANDOM, TRAINED, FORWARD = ("random",), ("trained",), ("random", "trained")

CLAIMS = {
    "layernorm-random-aligned": Claim(
        "LayerNorm at random initialisation: the bottom eigenvector is the inverse-scale direction, to four decimals.",
        "layernorm", RANDOM, _ALIGNMENT >= 0.99995, "alignment >= 0.99995", _ALIGNMENT, "cosine",
    ),
    "rmsnorm-random-unaligned": Claim(
        "RMSNorm at random initialisation (control): the bottom eigenvector is not the inverse-scale direction.",
        "rmsnorm", RANDOM, _ALIGNMENT < 0.99995, "alignment < 0.99995", _ALIGNMENT, "cosine",
    ),
    "layernorm-kernel-contained": Claim(
        "Trained LayerNorm: the dead subspace predicted from the scales lies inside the measured one.",
        "layernorm", TRAINED, pl.col("containment") >= 0.9999, "containment >= 0.9999", pl.col("containment"), "cosine",
    ),
    "layernorm-kernel-exact": Claim(
        "LayerNorm without zero scales, random or trained: the kernel is algebraic, rounding alone fills it.",
        "layernorm", FORWARD, pl.when(_WITHOUT_ZEROS).then(pl.col("kernel_exact")), "precision slope > 0.5",
        pl.col("precision_slope"), "slope",
    ),
    "rmsnorm-kernel-inexact": Claim(
        "RMSNorm, random or trained (control): nothing along the inverse-scale direction is filled by rounding alone.",
        "rmsnorm", FORWARD, ~pl.col("kernel_exact"), "precision slope <= 0.5", pl.col("precision_slope"), "slope",
    ),
    "layernorm-deepens": Claim(
        "LayerNorm: training deepens the direction, lambda_v at the last checkpoint is below that at random "
        "initialisation.",
        "layernorm", TRAINED, _DEEPENING > 0, "random / trained lambda_v > 1", _DEEPENING, "decades",
    ),
    "more-dead-directions": Claim(
        "Any family: after training more directions are dead at 1e-6 of the mean than at random initialisation.",
        "any", TRAINED, _MORE_DEAD > 0, "trained - random count > 0", _MORE_DEAD, "dimensions",
    ),
    "depth-predicted": Claim(
        "LayerNorm, at random initialisation and at the last checkpoint: the scales alone predict the depth.",
        "layernorm", FORWARD, _PREDICTION_ERROR.abs() <= 0.5, "|predicted - measured| <= 0.5", _PREDICTION_ERROR,
        "decades",
    ),
    "blocks-preserved": Claim(
        "Any family, random or trained: no block collapses a direction of the residual stream.",
        "any", FORWARD, pl.col("blocks_preserved"), "no collapsed block", pl.col("worst_block_ratio"), "ratio",
    ),
    "classified": Claim(
        "Any family: the parameters alone tell the normalisation family that the registry expects.",
        "any", ("parameters",), pl.col("family") == pl.col("family_expected"), "family as expected", _NO_VALUE, "",
    ),
}  # fmt: skip

SCHEMA = {
    "claim": pl.String,
    "statement": pl.String,
    "family": pl.String,
    "num_models": pl.Int64,
    "num_hold": pl.Int64,
    "holds": pl.Boolean,
    "value_median": pl.Float64,
    "value_min": pl.Float64,
    "value_max": pl.Float64,
    "unit": pl.String,
    "threshold": pl.String,
    "failing": pl.List(pl.String),
}


def families(reads: pl.LazyFrame) -> pl.DataFrame:
    """Each claim of `CLAIMS` as a row.

    `num_models` models (one per model and protocol) can be tested and `num_hold` of them hold; `holds` is true when
    all do, null when there is none. `value_median`, `value_min`, `value_max` are over the tested reads, in `unit`;
    `failing` names the models that do not hold.
    """
    offered = collected(_offered(reads)).lazy()
    return pl.concat([collected(_judged(claim_id, claim, offered)) for claim_id, claim in CLAIMS.items()])


def _offered(reads: pl.LazyFrame) -> pl.LazyFrame:
    forward = forward_lines(reads)
    beside = forward.filter(pl.col("read") == "random").select(
        *LINE, pl.col("lambda_v", "lambda_mean", "depth_limit", "num_dead_1e6").name.prefix("random_")
    )
    joined = forward.join(beside, on=LINE, how="left", nulls_equal=True)
    return pl.concat([joined, parameter_reads(reads)], how="diagonal")


def _judged(claim_id: str, claim: Claim, offered: pl.LazyFrame) -> pl.LazyFrame:
    asked = offered.filter(pl.col("read").is_in(claim.reads))
    if claim.family != "any":
        asked = asked.filter(pl.col("family") == claim.family)
    tested = finite(asked.select("model", "protocol", holds=claim.holds, value=claim.value.cast(pl.Float64)))
    tested = tested.drop_nulls("holds")
    value = pl.col("value").explode()
    by_model = tested.group_by("model", "protocol").agg(pl.col("holds").all(), pl.col("value"))
    summary = by_model.select(
        num_models=pl.len().cast(pl.Int64),
        num_hold=pl.col("holds").sum().cast(pl.Int64),
        holds=pl.when(pl.len() > 0).then(pl.col("holds").all()),
        value_median=value.median(),
        value_min=value.min(),
        value_max=value.max(),
        failing=pl.col("model").filter(~pl.col("holds")).unique().sort().implode(),
    )
    facts = {"claim": claim_id, **claim._asdict(), "unit": claim.unit or None}
    texts = [pl.lit(facts[name], dtype=pl.String).alias(name) for name in SCHEMA if name in facts and name != "holds"]
    return summary.with_columns(texts).select(list(SCHEMA))
