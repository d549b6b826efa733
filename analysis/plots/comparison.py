"""Baseline against candidate: one metric of a comparison, a point a read, the line where nothing changed."""

import polars as pl

from deadbench.analysis.colours import RULE, VERDICT_COLOURS
from deadbench.analysis.plots.axes import Spec, foot, linear_axis, log_axis, specification, tooltip
from deadbench.analysis.plots.channels import named_colour


def comparison_plot(table: pl.DataFrame, metric: str = "depth") -> Spec | None:
    """`metric` of a table of `compare`: the candidate's value over the baseline's, coloured by verdict.

    A bar is two deviations of the noise each way: a point whose bar meets the line is within it.
    """
    import altair as alt

    known = table.with_columns(pl.selectors.categorical().cast(pl.String)).filter(
        (pl.col("metric") == metric) & pl.col("baseline").is_finite() & pl.col("candidate").is_finite()
    )
    if known.is_empty():
        return None
    ends = [*known["baseline"], *known["candidate"]]
    log = metric.startswith("lambda_") and min(ends) > 0
    bars = 2 * pl.col("noise") if not log else pl.lit(None, dtype=pl.Float64)
    rows = known.select(
        "model", "revision", "read", "verdict", "baseline", "candidate", "change",
        low=pl.col("candidate") - bars, high=pl.col("candidate") + bars,
    )  # fmt: skip
    axis = log_axis(foot(ends) / 1.5, 1.5 * max(ends)) if log else linear_axis(ends)
    low, high = axis["scale"].domain
    diagonal = alt.Chart(alt.NamedData(name="diagonal")).mark_line(color=RULE, strokeDash=[4, 3]).encode(
        x="baseline:Q", y="candidate:Q"
    )  # fmt: skip
    words = metric.replace("_", " ")
    base = alt.Chart(alt.NamedData(name="comparison")).encode(
        x=alt.X("baseline:Q", title=f"{words}, baseline", **axis),
        y=alt.Y("candidate:Q", title=f"{words}, candidate", **axis),
        color=named_colour("verdict", VERDICT_COLOURS, rows["verdict"].to_list()),
    )
    marks = base.mark_point(filled=True, size=90, opacity=0.9).encode(
        tooltip=["model:N", "revision:N", "read:N", "verdict:N", tooltip("baseline", ".4g"),
                 tooltip("candidate", ".4g"), tooltip("change", ".3g")],
    )  # fmt: skip
    errors = base.mark_rule(strokeWidth=4, opacity=0.3).encode(y="low:Q", y2="high:Q")
    layers = [diagonal, *([errors] if rows["low"].null_count() < len(rows) else []), marks]
    ends_of_line = [{"baseline": end, "candidate": end} for end in (low, high)]
    return specification(alt.layer(*layers), {"comparison": rows.to_dicts(), "diagonal": ends_of_line}, height=420)
