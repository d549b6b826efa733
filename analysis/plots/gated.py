"""A metric of a run over its steps, with what its gate bears drawn in and the checkpoints that broke it marked."""

from collections.abc import Collection
from typing import Any

import polars as pl

from deadbench.analysis.colours import FAMILY_COLOURS, FLOOR, STATE_COLOURS
from deadbench.analysis.gate import MetricGate, limits
from deadbench.analysis.plots.axes import Spec, foot, linear_axis, log_axis, specification, step_axis, tooltip


def gated_plot(
    series: pl.DataFrame, metric: str, rule: MetricGate, broke: Collection[str], baseline: float | None = None
) -> Spec | None:
    """`metric` over training steps; dashed, the limit that the checkpoint before sets; a long dash, the baseline's.

    Args:
        series: `analysis/trend.py`'s `checkpoints`.
        metric: one of its columns; without a value there is no plot.
        rule: what is borne of it.
        broke: the revisions at which the metric broke, which get a red cross.
        baseline: its value at what each checkpoint is compared with beside the one before.
    """
    import altair as alt

    value = pl.col(metric).cast(pl.Float64)
    lines = series.filter(value.is_finite() & pl.col("checkpoint_step").is_not_null())
    if lines.is_empty():
        return None
    points: list[dict[str, Any]] = []
    borne: list[dict[str, Any]] = []
    for (seed,), line in lines.group_by("seed", maintain_order=True):
        before = None
        for revision, step, now in line.select("revision", "checkpoint_step", value).iter_rows():
            points.append({"revision": revision, "step": step, "value": now, "seed": seed, "broke": revision in broke})
            if before is not None:
                ends = limits(metric, rule, before)
                borne += [{"step": step, "value": end, "line": f"{seed} {end > before}"} for end in ends]
            before = now
    level = [{"value": end} for end in limits(metric, rule, baseline)] if baseline is not None else []
    values = [each["value"] for each in points]
    shown = [*values, *(each["value"] for each in (*borne, *level))]
    positive = [each for each in shown if each > 0]
    if metric.startswith(("lambda_", "scale_")) and positive:
        least = foot(positive)
        for each in (*points, *borne, *level):  # a zero stands at the foot
            each["value"] = max(each["value"], least)
        upward = log_axis(least / 1.5, 1.5 * max(positive))
    else:
        upward = linear_axis(shown)
    y = alt.Y("value:Q", title=metric.replace("_", " "), **upward)
    x = step_axis([each["step"] for each in points])
    curve = alt.Chart(alt.NamedData(name="run")).encode(x=x, y=y, detail="seed:N")
    drawn = curve.mark_line(point=alt.OverlayMarkDef(size=45, filled=True), strokeWidth=1.6).encode(
        color=alt.value(FAMILY_COLOURS["layernorm"]),
        tooltip=["revision:N", "step:Q", tooltip("value", ".4g", metric.replace("_", " "))],
    )
    crosses = curve.transform_filter("datum.broke").mark_point(
        shape="cross", angle=45, size=160, filled=True, color=STATE_COLOURS["collapsed"]
    )
    dashed = alt.Chart(alt.NamedData(name="borne")).encode(x=x, y=y, detail="line:N")
    levels = alt.Chart(alt.NamedData(name="level")).encode(y=y)
    # A layer without rows has no extent, which Vega warns of.
    layers = [
        *(
            [dashed.mark_line(interpolate="step-before", strokeDash=[4, 3], strokeWidth=1, color=FLOOR)]
            if borne
            else []
        ),
        *([levels.mark_rule(strokeDash=[10, 4], color=FLOOR)] if level else []),
        drawn,
        *([crosses] if any(each["broke"] for each in points) else []),
    ]
    return specification(alt.layer(*layers), {"run": points, "borne": borne, "level": level}, height=200)
