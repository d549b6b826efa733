"""Plots of models: depth, depth against size, from random to trained, predicted against measured.

A plot is a function from frames to a Vega-Lite specification, or None where there is nothing to show. A model's trained
read at the last checkpoint stands for it, else its random one; replicates are one point, their mean, with its spread.
On one axis depths of 13 and of 0, or of a zero scale, hide what happens within each: these plots can be of one family,
and leave out what zero scales made deep.
"""

import polars as pl

from deadbench.analysis.colours import RULE
from deadbench.analysis.lines import ok_reads
from deadbench.analysis.plots.axes import Spec, bar, linear_axis, log_axis, named, specification, tooltip
from deadbench.analysis.plots.channels import family_colour, read_shape
from deadbench.analysis.replicates import series_lines
from deadbench.analysis.results import collected

MAX_MODELS = 120  # more cannot be told apart; the deepest are kept
_COLUMNS = ["num_zero_scales", "family", "depth", "depth_standard_error", "num_parameters", "hidden_size"]
_ABOUT = ["line:N", "family:N", "read:N"]


def _lines(reads: pl.LazyFrame, family: str | None, learned: bool = False) -> pl.LazyFrame:
    """The lines that have a depth; where zero scales made it, only if `learned` are asked for, which are then alone."""
    lines = named(series_lines(reads, _COLUMNS), reads).filter(pl.col("depth").is_not_null())
    of_kind = (pl.col("num_zero_scales").fill_null(0) > 0) == learned
    return lines.filter(of_kind if family is None else of_kind & (pl.col("family") == family))


def depth_plot(reads: pl.LazyFrame, family: str | None = None, *, learned: bool = False) -> Spec | None:
    """Depth of each model, random and trained joined by a rule, coloured by family; or of those with zero scales."""
    import altair as alt

    frame = collected(
        _lines(reads, family, learned)
        .select("line", "family", "read", "depth", "row", *bar("depth"), deepest=pl.col("depth").max().over("line"))
        .sort("deepest", "line", "read", descending=[True, False, False])
    )
    if frame.is_empty():
        return None
    shown = frame["line"].unique(maintain_order=True).head(MAX_MODELS)
    rows = frame.filter(pl.col("line").is_in(shown.implode())).drop("deepest")
    ends = pl.concat([rows["depth"], rows["low"].drop_nulls(), rows["high"].drop_nulls()]).to_list()
    base = alt.Chart(alt.NamedData(name="depths")).encode(
        y=alt.Y("line:N", title=None, sort=shown.to_list()),
        x=alt.X("depth:Q", title="depth, decades", **linear_axis(ends)),
    )
    colour = family_colour(rows["family"].to_list())
    rules = base.mark_line(color=RULE, strokeWidth=1.5).encode(detail="line:N")
    marks = base.mark_point(filled=True, size=90, opacity=1).encode(
        color=colour, shape=read_shape(), tooltip=[*_ABOUT, tooltip("depth", ".2f")]
    )
    bars = base.mark_rule(strokeWidth=5, opacity=0.35).encode(x="low:Q", x2="high:Q", color=colour)
    layers = alt.layer(rules, *([bars] if rows["low"].null_count() < len(rows) else []), marks)
    return specification(layers, {"depths": rows.to_dicts()}, height=max(60, 24 * len(shown)))


def size_plot(reads: pl.LazyFrame, family: str | None = None) -> Spec | None:
    """Depth against the number of parameters, coloured by family."""
    import altair as alt

    lines = _lines(reads, family).filter(pl.col("num_parameters") > 0)
    trained_first = lines.sort(pl.col("read") == "trained", descending=True, maintain_order=True)
    frame = collected(trained_first.unique("line", keep="first").select(
        "line", "family", "read", "depth", "row", "num_parameters", "hidden_size").sort("line"))  # fmt: skip
    if len(frame) < 2:
        return None
    low, high = (frame["num_parameters"].min(), frame["num_parameters"].max())
    marks = (
        alt.Chart(alt.NamedData(name="sizes"))
        .mark_point(filled=True, size=90, opacity=0.9)
        .encode(
            x=alt.X("num_parameters:Q", title="parameters", **_counts(float(low) / 1.5, float(high) * 1.5)),  # type: ignore[arg-type]
            y=alt.Y("depth:Q", title="depth, decades", **linear_axis(frame["depth"])),
            color=family_colour(frame["family"].to_list()),
            shape=read_shape(),
            tooltip=[*_ABOUT, tooltip("depth", ".2f"), tooltip("num_parameters", ".3s"), "hidden_size:Q"],
        )
    )
    return specification(marks, {"sizes": frame.to_dicts()}, height=260)


