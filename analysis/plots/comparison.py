"""Baseline against candidate: one metric of a comparison, and beside it what each read changed by."""

from typing import Any

import polars as pl

from deadbench.analysis.colours import RULE, VERDICT_COLOURS
from deadbench.analysis.plots.axes import Spec, foot, linear_axis, log_axis, tooltip, with_data
from deadbench.analysis.plots.channels import named_colour

MAX_READS = 60  # the largest changes; more names have no room
_SIZE = 400  # pixels


def comparison_plot(table: pl.DataFrame, metric: str = "depth") -> Spec | None:
    """`metric` of a table of `compare`. Left, the candidate over the baseline: where nothing changed, on the line.

    Right, the change of each read with two deviations of its noise as a bar: models of 13 decades and of none, which
    share an axis on the left, stand there at the size of what they changed by.
    """
    import altair as alt

    finite = [pl.col(name).is_finite() for name in ("baseline", "candidate", "change")]
    known = table.with_columns(pl.selectors.categorical().cast(pl.String)).filter(pl.col("metric") == metric, *finite)
    if known.is_empty():
        return None
    rows = known.select(
        "model", "revision", "read", "verdict", "baseline", "candidate", "change",
        name=pl.concat_str("model", "revision", "read", separator=" ", ignore_nulls=True),
        low=pl.col("change") - 2 * pl.col("noise"), high=pl.col("change") + 2 * pl.col("noise"),
    )  # fmt: skip
    largest = rows.sort(pl.col("change").abs(), descending=True).head(MAX_READS)
    colour = named_colour("verdict", VERDICT_COLOURS, rows["verdict"].to_list())
    layers = [_values(rows, metric, colour), _changes(largest, table, metric, colour)]
    spec: Spec = alt.hconcat(*layers, spacing=40).to_dict()
    ends = _ends(rows)
    diagonal = [{"baseline": end, "candidate": end} for end in (min(ends), max(ends))]
    datasets = {"comparison": rows.to_dicts(), "changes": largest.to_dicts(), "diagonal": diagonal}
    return with_data(spec, datasets)


def _ends(rows: pl.DataFrame) -> list[float]:
    return [*rows["baseline"], *rows["candidate"]]


def _values(rows: pl.DataFrame, metric: str, colour: Any) -> Any:
    import altair as alt

    ends = _ends(rows)
    log = metric.startswith("lambda_") and min(ends) > 0
    axis = log_axis(foot(ends) / 1.5, 1.5 * max(ends)) if log else linear_axis(ends)
    words = metric.replace("_", " ")
    x, y = (alt.X("baseline:Q", title=f"{words}, baseline", **axis),
            alt.Y("candidate:Q", title=f"{words}, candidate", **axis))  # fmt: skip
    line = alt.Chart(alt.NamedData(name="diagonal")).mark_line(color=RULE, strokeDash=[4, 3]).encode(x=x, y=y)
    points = alt.Chart(alt.NamedData(name="comparison")).mark_point(filled=True, size=90, opacity=0.9)
    return alt.layer(line, points.encode(x=x, y=y, color=colour, tooltip=_about())).properties(
        width=_SIZE, height=_SIZE
    )


def _changes(rows: pl.DataFrame, table: pl.DataFrame, metric: str, colour: Any) -> Any:
    import altair as alt

    ends = [0.0, *rows["change"], *rows["low"].drop_nulls(), *rows["high"].drop_nulls()]
    scale = table.with_columns(pl.col("scale", "metric").cast(pl.String)).filter(metric=metric)["scale"][0]
    zero = alt.Chart().mark_rule(color=RULE, strokeDash=[4, 3]).encode(x=alt.datum(0))
    base = alt.Chart(alt.NamedData(name="changes")).encode(
        x=alt.X("change:Q", title=f"change, {scale}", **linear_axis(ends, least=0.1)),
        y=alt.Y("name:N", title=None, sort=rows["name"].to_list()),
        color=colour,
    )
    bars = base.mark_rule(strokeWidth=5, opacity=0.3).encode(x="low:Q", x2="high:Q")
    points = base.mark_point(filled=True, size=90, opacity=0.9).encode(tooltip=_about())
    layers = [zero, *([bars] if rows["low"].null_count() < len(rows) else []), points]
    return alt.layer(*layers, data=alt.NamedData(name="changes")).properties(
        width=_SIZE, height=min(_SIZE, 60 * len(rows))
    )


def _about() -> list[Any]:
    values = [tooltip("baseline", ".4g"), tooltip("candidate", ".4g"), tooltip("change", ".3g")]
    return ["model:N", "revision:N", "read:N", "verdict:N", *values]
