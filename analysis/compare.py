"""Two result sets, read by read: what changed, by how much, and whether that is more than noise.

A pair is the same read (model, revision, seed, engine) under the same protocol on either side. Reads of the baseline
that the candidate lacks are rows too. What is a regression is for `analysis/gate.py` to say.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import polars as pl

from deadbench.analysis.lines import distinct, in_natural_order, ok_reads
from deadbench.analysis.paired import ROW, Samples, paired_noises
from deadbench.analysis.results import ResultsError, collected, collected_all, latest
from deadbench.analysis.student import widened
from deadbench.suite.schema import READS

Scale = Literal["absolute", "relative", "decades"]

_UNITS = {column.name: column.unit for column in READS}
# What is compared where no gate asks for something else, and on which scale.
METRICS: dict[str, Scale] = {
    "depth": "decades",
    "depth_exact": "decades",
    "depth_as_executed": "decades",
    "depth_predicted": "decades",
    "lambda_v": "decades",
    "alignment": "absolute",
    "containment": "absolute",
    "kernel_exact": "absolute",
    "num_dead_1e6": "absolute",
    "num_algebraic": "absolute",
    "num_learned": "absolute",
    "num_zero_scales": "absolute",
    "blocks_preserved": "absolute",
    "worst_block_ratio": "relative",
}
# Means of squares over tokens: of N gaussian ones the relative standard error is sqrt(2/N).
_MEANS_OF_SQUARES = ("lambda_v", "lambda_control")
_DEPTHS_OF_ONE = ("depth", "depth_exact", "depth_as_executed")
_RESAMPLED = ("lambda_v", "depth")  # have a standard error of their own, and sums by sequence, where there were enough
_ROUNDING = 1e-9  # the same numbers, added up in another order
_NOTHING = pl.lit(None, dtype=pl.Float64)
_ABOUT_BLOCKS = ("blocks_preserved", "worst_block_ratio")

_WHICH = ["model", "revision", "read", "seed", "engine"]
_ORDER = [pl.col("model", "read"), in_natural_order("revision"), pl.col("seed")]
_ABOUT = ["run_id", "protocol_hash", "protocol", "dtype", "num_tokens", "worst_block", "family", "error"]
_BESIDE = ["worst_block", "family", "error", "depth_standard_error"]  # of the candidate
_ABOUT += [f"{metric}_standard_error" for metric in _RESAMPLED]
_ROW = ["place", *_WHICH, "protocol", "dtype", "candidate_model", "candidate_revision"]
COLUMNS = [
    *_WHICH, "metric", "baseline", "baseline_error", "candidate", "candidate_error", "change", "scale", "noise",
    "noise_from", "num_tokens", "num_noise_seeds", "verdict", "detail", "protocol", "dtype", "candidate_model",
    "candidate_revision",
]  # fmt: skip


class Ask(NamedTuple):
    """A metric, a column of `reads`, and the scale of its change."""

    metric: str
    scale: Scale


def compare(
    baseline: pl.LazyFrame,
    candidate: pl.LazyFrame,
    asked: Mapping[str, Scale] = METRICS,
    samples: Samples | None = None,
) -> pl.DataFrame:
    """One row for every pair and metric that the baseline has, and one for every read that has no pair.

    `change` is candidate - baseline on `scale`: absolute, relative (to the baseline's magnitude) or decades (of the
    ratio; of the values where they are decades already). `noise` is the standard deviation that the change would have
    from sampling alone, on the same scale, and `noise_from` where it is known from: `pairs` (with `samples`: of the
    difference itself, over the sequences that both sides read), `seeds` (the baseline's spread over its seeds, of which
    there are `num_noise_seeds`), `bootstrap` (of the baseline, over its sequences), `tokens` (the standard error of a
    mean over so many independent gaussian tokens), else null. Where few sequences or seeds tell of it, it is wider by
    Student's t, so that two of it are exceeded by chance as rarely as two of a known one.
    `baseline_error` and `candidate_error` are the depths' own standard errors, from the sample of tokens.
    `verdict` is same, noise (at most two such deviations), changed, lost (the candidate has no value, `detail` says why
    where its row does), missing or failed.

    Where either side has one model only, they are paired whatever their names; where each model has one checkpoint
    on either side, whatever its revision.

    Raises:
        ResultsError: the same read was made under different protocols, or nothing can be paired.
    """
    metrics = list(asked)
    needed = list(dict.fromkeys([*_WHICH, *_ABOUT, *metrics]))
    sides = collected_all([ok_reads(reads).select(needed) for reads in (baseline, candidate)])
    _check_not_empty(*sides)
    left, right = _matched_names(*sides)
    keys = [*_WHICH, "protocol_hash"]
    told = list(dict.fromkeys([*metrics, *_BESIDE]))
    own = [pl.col(name).alias(f"candidate_{name}") for name in ROW if name not in ("model", "revision")]
    beside = right.select(*keys, *_original(right), *own, *(pl.col(name).alias(f"candidate_{name}") for name in told))
    pairs = left.join(beside, on=keys, how="inner", nulls_equal=True)
    alone = left.join(pairs, on=keys, how="anti", nulls_equal=True)
    _refuse_mixed(alone, right)
    if pairs.is_empty():
        raise ResultsError(
            f"nothing to compare: the baseline has {_models(left)}, the candidate {_models(right)}; "
            "a pair needs the same model id, checkpoint, read and seed"
        )
    pairs = pairs.with_columns(pl.col(name).alias(f"own_{name}") for name in ROW if name not in ("model", "revision"))
    if samples is not None:
        pairs = pairs.hstack(paired_noises(pairs, samples))
    else:
        pairs = pairs.with_columns(paired_lambda_v=_NOTHING, paired_depth=_NOTHING)
    # Names repeat for every metric: as categories they are four bytes each.
    names = pl.selectors.string().cast(pl.Categorical)
    lazy = _with_spread(pairs.sort(_ORDER, nulls_last=True), asked).with_columns(names).with_row_index("place").lazy()
    rows = collected_all([_differences(lazy, Ask(metric, scale)) for metric, scale in asked.items()])
    table = pl.concat(rows).sort("place", maintain_order=True).select(COLUMNS)  # a number sorts faster than names
    if alone.is_empty():
        return table
    gone = _without_pair(alone, candidate)
    gone = gone.cast({name: table.schema[name] for name in gone.columns})
    return pl.concat([table, gone], how="diagonal").select(COLUMNS).sort(_ORDER, maintain_order=True, nulls_last=True)


def num_reads(table: pl.DataFrame) -> int:
    """How many reads of the baseline a table of `compare` is about."""
    return table.select(*_WHICH, "protocol", "dtype").n_unique()


def verdict_of(change: str, noise: str) -> pl.Expr:
    """same, noise or changed, by the columns of a change and of its noise."""
    size = pl.col(change).abs()
    return (
        pl.when(size <= _ROUNDING)
        .then(_name("same"))
        .when(size <= 2 * pl.col(noise))
        .then(_name("noise"))
        .otherwise(_name("changed"))
    )


def unit_of(metric: str) -> str | None:
    """Unit of a numeric or boolean column of `reads`; None if there is no such column."""
    column = next((c for c in READS if c.name == metric), None)
    numeric = column is not None and str(column.type) in ("double", "int64", "bool") and metric != "seed"
    return column.unit if column is not None and numeric else None


def _check_not_empty(left: pl.DataFrame, right: pl.DataFrame) -> None:
    for name, side in (("baseline", left), ("candidate", right)):
        if side.is_empty():
            raise ResultsError(f"the {name} has no finished read; nothing can be compared")


def _matched_names(left: pl.DataFrame, right: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Both sides with their own names kept aside, renamed where the pairing is beyond doubt."""
    left, right = (side.with_columns(own_model="model", own_revision="revision") for side in (left, right))
    if left["model"].n_unique() == right["model"].n_unique() == 1:
        right = right.with_columns(model=pl.lit(left["model"][0]))
    if all(_single_checkpoints(side) for side in (left, right)):
        unnamed = pl.lit(None, dtype=pl.String).alias("revision")
        left, right = left.with_columns(unnamed), right.with_columns(unnamed)
    return left, right


