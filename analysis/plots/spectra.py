"""Plots of spectra: the final norm's, with v's place and the rounding floor, and the residual stream's by block."""

from typing import Any

import polars as pl

from deadbench.analysis.colours import FLOOR, ROUNDING, STATE_COLOURS
from deadbench.analysis.lines import best_lines
from deadbench.analysis.plots.axes import Spec, foot, line_families, log_axis, named, specification, tooltip
from deadbench.analysis.plots.channels import line_colour
from deadbench.analysis.results import collected
from deadbench.suite.schema import KEY

MAX_POINTS = 200  # of one spectrum; both ends are kept exactly
MAX_SPECTRA = 40  # more cannot be told apart; the deepest of each family are kept
_PLACE = pl.col("depth").rank("ordinal", descending=True).over("family").alias("place_in_family")
_ROUNDING = ("lambda_mean", "depth_predicted")


def spectra_plot(reads: pl.LazyFrame, spectra: pl.LazyFrame) -> Spec | None:
    """Eigenvalues by their place from the bottom, one line a model, and `lambda_v` as a diamond at the last place.

    The band at the foot is below every line's certified floor. What is deeper than the axis lies on its foot.
    """
    import altair as alt

    chosen = (
        named(best_lines(reads), reads)
        .with_columns(_PLACE)
        .select(
            "place_in_family",
            *KEY,
            "run_id",
            "line",
            "family",
            "row",
            "lambda_v",
            "depth",
            "spectrum_floor",
            *_ROUNDING,
        )
    )
    # The measurement's place, not just its key: the spectrum of an older run is another one.
    final = spectra.filter(pl.col("site") == "final_norm").unique([*KEY, "run_id"])
    rows = collected(
        final.join(chosen, on=[*KEY, "run_id"], nulls_equal=True)
        .sort("place_in_family", "line", nulls_last=True)
        .head(MAX_SPECTRA)
        .sort("depth", "line", descending=[True, False], nulls_last=True)
        .select("line", "family", "row", "lambda_v", "spectrum_floor", *_ROUNDING, "eigenvalues")
    ).to_dicts()
    points, along_v = [], []
    for row in rows:
        origin = {name: row[name] for name in ("line", "family", "row")}
        points += [origin | point for point in downsampled(row["eigenvalues"])]
        if row["lambda_v"] is not None and row["lambda_v"] > 0:
            along_v.append(origin | {"place": 1, "value": row["lambda_v"]})
    if not points:
        return None
    bands = _bands(rows)
    values = [point["value"] for point in points + along_v] + [band["high"] for band in bands]
    lowest, widest = foot(values) / 10, max(point["place"] for point in points)
    picked = alt.selection_point(fields=["line"], bind="legend")
    upward = log_axis(lowest, 2 * max(values))
    shaded = alt.Chart(alt.NamedData(name="bands")).mark_rect(opacity=0.16).encode(
        y=alt.Y("low:Q", scale=upward["scale"]), y2="high:Q", fill=alt.Fill("colour:N", scale=None),
        tooltip=["floor:N", alt.Tooltip("high:Q", title="below", format=".1e")],
    )  # fmt: skip
    base = alt.Chart(alt.NamedData(name="points")).encode(
        x=alt.X("place:Q", title="place from the bottom",
                **log_axis(1, max(2.0, widest), reverse=True)),
        y=alt.Y("value:Q", title="eigenvalue", **upward),
        color=line_colour([row["line"] for row in rows], line_families(reads)),
        opacity=alt.when(picked).then(alt.value(1.0)).otherwise(alt.value(0.08)),
    )  # fmt: skip
    about = ["line:N", "family:N", alt.Tooltip("place:Q", title="from the bottom"), tooltip("value", ".3e")]
    curves = base.mark_line(strokeWidth=1.6).add_params(picked)
    # Wide transparent points: the line itself is too thin to hover on.
    targets = base.mark_point(size=90, opacity=0, filled=True).encode(opacity=alt.value(0), tooltip=about)
    on_v = base.mark_point(shape="diamond", size=90, strokeWidth=2).encode(
        tooltip=["line:N", "family:N", alt.Tooltip("value:Q", title="lambda_v", format=".3e")]
    )
    on_v.data = alt.NamedData(name="along_v")
    datasets = {"bands": [{"low": lowest} | band for band in bands], "points": points, "along_v": along_v}
    return specification(alt.layer(shaded, curves, targets, on_v), datasets, height=380)


