"""The norms of each model over its blocks: how near their smallest scale is to a zero one."""

import re
from typing import Any

import polars as pl

from deadbench.analysis.colours import RULE
from deadbench.analysis.lines import last, parameter_reads
from deadbench.analysis.plots.axes import LOG_LABELS, Spec, specification, tooltip
from deadbench.analysis.results import collected
from deadbench.suite.schema import KEY

MAX_ROWS = 40  # kinds of norms; the models come by name
SMALLEST = 1e-5  # of the median: a scale at or below counts as zero


def norms_plot(reads: pl.LazyFrame, norms: pl.LazyFrame) -> Spec | None:
    """A row for each kind of norm of a model, a column a block: the smallest scale over the median, zeros as crosses.

    Of each model its last checkpoint whose parameters were read.
    """
    import altair as alt

    chosen = last(parameter_reads(reads), ["model"]).select(*KEY, "run_id")
    frame = collected(
        norms.filter(pl.col("scale_median") > 0)
        .join(chosen, on=[*KEY, "run_id"], nulls_equal=True)
        .select("model", "norm", "role", "family", "num_zero_scales", "scale_min", "scale_median", "scale_harmonic")
        .sort("model")
    )
    if frame.is_empty():
        return None
    rows = _placed(frame)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))[:MAX_ROWS]
    columns = sorted({row["place"] for row in rows if row["kind"] in kinds}, key=_order)
    rows = [row for row in rows if row["kind"] in kinds]
    colour = alt.Color(
        "value:Q",
        title="smallest / median scale",
        scale=alt.Scale(type="log", domain=[SMALLEST, 1], scheme="viridis", clamp=True),
        legend=alt.Legend(
            orient="bottom",
            gradientLength=150,
            values=[1e-5, 1e-3, 1e-1],
            labelExpr=LOG_LABELS,
        ),
    )
    base = alt.Chart(alt.NamedData(name="norms")).encode(
        x=alt.X("place:N", title="block", sort=columns, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("kind:N", title=None, sort=kinds),
        tooltip=["model:N", "norm:N", "family:N", tooltip("value", ".2e", "smallest / median"),
                 tooltip("scale_median", ".3g"), tooltip("scale_harmonic", ".3g"), "num_zero_scales:Q"],
    )  # fmt: skip
    zeros = base.transform_filter(alt.datum.num_zero_scales > 0).mark_text(text="×", fontSize=14, color="white")
    layers = alt.layer(base.mark_rect(stroke=RULE, strokeWidth=0.5).encode(color=colour), zeros)
    return specification(layers, {"norms": rows}, height=max(60, 24 * len(kinds)))


def _placed(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows with `place`, the block or what stands around them, and `kind`, the norm's name without the block."""
    rows = []
    for row in frame.iter_rows(named=True):
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", row["norm"])
        if row["role"] in ("final", "embedding") or number is None:
            place = row["role"] if row["role"] in ("final", "embedding") else "other"
            kind = f"{row['model']} outside blocks"
        else:
            place, kind = number[1], f"{row['model']} {row['norm'][number.end() :]}"
        value = max(row["scale_min"] / row["scale_median"], SMALLEST)
        rows.append(row | {"place": place, "kind": kind, "value": value})
    return rows


def _order(place: str) -> tuple[int, int]:
    before = {"embedding": 0, "other": 2, "final": 3}
    return (before[place], 0) if place in before else (1, int(place))