def _single_checkpoints(side: pl.DataFrame) -> bool:
    counts = side.group_by("model").agg(pl.col("revision").drop_nulls().n_unique())
    return bool((counts["revision"] <= 1).all())


def _original(right: pl.DataFrame) -> list[pl.Expr]:
    return [pl.col(f"own_{name}").alias(f"candidate_{name}") for name in ("model", "revision")]


def _refuse_mixed(alone: pl.DataFrame, right: pl.DataFrame) -> None:
    other = right.select(*_WHICH, candidate_protocol="protocol", candidate_dtype="dtype")
    mixed = alone.join(other, on=_WHICH, how="inner", nulls_equal=True).sort("model", "read")
    if mixed.is_empty():
        return
    first = mixed.row(0, named=True)
    here, there = (f"{first[f'{side}protocol']} {first[f'{side}dtype'] or ''}".strip() for side in ("", "candidate_"))
    difference = f"{here} against {there}" if here != there else f"{here}, of another input or version of the read"
    raise ResultsError(
        f"{first['own_model']}: the {first['read']} reads were made under different protocols ({difference}); "
        "run both sides with the same suite, tokens, input, dtype and deadbench"
    )


def _models(side: pl.DataFrame) -> str:
    names = distinct(side["own_model"])
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _without_pair(alone: pl.DataFrame, candidate: pl.LazyFrame) -> pl.DataFrame:
    """Rows of the baseline's reads that the candidate has not, or only as a failure."""
    failures = latest(candidate).filter(pl.col("status").ne_missing("ok"))
    keys = ["own_model", "read", "seed"]
    errors = collected(failures.select(own_model="model", read="read", seed="seed", detail="error").unique(keys))
    return alone.join(errors, on=keys, how="left", nulls_equal=True).select(
        model="own_model", revision="own_revision", read="read", seed="seed", engine="engine", protocol="protocol",
        dtype="dtype", detail="detail",
        verdict=pl.when(pl.col("detail").is_null()).then(pl.lit("missing")).otherwise(pl.lit("failed")),
    )  # fmt: skip


