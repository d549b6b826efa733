"""A model over its checkpoints: every read in training order, a line of sparks a metric, and where a series breaks.

`first_failing` is the bisection of `deadbench trend --bisect`: it asks for a checkpoint's verdict only when it must.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import polars as pl
from jaxtyping import Float
from numpy.typing import NDArray

from deadbench.analysis.compare import unit_of
from deadbench.analysis.lines import LINE, distinct, in_natural_order, last, ok_reads
from deadbench.analysis.replicates import averaged, in_series
from deadbench.analysis.results import ResultsError, collected
from deadbench.suite.schema import READS

METRICS = [
    "depth", "depth_exact", "depth_predicted", "lambda_v", "lambda_mean", "alignment", "containment", "num_dead_1e6",
    "num_algebraic", "num_learned", "num_zero_scales", "scale_harmonic", "worst_block_ratio", "blocks_preserved",
]  # fmt: skip
COLUMNS = [
    "checkpoint_step",
    "revision",
    "read",
    "seed",
    *METRICS,
    "depth_standard_error",
    "input",
    "protocol",
    "dtype",
]
SPARKS = "▁▂▃▄▅▆▇█"
_LOG_UNITS = ("output^2", "scale^2")  # magnitudes: a series of them breaks by a factor
_MIN_SERIES = 4  # fewer points have no change-point to speak of

T = TypeVar("T")


def checkpoints(reads: pl.LazyFrame, model: str, metrics: Sequence[str] = METRICS) -> pl.DataFrame:
    """The trained reads of `model`, one a checkpoint and line, in training order; parameter reads where there is none.

    `model` may be a series of models that differ in a training seed, as `pythia-160m-seed*`. Over the seeds that a
    checkpoint was read with, of training or of the protocol, it is the mean, and `depth_spread` their deviation.
    Checkpoints whose step is not known come last, in the natural order of their names.

    Raises:
        ResultsError: no such model, no finished read of it, or a metric that is no numeric column.
    """
    for metric in metrics:
        if unit_of(metric) is None:
            raise ResultsError(f"--metric {metric!r} is no numeric column of reads; choose {', '.join(METRICS)}")
    named = in_series(ok_reads(reads))
    either = pl.concat_list("model", "series").explode()
    known = distinct(collected(named.select(either.alias("model")))["model"])
    if model not in known:
        raise ResultsError(f"--model {model!r} has no finished read here; choose {', '.join(known[:20]) or 'none'}")
    # Alone, a member of a series goes by its own name.
    of_model = named.filter((pl.col("model") == model) | (pl.col("series") == model)).with_columns(series=pl.lit(model))
    columns = [*COLUMNS, *(metric for metric in metrics if metric not in COLUMNS)]
    by = ["read", *LINE[1:], "revision"]
    each = last(of_model, [*by, "member"])
    found = collected(averaged(each, by, columns).select(*columns, "depth_spread", "num_replicates"))
    for read in ("trained", "parameters"):
        series = found.filter(read=read)
        if not series.is_empty():
            order = ["protocol", "dtype", "seed", "checkpoint_step", in_natural_order("revision")]
            return series.sort(order, nulls_last=True)
    raise ResultsError(f"--model {model!r} has no checkpoints here, only its random initialisation")


def summary(series: pl.DataFrame, metrics: Sequence[str] = METRICS) -> pl.DataFrame:
    """One row for every line (protocol, dtype, seed) and metric that has values.

    `trend` is a line of sparks from the series' smallest to its largest value; `change_step` is the first checkpoint
    after the change-point (`change_point`), null where the series has none; `change` is the difference of the means
    after and before it, in decades for magnitudes.
    """
    rows = []
    for (protocol, dtype, seed), line in series.group_by("protocol", "dtype", "seed", maintain_order=True):
        for metric in metrics:
            known = line.filter(pl.col(metric).is_not_null())
            values = on_scale(metric, known[metric].cast(pl.Float64).to_list())
            if not values:
                continue
            place = change_point(np.array(values))
            change = None if place is None else float(np.mean(values[place:]) - np.mean(values[:place]))
            shown = known[metric].cast(pl.Float64)
            rows.append(
                {
                    "metric": metric, "trend": sparkline(values), "first": shown[0], "last": shown[-1],
                    "min": shown.min(), "max": shown.max(), "num_checkpoints": len(values),
                    "change_step": None if place is None else known["checkpoint_step"][place],
                    "change_revision": None if place is None else known["revision"][place],
                    "change": change, "unit": "decades" if _is_log(metric) else unit_of(metric) or None,
                    "protocol": protocol, "dtype": dtype, "seed": seed,
                }
            )  # fmt: skip
    schema = {"change_step": pl.Int64, "change_revision": pl.String, "change": pl.Float64, "unit": pl.String}
    return pl.DataFrame(rows, schema_overrides=schema, infer_schema_length=None)


def on_scale(metric: str, values: list[float]) -> list[float]:
    """The values as a trend compares them: magnitudes as log10, a zero among them as the smallest that is not."""
    if not _is_log(metric):
        return values
    least = min((value for value in values if value > 0), default=1.0)
    return [math.log10(max(value, least)) for value in values]


def sparkline(values: Sequence[float]) -> str:
    """`▁▃▆█`: each value's place between the smallest and the largest."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # rounding is no trend
        return SPARKS[0] * len(values)
    return "".join(SPARKS[min(int((value - low) / (high - low) * len(SPARKS)), len(SPARKS) - 1)] for value in values)


def change_point(values_T: NDArray[np.float64] | Float[np.ndarray, "T"]) -> int | None:
    """Index of the first value after the one step that explains a series best; None where a constant does as well.

    Least squares over all splits in two constant pieces, accepted by the Bayesian information criterion with two
    further parameters, the place and the second level: `n log(SSE_0 / SSE_1) > 2 log n` (Yao 1988).
    """
    count = len(values_T)
    if count < _MIN_SERIES or not np.isfinite(values_T).all():
        return None
    centred_T = values_T - values_T.mean()
    whole = float(centred_T @ centred_T)
    # Below rounding there is nothing to explain.
    floor = count * (1e-9 * max(1.0, float(np.abs(values_T).max()))) ** 2
    if whole <= floor:
        return None
    sums_T = np.cumsum(centred_T)[:-1]
    sizes_T = np.arange(1, count)
    gains_T = sums_T**2 * count / (sizes_T * (count - sizes_T))
    best = int(np.argmax(gains_T))
    left = max(whole - float(gains_T[best]), floor)
    return best + 1 if count * math.log(whole / left) > 2 * math.log(count) else None


def first_failing(series: Sequence[T], fails: Callable[[T], bool]) -> T | None:
    """The first of `series` that fails, for a series of passes followed by failures; None when its last one passes.

    The first is the baseline and taken to pass. Asks `fails` at most `ceil(log2(len(series) - 1)) + 1` times, and
    of each member at most once.
    """
    if len(series) < 2 or not fails(series[-1]):
        return None
    # The last is known to fail, the first to pass: what is left is between them.
    place = bisect_left(range(1, len(series) - 1), True, key=lambda i: fails(series[i]))
    return series[place + 1]


def _is_log(metric: str) -> bool:
    return next(column.unit for column in READS if column.name == metric) in _LOG_UNITS
