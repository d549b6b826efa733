"""What a result set says of a model over its training, as trackers take it: series of points over step and tokens."""

from collections.abc import Iterable
from typing import NamedTuple

import polars as pl

from deadbench.analysis.cells import told
from deadbench.analysis.compare import METRICS
from deadbench.analysis.lines import ok_reads
from deadbench.analysis.results import ResultsError, collected
from deadbench.suite.plain_text import MAX_VALUE

# What becomes a curve: columns of `reads`.
CURVES = (*METRICS, "scale_harmonic", "worst_block")
_KINDS = ["model", "read", "protocol", "dtype", "seed", "engine"]


class Point(NamedTuple):
    """One read: its training step, the tokens seen by then where known, when it was made, and its metrics by name."""

    step: int
    tokens: int | None
    seconds: float  # since 1970; 0 where the row has no time
    values: dict[str, float]


class Series(NamedTuple):
    """A model under one kind of read, in the order of its steps; `name` tells it from every other."""

    model: str
    name: str
    points: list[Point]


def series(reads: pl.LazyFrame, model: str | None = None) -> list[Series]:
    """Every model and kind of read of a result set (or those of `model`), with what can be drawn.

    A read without a step (random initialisation, a single checkpoint) stands at step 0. Values that are null or not
    finite have no point.

    Raises:
        ResultsError: no finished read, or none of `model`.
    """
    step = pl.col("checkpoint_step").fill_null(0).alias("step")
    wanted = [*_KINDS, "revision", step, "tokens_seen", "finished_at", *(pl.col(n).cast(pl.Float64) for n in CURVES)]
    rows = collected(ok_reads(reads).select(wanted).sort(*_KINDS, "step", "finished_at", nulls_last=True))
    if model is not None:
        known = rows["model"].unique().sort().to_list()
        rows = rows.filter(pl.col("model") == model)
        if rows.is_empty():
            raise ResultsError(f"model {model!r} has no finished read here; choose {', '.join(known[:20]) or 'none'}")
    if rows.is_empty():
        raise ResultsError("no finished read here; there is nothing to log")
    found: dict[tuple[str, str], list[Point]] = {}
    for row in rows.iter_rows(named=True):
        values = {name: row[name] for name in CURVES if row[name] is not None}
        if values:
            made = row["finished_at"].timestamp() if row["finished_at"] is not None else 0.0
            point = Point(row["step"], row["tokens_seen"], made, values)
            found.setdefault((row["model"], _name(row)), []).append(point)
    return [Series(model, name, points) for (model, name), points in found.items()]


def by_tokens(points: Iterable[Point]) -> list[Point]:
    """The points whose tokens are known, with those in the place of the step and names that say so."""
    return [
        point._replace(step=point.tokens, values={f"{name}_by_tokens": value for name, value in point.values.items()})
        for point in points
        if point.tokens is not None
    ]


def _name(row: dict[str, object]) -> str:
    parts = [row["model"], row["read"], row["protocol"], row["dtype"], row["engine"]]
    return told(" ".join(str(part) for part in [*parts, f"seed {row['seed']}"] if part is not None), MAX_VALUE)
