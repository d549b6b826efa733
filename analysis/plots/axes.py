"""What the plots share beside their colours: names of lines, error bars, axes with few ticks, the specification."""

import math
from collections.abc import Iterable
from typing import Any

import polars as pl

from deadbench.analysis.cells import told, without_secrets
from deadbench.analysis.lines import best_lines, ok_reads
from deadbench.analysis.replicates import in_series
from deadbench.analysis.results import collected
from deadbench.suite.plain_text import MAX_LINE

MAX_TICKS, MAX_STEP_TICKS = 7, 8
# Of the largest value on a logarithmic axis: what lies below is drawn at this foot. Zero scales leave eigenvalues of
# 1e-76, which say no more than that, and beside which nothing else can be told apart.
DEEPEST = 1e-20

# 1e-14, 0.001, 10, 1e6
LOG_LABELS = (
    "datum.value >= 1e-3 && datum.value < 1e4 ? format(datum.value, '~g') "
    ": replace(format(datum.value, '.0e'), 'e+', 'e')"
)

Spec = dict[str, Any]


def named(lines: pl.LazyFrame, reads: pl.LazyFrame) -> pl.LazyFrame:
    """With `line`, the model, with protocol and dtype where `reads` has several, and `row`, its place on the page."""
    forward = ok_reads(reads).filter(pl.col("read").is_in(["random", "trained"]))
    groups = collected(forward.select("protocol", "dtype").unique())
    together = pl.concat_str(pl.col("protocol", "dtype"), separator=", ", ignore_nulls=True)
    name = pl.col("model") if len(groups) <= 1 else pl.format("{} ({})", pl.col("model"), together)
    return lines.with_columns(line=name, row=row_anchor())


def row_anchor() -> pl.Expr:
    """Where the page's leaderboard has the line of a model, protocol and dtype: `row-gpt2-quick-float32`."""
    model = pl.col("model").cast(pl.String).map_elements(without_secrets, return_dtype=pl.String)
    words = pl.concat_str(pl.lit("row"), model, pl.col("protocol", "dtype"), separator=" ", ignore_nulls=True)
    return words.str.to_lowercase().str.replace_all("[^a-z0-9*]+", "-").str.replace_all("*", "x", literal=True)


def line_families(reads: pl.LazyFrame) -> list[tuple[str, str, str]]:
    """(line, its model, its family) of each line of the result set, and of each series of replicates."""
    lines = in_series(best_lines(reads))
    both = pl.concat([lines, lines.with_columns(model="series")])
    told = named(both, reads).select("line", "model", pl.col("family").fill_null("undetermined"))
    return collected(told.unique("line", maintain_order=True).sort("line")).rows()


def bar(column: str) -> list[pl.Expr]:
    """`low` and `high`: `column` less and plus its spread over seeds, else its standard error; null where unknown."""
    value = pl.col(column).cast(pl.Float64)
    error = pl.coalesce(f"{column}_spread", f"{column}_standard_error")
    return [(value - error).alias("low"), (value + error).alias("high")]


def tooltip(column: str, format: str, title: str | None = None) -> Any:
    """A number in the tooltip."""
    import altair as alt

    return alt.Tooltip(f"{column}:Q", format=format, title=title or column.replace("_", " "))


def foot(values: Iterable[float]) -> float:
    """The smallest value that a logarithmic axis of `values`, all positive, shows."""
    known = list(values)
    return max(min(known), max(known) * DEEPEST)


