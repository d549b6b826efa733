"""Plots over training: every checkpoint of the models that have several, and one model's metrics with change-points."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from deadbench.analysis.colours import CHANGE, FAMILY_COLOURS
from deadbench.analysis.lines import LINE, last, ok_reads
from deadbench.analysis.plots.axes import (
    Spec,
    bar,
    foot,
    line_families,
    linear_axis,
    log_axis,
    named,
    specification,
    step_axis,
    tooltip,
    with_data,
)
from deadbench.analysis.plots.channels import line_colour
from deadbench.analysis.replicates import averaged, in_series
from deadbench.analysis.results import collected
from deadbench.analysis.trajectory import between
from deadbench.suite.schema import KEY

MAX_HISTORIES = 40


def training_plot(reads: pl.LazyFrame, column: str, family: str | None = None) -> Spec | None:
    """`column` (depth, or lambda_v on a log axis) over training steps, of every model with at least two checkpoints.

    Replicates are one line, their mean, with the spread as a bar.
    """
    trained = ok_reads(reads).filter((pl.col("read") == "trained") & pl.col("checkpoint_step").is_not_null())
    measured = trained.filter(pl.col(column).is_not_null() & ((pl.col(column) > 0) | pl.lit(column != "lambda_v")))
    by = [*LINE, "checkpoint_step"]
    each = last(in_series(measured), [*by, "member"])
    lines = named(averaged(each, by, ["family", "depth", "depth_standard_error", "lambda_v"]), reads)
    frame = collected(
        lines.filter((pl.len().over("line") >= 2) & (True if family is None else pl.col("family") == family))
        .select("line", "family", "row", *_bar(column), step="checkpoint_step", value=column)
        .sort("line", "step")
    )
    log = column == "lambda_v"
    return _histories(frame, reads, "lambda_v" if log else "depth, decades", ".3e" if log else ".2f", log=log)


def _bar(column: str) -> list[pl.Expr]:
    """`low` and `high` around a depth; a variance's error is of its logarithm, and has no bar."""
    return bar(column) if column == "depth" else []


def turning_plot(reads: pl.LazyFrame, norms: pl.LazyFrame) -> Spec | None:
    """Degrees between v at each checkpoint and at the first, of every model with several whose parameters were read.

    Replicates turn each from its own first checkpoint; they are one line, their mean, with the spread as a bar.
    """
    read = ok_reads(reads).filter((pl.col("read") == "parameters") & pl.col("checkpoint_step").is_not_null())
    final = norms.filter(pl.col("direction").is_not_null()).select(*KEY, "run_id", "direction")
    by = ["series", "member", "checkpoint_step"]
    every = last(in_series(read), by).join(final, on=[*KEY, "run_id"], nulls_equal=True)
    frame = collected(every.select(*by, "family", "direction").sort(by))
    turned = []
    for (series, _), along in frame.group_by("series", "member", maintain_order=True):
        if len(along) > 1:
            first_D, *_ = directions = [np.array(direction_D, np.float64) for direction_D in along["direction"]]
            for step, family, v_D in zip(along["checkpoint_step"], along["family"], directions, strict=True):
                if (degrees := between(first_D, v_D)) is not None:
                    turned.append((series, step, family, degrees))
    schema = {"line": pl.String, "step": pl.Int64, "family": pl.String, "angle": pl.Float64}
    mean, spread = pl.col("angle").mean(), pl.col("angle").std()
    rows = (
        pl.DataFrame(turned, schema, orient="row")
        .group_by("line", "step", maintain_order=True)
        .agg(pl.col("family").first(), value=mean, low=mean - spread, high=mean + spread)
        .sort("line", "step")
    )
    return _histories(rows, reads, "degrees from the first", ".3g", log=False)