def _counts(low: float, high: float) -> dict[str, object]:
    return log_axis(low, high, labels="replace(format(datum.value, '~s'), 'G', 'B')")


def slope_plot(reads: pl.LazyFrame, family: str | None = None) -> Spec | None:
    """From random initialisation (left) to the last checkpoint (right): the depth of every model that has both."""
    import altair as alt

    frame = collected(
        _lines(reads, family)
        .select("line", "family", "read", "depth", "row", *bar("depth"))
        .filter(pl.col("read").n_unique().over("line") == 2)
        .sort("line", "read")
    )
    if frame.is_empty():
        return None
    base = alt.Chart(alt.NamedData(name="slopes")).encode(
        x=alt.X("read:N", title=None, axis=alt.Axis(labelAngle=0), scale=alt.Scale(padding=0.3)),
        y=alt.Y("depth:Q", title="depth, decades", **linear_axis(frame["depth"])),
        color=family_colour(frame["family"].to_list()),
        detail="line:N",
        tooltip=[*_ABOUT, tooltip("depth", ".2f")],
    )
    layers = alt.layer(base.mark_line(strokeWidth=1.6, opacity=0.7), base.mark_point(filled=True, size=60))
    return specification(layers, {"slopes": frame.to_dicts()}, height=260)


def predicted_plot(reads: pl.LazyFrame) -> Spec | None:
    """The measured depth over that which the scales alone predict, of every random and trained read; the line is y = x.

    Only kernels have a prediction: what a zero scale makes deep is left out.
    """
    import altair as alt

    forward = ok_reads(reads).filter(
        pl.col("read").is_in(["random", "trained"]) & pl.col("depth").is_not_null()
        & pl.col("depth_predicted").is_not_null() & (pl.col("num_zero_scales").fill_null(0) == 0)
        & (pl.col("family") == "layernorm")
    )  # fmt: skip
    frame = collected(
        named(forward, reads).select(
            "line", "family", "read", "revision", "row", "depth_predicted", *bar_of_tokens(), measured="depth"
        ).sort("line", "read", "revision", nulls_last=True)
    )  # fmt: skip
    if frame.is_empty():
        return None
    ends = pl.concat([frame["depth_predicted"], frame["measured"]]).to_list()
    axis = linear_axis(ends)
    low, high = axis["scale"].domain
    diagonal = alt.Chart(alt.NamedData(name="diagonal")).mark_line(color=RULE, strokeDash=[4, 3]).encode(
        x="depth_predicted:Q", y="measured:Q"
    )  # fmt: skip
    base = alt.Chart(alt.NamedData(name="predicted")).encode(
        x=alt.X("depth_predicted:Q", title="predicted from the scales, decades", **axis),
        y=alt.Y("measured:Q", title="measured depth, decades", **axis),
        color=family_colour(frame["family"].to_list()),
    )
    marks = base.mark_point(filled=True, size=80, opacity=0.85).encode(
        shape=read_shape(),
        tooltip=[*_ABOUT, "revision:N", tooltip("depth_predicted", ".2f"), tooltip("measured", ".2f")],
    )
    bars = base.mark_rule(strokeWidth=4, opacity=0.3).encode(y="low:Q", y2="high:Q")
    layers = [diagonal, *([bars] if frame["low"].null_count() < len(frame) else []), marks]
    ends_of_line = [{"depth_predicted": end, "measured": end} for end in (low, high)]
    return specification(alt.layer(*layers), {"predicted": frame.to_dicts(), "diagonal": ends_of_line}, height=320)


def bar_of_tokens() -> list[pl.Expr]:
    """`low` and `high` of one read's depth, by the sample of its tokens."""
    error = pl.col("depth_standard_error")
    return [(pl.col("depth") - error).alias("low"), (pl.col("depth") + error).alias("high")]