def _name(word: str) -> pl.Expr:
    return pl.lit(word, dtype=pl.Categorical)


# What the candidate's row says of a value that it lacks.
_WHY_LOST = (
    pl.when(pl.col("candidate_error").is_not_null())
    .then(pl.format("no value in the candidate: {}", pl.col("candidate_error").cast(pl.String)))
    .when(pl.col("family").cast(pl.String) != pl.col("candidate_family").cast(pl.String))
    .then(pl.format("no value in the candidate, whose norm is {}, the baseline's {}", "candidate_family", "family"))
    .otherwise(pl.lit("no value in the candidate; its row does not say why"))
)


def _number(name: str) -> pl.Expr:
    value = pl.col(name).cast(pl.Float64)
    return pl.when(value.is_finite()).then(value)


def _change(metric: str, scale: Scale, before: pl.Expr, after: pl.Expr) -> pl.Expr:
    """candidate - baseline on `scale`; infinite where a magnitude rises from or falls to zero."""
    difference = after - before
    if scale == "absolute" or (scale == "decades" and _UNITS[metric] == "decades"):
        return difference
    scaled = difference / before.abs() if scale == "relative" else (after / before).log10()
    return pl.when(difference == 0).then(0.0).otherwise(scaled)


def _with_spread(pairs: pl.DataFrame, asked: Mapping[str, Scale]) -> pl.DataFrame:
    """With `noise_<metric>`: the baseline's deviation over `spread_seeds` seeds, on the metric's scale, if several."""
    group = [name for name in [*_WHICH, "protocol_hash"] if name != "seed"]
    columns: dict[str, pl.Expr] = {"spread_seeds": pl.len().cast(pl.Int64)}
    for metric, scale in asked.items():
        value = _number(metric)
        if scale == "decades" and _UNITS[metric] != "decades":
            value = pl.when(value > 0).then(value.log10())
        spread = value.std() / value.mean().abs() if scale == "relative" else value.std()
        columns[f"noise_{metric}"] = spread * widened(value.is_not_null().sum() - 1)
    several = pairs.filter(pl.len().over(group) > 1) if pairs["seed"].n_unique() > 1 else pairs.clear()
    return pairs.join(several.group_by(group).agg(**columns), on=group, how="left", nulls_equal=True)


