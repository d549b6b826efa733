"""A slow drift over the last checkpoints: the slope of a metric over training, with its interval, against a bound.

A change-point looks for a jump, and a comparison of neighbours for a change beyond its noise; a metric that loses a
little with every checkpoint passes both. `drift` of a gate.yaml bounds the slope itself:

    drift:
      depth: {worse: lower, per_1000_steps: 0.01, last: 8, reads: [trained]}
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import polars as pl

from deadbench.analysis.gate import CANNOT_TELL, DriftGate, Gate, judged_models
from deadbench.analysis.lines import ok_reads
from deadbench.analysis.results import collected
from deadbench.analysis.student import widening

LEAST_CHECKPOINTS = 4  # a line through three says little of its error
_SERIES = ["model", "read", "seed", "engine", "protocol_hash"]


class Slope(NamedTuple):
    """A least-squares line over checkpoints: its slope, and its standard error widened for few of them."""

    per_1000_steps: float
    error: float


def slope(steps: list[int], values: list[float]) -> Slope:
    """The line through `values` at `steps`, the residuals' scatter as the noise of each.

    Raises:
        ValueError: fewer than `LEAST_CHECKPOINTS`, or all at one step.
    """
    if len(steps) < LEAST_CHECKPOINTS or len(set(steps)) < 2:
        raise ValueError(f"a slope needs {LEAST_CHECKPOINTS} checkpoints at different steps; got {len(steps)}")
    x, y = np.array(steps, dtype=np.float64) / 1000, np.array(values)
    centred = x - x.mean()
    spread = float(centred @ centred)
    gradient = float(centred @ y) / spread
    residuals = y - y.mean() - gradient * centred
    degrees = len(steps) - 2
    return Slope(gradient, widening(degrees) * math.sqrt(float(residuals @ residuals) / degrees / spread))


def with_drift(judged: pl.DataFrame, reads: pl.LazyFrame, gate: Gate) -> pl.DataFrame:
    """The rows of `judge` and, where the gate bounds a drift, those of `judge_drift`."""
    return pl.concat([judged, judge_drift(reads, gate)], how="diagonal_relaxed") if gate.drift else judged


def judge_drift(reads: pl.LazyFrame, gate: Gate) -> pl.DataFrame:
    """A row for every series of the candidate's `reads` and metric of `gate.drift`, as `judge` has them.

    `candidate` is the last value, `change` the slope per 1 000 steps, `noise` its standard error and `allowed` the
    bound. broken: worse than the bound by more than `gate.noise` errors. passed: within it by as many. Else cannot
    tell, as with fewer than `LEAST_CHECKPOINTS`.
    """
    rows = [row for metric, rule in gate.drift.items() for row in _rows(reads, metric, rule, gate.noise)]
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")


_SCHEMA: Mapping[str, type[pl.DataType]] = {
    "model": pl.String, "revision": pl.String, "read": pl.String, "seed": pl.Int64, "engine": pl.String,
    "metric": pl.String, "candidate": pl.Float64, "change": pl.Float64, "scale": pl.String, "noise": pl.Float64,
    "noise_from": pl.String, "verdict": pl.String, "detail": pl.String, "protocol": pl.String, "dtype": pl.String,
    "candidate_model": pl.String, "candidate_revision": pl.String, "allowed": pl.Float64,
}  # fmt: skip


def _rows(reads: pl.LazyFrame, metric: str, rule: DriftGate, times: float) -> Iterator[dict[str, object]]:
    value = pl.col(metric).cast(pl.Float64)
    wanted = [*_SERIES, "revision", "protocol", "dtype", "checkpoint_step", value.alias("value")]
    known = ok_reads(reads).filter(pl.col("read").is_in(rule.reads), pl.col("checkpoint_step").is_not_null())
    rows = collected(known.filter(value.is_finite()).select(wanted).sort(*_SERIES, "checkpoint_step"))
    rows = rows.filter(pl.col("model").is_in(judged_models(rows["model"], rule.models)))
    for _, series in rows.group_by(_SERIES, maintain_order=True):
        last = series.tail(rule.last)
        row = last.select("model", "revision", "read", "seed", "engine", "protocol", "dtype").row(-1, named=True) | {
            "metric": f"{metric} drift", "candidate": last["value"][-1], "scale": "per 1000 steps",
            "noise_from": "checkpoints", "candidate_model": last["model"][-1],
            "candidate_revision": last["revision"][-1], "allowed": rule.per_1000_steps,
        }  # fmt: skip
        try:
            found = slope(last["checkpoint_step"].to_list(), last["value"].to_list())
        except ValueError:
            detail = f"{len(last)} checkpoints; a slope needs {LEAST_CHECKPOINTS}"
            yield row | {"verdict": CANNOT_TELL, "detail": detail}
            continue
        gradient = found.per_1000_steps
        worse = {"lower": -gradient, "higher": gradient, "changed": abs(gradient)}[rule.worse]
        hidden = times * found.error
        verdict = CANNOT_TELL
        if worse - hidden > rule.per_1000_steps:
            verdict = "broken"
        elif worse + hidden <= rule.per_1000_steps:
            verdict = "passed"
        detail = f"over the last {len(last)} checkpoints, from {last['revision'][0]}"
        yield row | {"change": gradient, "noise": found.error, "verdict": verdict, "detail": detail}
