"""Plots of models, and what all plots share.

A plot is a function from frames to a Vega-Lite specification, or None where there is nothing to show. A model's trained
read at the last checkpoint stands for it, else its random one. Where the result set holds several protocols or
precisions, these are part of a line's name.
"""

from typing import Any

import polars as pl

from deadbench.analysis.leaderboard import FAMILIES
from deadbench.analysis.lines import best_lines, forward_lines
from deadbench.analysis.results import collected

# One colour a family, readable on white and on near black.
FAMILY_COLOURS = dict(zip(FAMILIES, ("#3b82d6", "#e07b39", "#8a949e", "#9b6bd3", "#c05a7c"), strict=True))
LINE_COLOURS = (
    "#2f7fd6", "#d0671c", "#2c9157", "#d64545", "#8a63d2", "#1a8a96", "#b8860b", "#c2559d", "#7a8490", "#6b8e23",
)  # fmt: skip
MAX_MODELS = 120  # more cannot be told apart; the deepest are kept

Spec = dict[str, Any]


def depth_plot(reads: pl.LazyFrame) -> Spec | None:
    """Depth of each model, random and trained joined by a rule, coloured by family."""
    import altair as alt

    frame = collected(
        named(forward_lines(reads))
        .filter(pl.col("depth").is_not_null())
        .select("line", "family", "read", "depth", *bar("depth"), deepest=pl.col("depth").max().over("line"))
        .sort("deepest", "line", "read", descending=[True, False, False])
    )
    if frame.is_empty():
        return None
    shown = frame["line"].unique(maintain_order=True).head(MAX_MODELS)
    rows = frame.filter(pl.col("line").is_in(shown.implode())).drop("deepest").to_dicts()
    base = alt.Chart(alt.NamedData(name="depths")).encode(
        y=alt.Y("line:N", title=None, sort=shown.to_list()),
        x=alt.X("depth:Q", title="depth, decades", axis=alt.Axis(format="~g")),
    )
    rules = base.mark_line(color="#8a949e", strokeWidth=1.5).encode(detail="line:N")
    marks = base.mark_point(filled=True, size=90, opacity=1).encode(
        color=family_colour([row["family"] for row in rows]),
        shape=read_shape(),
        tooltip=["line:N", "family:N", "read:N", tooltip("depth", ".2f")],
    )
    bars = base.mark_rule(strokeWidth=5, opacity=0.35).encode(
        x="low:Q", x2="high:Q", color=family_colour([row["family"] for row in rows])
    )
    bars = [bars] if frame["low"].null_count() < len(frame) else []
    return specification(alt.layer(rules, *bars, marks), {"depths": rows}, height=max(60, 24 * len(shown)))


def size_plot(reads: pl.LazyFrame) -> Spec | None:
    """Depth against the number of parameters, coloured by family."""
    import altair as alt

    frame = collected(
        named(best_lines(reads))
        .filter(pl.col("depth").is_not_null() & (pl.col("num_parameters") > 0))
        .select("line", "family", "read", "depth", "num_parameters", "hidden_size")
        .sort("line")
    )
    if len(frame) < 2:
        return None
    marks = (
        alt.Chart(alt.NamedData(name="sizes"))
        .mark_point(filled=True, size=90, opacity=0.9)
        .encode(
            x=alt.X("num_parameters:Q", title="parameters", scale=alt.Scale(type="log"),
                    axis=alt.Axis(tickCount=6, labelExpr="replace(format(datum.value, '~s'), 'G', 'B')")),
            y=alt.Y("depth:Q", title="depth, decades"),
            color=family_colour(frame["family"].to_list()),
            shape=read_shape(),
            tooltip=["line:N", "family:N", "read:N", tooltip("depth", ".2f"), tooltip("num_parameters", ".3s"),
                     "hidden_size:Q"],
        )
    )  # fmt: skip
    return specification(marks, {"sizes": frame.to_dicts()}, height=300)