def _bands(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`low` (none: the foot of the plot) to `high` of what is rounding, over all lines."""
    bands = []
    predicted = [
        row["lambda_mean"] * 10 ** -row["depth_predicted"]
        for row in rows
        if row["family"] == "layernorm" and row["depth_predicted"] is not None and row["lambda_mean"]
    ]
    if predicted:
        name = "float32 rounding in the kernel, from the scales"
        bands.append({"low": min(predicted) / 2, "high": max(predicted) * 2, "floor": name, "colour": ROUNDING})
    floors = [row["spectrum_floor"] for row in rows if row["spectrum_floor"]]
    if floors:
        bands.append({"high": min(floors), "floor": "no accumulator certifies an eigenvalue", "colour": FLOOR})
    return bands


def block_plot(reads: pl.LazyFrame, blocks: pl.LazyFrame) -> Spec | None:
    """Smallest over median singular value at each tap, a line a model; rounding floors dotted, collapses as crosses.

    Models that have one come first.
    """
    import altair as alt

    speaking = named(best_lines(reads), reads).with_columns(_PLACE)
    speaking = speaking.select(*KEY, "run_id", "line", "family", "row", "place_in_family")
    frame = collected(
        blocks.join(speaking, on=[*KEY, "run_id"], nulls_equal=True)
        .filter((pl.col("sigma_min") > 0) & (pl.col("sigma_median") > 0))
        .select(
            "line", "family", "row", "block", "ratio", "collapse_below", "participation", "place_in_family",
            whole=(pl.col("state").fill_null("") != "collapsed").all().over("line"),
            state=pl.when("rank_limited").then(pl.lit("rank-limited")).otherwise(pl.col("state").fill_null("first")),
            value=pl.col("sigma_min") / pl.col("sigma_median"),
            floor=pl.when(pl.col("floor") > 0).then(pl.col("floor") / pl.col("sigma_median")),
        )
        .sort("whole", "place_in_family", "line", "block", nulls_last=True)
    )  # fmt: skip
    if frame.is_empty():
        return None
    shown = frame["line"].unique(maintain_order=True).head(MAX_SPECTRA)
    rows = frame.filter(pl.col("line").is_in(shown.implode())).drop("whole", "place_in_family").to_dicts()
    values = [row[name] for row in rows for name in ("value", "floor") if row[name] is not None]
    picked = alt.selection_point(fields=["line"], bind="legend")
    base = alt.Chart(alt.NamedData(name="blocks")).encode(
        x=alt.X("block:Q", title="tap: 0 the embedding, then after each block", scale=alt.Scale(nice=False, padding=8),
                axis=alt.Axis(format="d", tickMinStep=1, tickCount=8)),
        y=alt.Y("value:Q", title="smallest / median singular value", **log_axis(foot(values) / 1.5, 1.5 * max(values))),
        color=line_colour(shown.to_list(), line_families(reads)),
        opacity=alt.when(picked).then(alt.value(1.0)).otherwise(alt.value(0.06)),
    )  # fmt: skip
    floors = base.mark_line(strokeDash=[1, 4], strokeWidth=1).encode(y=alt.Y("floor:Q"))
    marks = base.mark_point(filled=False, size=70, strokeWidth=2).encode(
        shape=alt.Shape(
            "state:N",
            scale=alt.Scale(
                domain=["preserved", "collapsed", "preserved-dead", "revived", "rank-limited", "first"],
                range=["circle", "cross", "square", "triangle-up", "stroke", "circle"],
            ),
            legend=None,
        ),
        size=alt.value(28),
        tooltip=["line:N", "family:N", "block:Q", "state:N", tooltip("value", ".3e"), tooltip("floor", ".1e"),
                 tooltip("ratio", ".3f", "against the tap before"), tooltip("collapse_below", ".3f"),
                 tooltip("participation", ".1f")],
    )  # fmt: skip
    curves = base.mark_line(strokeWidth=1.4).add_params(picked)
    layers, datasets = [floors, curves, marks], {"blocks": rows}
    if collapsed := [row for row in rows if row["state"] == "collapsed"]:
        crosses = base.mark_point(shape="cross", size=260, strokeWidth=2)
        crosses.data = alt.NamedData(name="collapsed")
        layers.append(crosses.encode(color=alt.value(STATE_COLOURS["collapsed"])))
        datasets["collapsed"] = collapsed
    return specification(alt.layer(*layers), datasets, height=340)


def downsampled(eigenvalues: list[float] | None) -> list[dict[str, float]]:
    """Points `place` (1 the smallest) and `value` of a descending spectrum, its positive values only.

    At most `MAX_POINTS`: a quarter of them at either end without a gap, the rest spread evenly between.
    """
    values = eigenvalues or []
    length = len(values)
    indices = list(range(length))
    if length > MAX_POINTS:
        edge = MAX_POINTS // 4
        spread, between = MAX_POINTS - 2 * edge, length - 2 * edge
        indices = [*range(edge), *(edge + i * between // spread for i in range(spread)), *range(length - edge, length)]
    # None and NaN compare false, infinity is no place on an axis.
    return [
        {"place": length - i, "value": values[i]}
        for i in indices
        if values[i] is not None and 0 < values[i] < float("inf")
    ]