def _token_noise(metric: str, scale: Scale) -> tuple[pl.Expr, pl.Expr]:
    """Standard errors over the read's tokens on `scale`, null where there is none.

    The first by the read's own bootstrap over sequences, the second of one mean of squares of independent tokens.
    """
    in_decades = metric in _DEPTHS_OF_ONE or (metric in _MEANS_OF_SQUARES and scale == "decades")
    resampled = pl.col(f"{metric}_standard_error") if in_decades and metric in _RESAMPLED else _NOTHING
    relative = (2 / pl.col("num_tokens")).sqrt()
    if in_decades:
        return resampled, relative / math.log(10)
    if metric in _MEANS_OF_SQUARES:
        return resampled, relative if scale == "relative" else relative * pl.col(metric)
    return _NOTHING, _NOTHING


def _differences(pairs: pl.LazyFrame, ask: Ask) -> pl.LazyFrame:
    metric, scale = ask
    seeds, (resampled, tokens) = pl.col(f"noise_{metric}"), _token_noise(metric, scale)
    in_decades = scale == "decades" or _UNITS[metric] == "decades"
    paired = pl.col(f"paired_{metric}") if metric in _RESAMPLED and in_decades else _NOTHING
    about_block = metric in _ABOUT_BLOCKS
    rows = pairs.select(
        *(pl.col(f"own_{name}").alias(name) if name in ("model", "revision") else pl.col(name) for name in _ROW),
        metric=_name(metric),
        baseline=_number(metric),
        baseline_error=_number("depth_standard_error") if metric == "depth" else _NOTHING,
        candidate=_number(f"candidate_{metric}"),
        candidate_error=_number("candidate_depth_standard_error") if metric == "depth" else _NOTHING,
        scale=_name(scale),
        # A difference has the noise of both sides; a paired one is of the difference itself.
        noise=pl.coalesce(paired, math.sqrt(2) * pl.coalesce(seeds, resampled, tokens)),
        noise_from=pl.when(paired.is_not_null())
        .then(_name("pairs"))
        .when(seeds.is_not_null())
        .then(_name("seeds"))
        .when(resampled.is_not_null())
        .then(_name("bootstrap"))
        .when(tokens.is_not_null())
        .then(_name("tokens")),
        num_tokens="num_tokens",
        num_noise_seeds=pl.when(paired.is_null() & seeds.is_not_null()).then("spread_seeds"),
        detail=pl.format("block {}", "candidate_worst_block") if about_block else pl.lit(None, dtype=pl.String),
        why_lost=_WHY_LOST,
    ).filter(pl.col("baseline").is_not_null())
    return rows.with_columns(change=_change(metric, scale, pl.col("baseline"), pl.col("candidate"))).with_columns(
        verdict=pl.when(pl.col("candidate").is_null()).then(_name("lost")).otherwise(verdict_of("change", "noise")),
        detail=pl.when(pl.col("candidate").is_null()).then("why_lost").otherwise("detail"),
    )
