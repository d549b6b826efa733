"""What the functional read measured: how far the outputs move along a dead direction, and along the controls."""

from typing import Any

import polars as pl

from deadbench.analysis.colours import DIRECTION_COLOURS, RULE
from deadbench.analysis.lines import ok_reads
from deadbench.analysis.plots.axes import Spec, log_axis, specification, tooltip
from deadbench.analysis.plots.channels import named_colour
from deadbench.analysis.results import collected
from deadbench.suite.schema import KEY

# In nats. Float64 gives nothing that moved about 1e-33; a deeper value, or 0, is drawn here.
STILL = 1e-36
MAX_ORDER = 3  # of a power that is drawn


def movement_plot(reads: pl.LazyFrame, functional: pl.LazyFrame, family: str | None = None) -> Spec | None:
    """The change of the outputs over the length of the step: the median over the maps, and their middle half.

    The KL divergence in nats; where a model has no logits, the squared relative change of its last hidden state. Dashed
    are powers `e^(2k)`, k = 1 to 3, from the largest value down: a line along one of them has that order.
    """
    import altair as alt

    ok = ok_reads(reads).filter(pl.col("read") == "functional").select(*KEY, "run_id")
    change = pl.coalesce("kl", pl.col("output_change").pow(2)).clip(STILL)
    moved = functional.join(ok, on=[*KEY, "run_id"], nulls_equal=True)
    if family is not None:
        moved = moved.filter(pl.col("family") == family)
    frame = collected(
        moved.filter(change.is_finite() & (pl.col("step") > 0))
        .group_by("model", "family", "direction", "step")
        .agg(
            least=change.min(),
            low=change.quantile(0.25),
            value=change.median(),
            high=change.quantile(0.75),
            largest=change.max(),
            maps=pl.len(),
            kl_order=pl.col("kl_order").median(),
            verdicts=pl.col("verdict").drop_nulls().unique().sort().str.join(", "),
        )
        .sort("model", "direction", "step")
    )
    if frame.is_empty():
        return None
    values, steps = [*frame["low"], *frame["high"]], frame["step"].to_list()
    upward = log_axis(min(values) / 3, 3 * max(values))
    base = alt.Chart(alt.NamedData(name="movement")).encode(
        x=alt.X("step:Q", title="length of the step, e", **log_axis(min(steps) / 1.3, max(steps) * 1.3)),
        y=alt.Y("value:Q", title="change of the outputs, nats", **upward),
        color=named_colour("direction", DIRECTION_COLOURS, frame["direction"].to_list()),
        detail=["model:N", "family:N"],
    )
    bands = base.mark_area(opacity=0.14, line=False).encode(y="low:Q", y2="high:Q")
    medians = base.mark_line(strokeWidth=2)
    if frame["model"].n_unique() > 1:
        models = alt.Legend(orient="bottom", title=None, symbolType="stroke", symbolStrokeColor=RULE, symbolSize=300)
        medians = medians.encode(strokeDash=alt.StrokeDash("model:N", legend=models))
    points = base.mark_point(filled=True, size=50, opacity=1).encode(
        tooltip=["model:N", "family:N", "direction:N", tooltip("step", "~g"), tooltip("value", ".2e", "median"),
                 tooltip("least", ".2e"), tooltip("largest", ".2e"), "maps:Q",
                 tooltip("kl_order", ".3f"), "verdicts:N"],
    )  # fmt: skip
    powers = _powers(sorted(set(steps)), max(values), min(values))
    guide = alt.Chart(alt.NamedData(name="powers")).encode(x="step:Q", y="value:Q", detail="order:N")
    dashed = guide.mark_line(color=RULE, strokeDash=[4, 3], strokeWidth=1)
    ends = (
        guide.transform_filter("datum.is_end").mark_text(align="left", dx=3, dy=10, color=RULE).encode(text="order:N")
    )
    layers = alt.layer(dashed, bands, medians, points, ends)
    return specification(layers, {"movement": frame.to_dicts(), "powers": powers}, height=300)


def _powers(steps: list[float], top: float, bottom: float) -> list[dict[str, Any]]:
    """Points of `top (e / e_max)^(2k)` above `bottom`, of each k to `MAX_ORDER`; the first is where its name stands."""
    found = []
    for order in range(1, MAX_ORDER + 1):
        points = [(step, top * (step / steps[-1]) ** (2 * order)) for step in steps]
        shown = [(step, value) for step, value in points if value >= bottom]
        found += [
            {"order": f"k = {order}", "step": step, "value": value, "is_end": place == 0}
            for place, (step, value) in enumerate(shown)
        ]
    return found