def _histories(frame: pl.DataFrame, reads: pl.LazyFrame, title: str, format: str, *, log: bool) -> Spec | None:
    """Lines of `value` over `step`, one a `line`."""
    import altair as alt

    if frame.is_empty():
        return None
    shown = frame["line"].unique(maintain_order=True).head(MAX_HISTORIES)
    rows = frame.filter(pl.col("line").is_in(shown.implode()))
    values = rows["value"].to_list()
    if log:
        upward = log_axis(foot(values) / 1.5, 1.5 * max(values))
    else:
        ends = [rows[name] for name in ("low", "high") if name in rows.columns]
        upward = linear_axis([*values, *(each for column in ends for each in column)])
    chart = (
        alt.Chart(alt.NamedData(name="history"))
        .mark_line(point=alt.OverlayMarkDef(size=45, filled=True), strokeWidth=1.6)
        .encode(
            x=step_axis(rows["step"].to_list()),
            y=alt.Y("value:Q", title=title, **upward),
            color=line_colour(shown.to_list(), line_families(reads)),
            tooltip=["line:N", "family:N", "step:Q", tooltip("value", format, title)],
        )
    )
    if "low" in rows.columns and rows["low"].null_count() < len(rows):
        errors = chart.mark_rule(strokeWidth=4, opacity=0.35).encode(y="low:Q", y2="high:Q")
        chart = alt.layer(errors, chart)
    return specification(chart, {"history": rows.to_dicts()}, height=260)


def trend_plot(series: pl.DataFrame, sparks: pl.DataFrame, metrics: Sequence[str]) -> Spec:
    """One panel a metric over the training steps of one model, its change-point as a dashed rule.

    `series` and `sparks` are `analysis/trend.py`'s `checkpoints` and `summary`.
    """
    import altair as alt

    has_steps = series["checkpoint_step"].null_count() == 0
    x = (
        step_axis(series["checkpoint_step"].to_list())
        if has_steps
        else alt.X("revision:N", title="checkpoint", sort=series["revision"].to_list())
    )  # fmt: skip
    place = "step" if has_steps else "revision"
    panels, datasets = [], {}
    for metric in metrics:
        known = series.filter(pl.col(metric).is_not_null())
        if known.is_empty():
            continue
        rows = known.select(
            "revision",
            *_bar_of(series, metric),
            step="checkpoint_step",
            value=pl.col(metric).cast(pl.Float64),
            line=pl.format("{} {}", "protocol", "dtype"),
        )
        positive = rows["value"].min() > 0 and metric.startswith(("lambda_", "scale_"))  # type: ignore[operator]
        datasets[metric] = rows.to_dicts()
        lines = rows["line"].unique(maintain_order=True).to_list()
        colour = line_colour(lines) if len(lines) > 1 else alt.value(FAMILY_COLOURS["layernorm"])
        curve = alt.Chart(alt.NamedData(name=metric)).mark_line(point=True, strokeWidth=1.6).encode(
            x=x,
            y=alt.Y("value:Q", title=metric.replace("_", " "), **_upward(rows, bool(positive))),
            color=colour,
            tooltip=["revision:N", "line:N", alt.Tooltip("value:Q", format=".4g")],
        )  # fmt: skip
        changes = sparks.filter((pl.col("metric") == metric) & pl.col("change_revision").is_not_null())
        datasets[f"{metric}_change"] = changes.select(
            step="change_step", revision="change_revision", change="change"
        ).to_dicts()
        rule = alt.Chart(alt.NamedData(name=f"{metric}_change")).mark_rule(strokeDash=[4, 3], color=CHANGE).encode(
            x=alt.X(f"{place}:{'Q' if has_steps else 'N'}"),
            tooltip=["revision:N", alt.Tooltip("change:Q", format=".3g")],
        )  # fmt: skip
        has_bars = "low" in rows.columns and rows["low"].null_count() < len(rows)
        bars = [curve.mark_rule(strokeWidth=4, opacity=0.35).encode(y="low:Q", y2="high:Q")] if has_bars else []
        panels.append(alt.layer(*bars, curve, rule).properties(width=360, height=150))
    spec: Spec = alt.concat(*panels, columns=2).resolve_scale(color="independent").to_dict()
    return with_data(spec, datasets)


def _bar_of(series: pl.DataFrame, metric: str) -> list[pl.Expr]:
    return bar(metric) if {f"{metric}_spread", f"{metric}_standard_error"} <= set(series.columns) else []


def _upward(rows: pl.DataFrame, log: bool) -> dict[str, Any]:
    """The axis of a panel; what varies by rounding only is drawn as a level."""
    values = rows["value"].to_list()
    if not log:
        ends = [each for name in ("low", "high") if name in rows.columns for each in rows[name]]
        size = max(map(abs, values))
        return linear_axis([*values, *ends], least=max(size, 0.5) if max(values) - min(values) <= 1e-9 * size else 0.0)
    return log_axis(foot(values) / 1.5, 1.5 * max(values))
