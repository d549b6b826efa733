"""Plots over training: every checkpoint of the models that have several, and one model's metrics with change-points."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from deadbench.analysis.lines import LINE, last, ok_reads
from deadbench.analysis.plots.models import Spec, bar, line_colour, named, specification
from deadbench.analysis.results import collected
from deadbench.analysis.trajectory import angle
from deadbench.suite.schema import KEY

MAX_HISTORIES, MAX_STEP_TICKS = 40, 8


def training_plot(reads: pl.LazyFrame, column: str) -> Spec | None:
    """`column` (depth, or lambda_v on a log axis) over training steps, of every model with at least two checkpoints."""
    trained = ok_reads(reads).filter((pl.col("read") == "trained") & pl.col("checkpoint_step").is_not_null())
    measured = trained.filter(pl.col(column).is_not_null() & ((pl.col(column) > 0) | pl.lit(column != "lambda_v")))
    frame = collected(
        named(last(measured, [*LINE, "checkpoint_step"]))
        .filter(pl.len().over("line") >= 2)
        .select("line", "family", *_bar(column), step="checkpoint_step", value=column)
        .sort("line", "step")
    )
    log = column == "lambda_v"
    return _histories(frame, reads, "lambda_v" if log else "depth, decades", ".3e" if log else ".2f", log=log)


def _bar(column: str) -> list[pl.Expr]:
    """`low` and `high` around a depth; a variance's error is of its logarithm, and has no bar."""
    return bar(column) if column == "depth" else []


def turning_plot(reads: pl.LazyFrame, norms: pl.LazyFrame) -> Spec | None:
    """Degrees between v at each checkpoint and at the first, of every model with several whose parameters were read."""
    read = ok_reads(reads).filter((pl.col("read") == "parameters") & pl.col("checkpoint_step").is_not_null())
    final = norms.filter(pl.col("direction").is_not_null()).select(*KEY, "run_id", "direction")
    every = last(read, ["model", "checkpoint_step"]).join(final, on=[*KEY, "run_id"], nulls_equal=True)
    frame = collected(every.select("model", "family", "checkpoint_step", "direction").sort("model", "checkpoint_step"))
    rows = []
    for (model,), line in frame.group_by("model", maintain_order=True):
        along = [np.array(direction_D) for direction_D in line["direction"]]
        for v_D, step, family in zip(along, line["checkpoint_step"], line["family"], strict=True):
            if len(along) > 1:
                rows.append({"line": model, "family": family, "step": step, "value": angle(along[0], v_D)})
    schema = {"line": pl.String, "family": pl.String, "step": pl.Int64, "value": pl.Float64}
    return _histories(pl.DataFrame(rows, schema), reads, "degrees from the first", ".3g", log=False)


def _histories(frame: pl.DataFrame, reads: pl.LazyFrame, title: str, format: str, *, log: bool) -> Spec | None:
    """Lines of `value` over `step`, one a `line`."""
    import altair as alt

    if frame.is_empty():
        return None
    shown = frame["line"].unique(maintain_order=True).head(MAX_HISTORIES)
    rows = frame.filter(pl.col("line").is_in(shown.implode()))
    chart = (
        alt.Chart(alt.NamedData(name="history"))
        .mark_line(point=alt.OverlayMarkDef(size=45, filled=True), strokeWidth=1.6)
        .encode(
            x=alt.X("step:Q", title="training step", scale=alt.Scale(type="symlog", nice=False),
                    axis=alt.Axis(values=step_ticks(rows["step"].to_list()), labelOverlap=True, format=",d")),
            y=alt.Y("value:Q", title=title,
                    scale=alt.Scale(type="log" if log else "linear"), axis=alt.Axis(format=".0e" if log else "~g")),
            color=line_colour(shown.to_list(), reads),
            tooltip=["line:N", "family:N", "step:Q",
                     alt.Tooltip("value:Q", title=title, format=format)],
        )
    )  # fmt: skip
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
        alt.X("step:Q", title="training step", scale=alt.Scale(type="symlog", nice=False),
              axis=alt.Axis(values=step_ticks(series["checkpoint_step"].to_list()), labelOverlap=True, format=",d"))
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
            "revision", step="checkpoint_step", value=pl.col(metric).cast(pl.Float64),
            line=pl.format("{} {} seed {}", "protocol", "dtype", "seed"),
        )  # fmt: skip
        positive = rows["value"].min() > 0 and metric.startswith(("lambda_", "scale_"))  # type: ignore[operator]
        datasets[metric] = rows.to_dicts()
        one_line = rows["line"].n_unique() == 1
        curve = alt.Chart(alt.NamedData(name=metric)).mark_line(point=True, strokeWidth=1.6).encode(
            x=x,
            y=alt.Y("value:Q", title=metric, scale=_value_scale(rows["value"], bool(positive))),
            color=alt.value("#1f6fc9") if one_line else line_colour(rows["line"].unique(maintain_order=True).to_list()),
            tooltip=["revision:N", "line:N", alt.Tooltip("value:Q", format=".4g")],
        )  # fmt: skip
        changes = sparks.filter((pl.col("metric") == metric) & pl.col("change_revision").is_not_null())
        datasets[f"{metric}_change"] = changes.select(
            step="change_step", revision="change_revision", change="change"
        ).to_dicts()
        rule = alt.Chart(alt.NamedData(name=f"{metric}_change")).mark_rule(strokeDash=[4, 3], color="#d0671c").encode(
            x=alt.X(f"{place}:{'Q' if has_steps else 'N'}"),
            tooltip=["revision:N", alt.Tooltip("change:Q", format=".3g")],
        )  # fmt: skip
        panels.append(alt.layer(curve, rule).properties(width=360, height=150))
    spec: Spec = alt.concat(*panels, columns=2).resolve_scale(color="independent").to_dict()
    return spec | {"datasets": datasets}


def _value_scale(values: pl.Series, log: bool) -> Any:
    """The axis of a panel; what varies by rounding only is drawn as a level."""
    import altair as alt

    low, high = values.sort().gather([0, -1]).to_list()
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return alt.Scale(type="log" if log else "linear", zero=False)
    return alt.Scale(domain=[low - max(abs(low) / 2, 0.5), high + max(abs(high) / 2, 0.5)])


def step_ticks(steps: list[int]) -> list[int]:
    """Where a symlog axis is labelled: at the checkpoints if they are few, else at zero and the powers of ten."""
    distinct = sorted(set(steps))
    if len(distinct) <= MAX_STEP_TICKS:
        return distinct
    powers = [10**exponent for exponent in range(19) if distinct[0] <= 10**exponent <= distinct[-1]]
    return ([0] if distinct[0] == 0 else []) + powers