def powers(low: float, high: float) -> list[float]:
    """At most `MAX_TICKS` powers of ten from `low` to `high`, evenly spaced; of less than two decades 1, 2 and 5 times.

    Example:
        >>> powers(1e-14, 3.0)
        [1e-12, 1e-09, 1e-06, 0.001, 1.0]
        >>> powers(0.05, 0.9)
        [0.05, 0.1, 0.2, 0.5]
    """
    first, final = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if final - first < 2:
        fine = [float(f"{digit}e{exponent}") for exponent in range(first - 1, final + 1) for digit in (1, 2, 5)]
        shown = [value for value in fine if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        return shown if len(shown) <= MAX_TICKS else shown[::2]
    step = math.ceil((final - first) / (MAX_TICKS - 1))
    return [float(f"1e{exponent}") for exponent in range(first, final + 1) if exponent % step == 0]


def log_axis(low: float, high: float, *, reverse: bool = False, labels: str = LOG_LABELS) -> dict[str, Any]:
    """`scale` and `axis` of a logarithmic channel from `low` to `high`."""
    import altair as alt

    scale = alt.Scale(type="log", domain=[low, high], nice=False, clamp=True, reverse=reverse)
    return {"scale": scale, "axis": alt.Axis(values=powers(low, high), labelExpr=labels)}


def linear_axis(values: Iterable[float | None], least: float = 0.5) -> dict[str, Any]:
    """`scale` and `axis` of a linear channel that shows `values` at their own size: from their range, not from zero.

    A range below `least` is widened to it, so that rounding does not look like a change.
    """
    import altair as alt

    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    counts = all(float(value).is_integer() for value in known)
    least = max(least, 1.0) if counts else least
    margin = max((least - (high - low)) / 2, 0.06 * (high - low))
    bottom = low - margin if low < 0 else max(0.0, low - margin)
    return {
        "scale": alt.Scale(domain=[bottom, high + margin], nice=True, zero=False),
        "axis": alt.Axis(
            # Not `format`, which an axis cuts to the digits of its steps: 20, 40 would be 2e+1, 4e+1.
            labelExpr="format(datum.value, '~g')",
            tickCount=5,
            tickMinStep=1 if counts else 0,
            labelOverlap=True,
            labelSeparation=6,
        ),
    }


def step_ticks(steps: list[int]) -> list[int]:
    """Where a symlog axis is labelled: at the checkpoints if they are few, else at zero and the powers of ten."""
    distinct = sorted(set(steps))
    if len(distinct) <= MAX_STEP_TICKS:
        return distinct
    all_powers = [10**exponent for exponent in range(19) if distinct[0] <= 10**exponent <= distinct[-1]]
    return ([0] if distinct[0] == 0 else []) + all_powers


def step_axis(steps: list[int]) -> Any:
    """Training steps from left to right."""
    import altair as alt

    return alt.X(
        "step:Q", title="training step", scale=alt.Scale(type="symlog", nice=False),
        axis=alt.Axis(values=step_ticks(steps), labelOverlap=True, labelFlush=True, format=",d"),
    )  # fmt: skip


def specification(chart: Any, datasets: dict[str, list[dict[str, Any]]], *, height: Any) -> Spec:
    """The chart with its rows beside it, as wide as the page."""
    # The rows go in once and beside the chart: Altair neither copies, checks nor counts them.
    spec: Spec = chart.properties(width="container", height=height).to_dict()
    return with_data(spec, datasets) | {"autosize": {"type": "fit-x", "contains": "padding"}}


def with_data(spec: Spec, datasets: dict[str, list[dict[str, Any]]]) -> Spec:
    """The chart with its rows, all texts as they can be drawn: of a control character the renderer dies."""
    drawn: Spec = _drawable(spec)
    return drawn | {"datasets": {name: _drawable(rows, cut=True) for name, rows in datasets.items()}}


def _drawable(value: Any, *, cut: bool = False) -> Any:
    """`value` with each text in it of printable characters, and of bounded length in rows and lists of values."""
    if isinstance(value, dict):
        return {key: _drawable(each, cut=cut) for key, each in value.items()}
    if isinstance(value, list):
        return [_drawable(each, cut=cut or isinstance(each, str)) for each in value]
    if not isinstance(value, str) or (value.isprintable() and not (cut and (len(value) > MAX_LINE or "://" in value))):
        return value
    return told(value, MAX_LINE if cut else None)