def slope_plot(reads: pl.LazyFrame) -> Spec | None:
    """From random initialisation (left) to the last checkpoint (right): the depth of every model that has both."""
    import altair as alt

    frame = collected(
        named(forward_lines(reads))
        .filter(pl.col("depth").is_not_null())
        .select("line", "family", "read", "depth")
        .filter(pl.col("read").n_unique().over("line") == 2)
        .sort("line", "read")
    )
    if frame.is_empty():
        return None
    base = alt.Chart(alt.NamedData(name="slopes")).encode(
        x=alt.X("read:N", title=None, axis=alt.Axis(labelAngle=0), scale=alt.Scale(padding=0.3)),
        y=alt.Y("depth:Q", title="depth, decades"),
        color=family_colour(frame["family"].to_list()),
        detail="line:N",
        tooltip=["line:N", "family:N", "read:N", tooltip("depth", ".2f")],
    )
    layers = alt.layer(base.mark_line(strokeWidth=1.6, opacity=0.7), base.mark_point(filled=True, size=60))
    return specification(layers, {"slopes": frame.to_dicts()}, height=300)


def bar(column: str) -> list[pl.Expr]:
    """`low` and `high`: `column` less and plus its standard error, null where that is not known."""
    value, error = pl.col(column).cast(pl.Float64), pl.col(f"{column}_standard_error")
    return [(value - error).alias("low"), (value + error).alias("high")]


def named(lines: pl.LazyFrame) -> pl.LazyFrame:
    """With a column `line`: the model, and its protocol and dtype if the result set holds more than one."""
    together = pl.concat_str(pl.col("protocol", "dtype"), separator=", ", ignore_nulls=True)
    one_group = pl.struct("protocol", "dtype").n_unique() == 1
    return lines.with_columns(
        line=pl.when(one_group).then("model").otherwise(pl.format("{} ({})", pl.col("model"), together))
    )


def family_colour(present: list[str]) -> Any:
    """The family's colour, with a legend of the families that are there."""
    import altair as alt

    colours = alt.Scale(domain=list(FAMILY_COLOURS), range=list(FAMILY_COLOURS.values()))
    values = [family for family in FAMILIES if family in present]
    return alt.Color("family:N", scale=colours, legend=alt.Legend(orient="bottom", values=values))


def read_shape() -> Any:
    """A circle for a random read, a diamond for a trained one."""
    import altair as alt

    shapes = alt.Scale(domain=["random", "trained"], range=["circle", "diamond"])
    return alt.Shape("read:N", scale=shapes, legend=alt.Legend(orient="bottom"))


def line_colour(shown: list[str], reads: pl.LazyFrame | None = None) -> Any:
    """A colour a line, with a legend that one can click; with `reads`, a model has one colour in all their plots."""
    import altair as alt

    order = (
        shown if reads is None else collected(named(best_lines(reads)).select("line").sort("line"))["line"].to_list()
    )
    places = {line: place for place, line in enumerate(dict.fromkeys([*order, *shown]))}
    colours = [LINE_COLOURS[places[line] % len(LINE_COLOURS)] for line in shown]
    scale = alt.Scale(domain=shown, range=colours)
    return alt.Color("line:N", scale=scale, legend=alt.Legend(orient="bottom", title=None, symbolLimit=0))


def tooltip(column: str, format: str) -> Any:
    """A number in the tooltip."""
    import altair as alt

    return alt.Tooltip(f"{column}:Q", format=format)


def specification(chart: Any, datasets: dict[str, list[dict[str, Any]]], *, height: Any) -> Spec:
    """The chart with its rows beside it, as wide as the page."""
    # The rows go in once and beside the chart: Altair neither copies, checks nor counts them.
    spec: Spec = chart.properties(width="container", height=height).to_dict()
    return spec | {"datasets": datasets, "autosize": {"type": "fit-x", "contains": "padding"}}
