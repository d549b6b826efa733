"""What the first positions of sequences do to a model's numbers: attention sinks and massive activations sit there."""

import polars as pl

from deadbench.analysis.colours import RULE
from deadbench.analysis.lines import forward_lines
from deadbench.analysis.plots.axes import Spec, linear_axis, log_axis, specification, tooltip
from deadbench.analysis.results import collected
from deadbench.suite.schema import KEY

QUANTITIES = {
    "depth": "depth, decades",
    "sigma_min": "smallest over median singular value, at the worst tap",
    "massive_weight": "weight of v on massive coordinates",
}
WITH, WITHOUT = "all positions", "first positions left out"
_COLOURS = {WITH: "#3b82d6", WITHOUT: "#e07b39"}
_SIZES = [170, 50]  # of the one, and of the other upon it: where nothing moves both are seen


def positions_plot(reads: pl.LazyFrame, blocks: pl.LazyFrame, quantity: str, family: str | None = None) -> Spec | None:
    """One of `QUANTITIES` of each model that was read both ways: with all positions, and by a protocol that skips some.

    The two reads are of one model, weights, checkpoint and dtype; with `family`, of the models of that one.
    """
    import altair as alt

    taps = blocks.filter(pl.col("sigma_median") > 0).group_by(*KEY, "run_id").agg(
        sigma_min=(pl.col("sigma_min") / pl.col("sigma_median")).min()
    )  # fmt: skip
    skipped = pl.col("skip_positions").fill_null(0)
    frame = collected(
        forward_lines(reads)
        .join(taps, on=[*KEY, "run_id"], how="left", nulls_equal=True)
        .select(
            "model", "family", "read", "dtype", "revision", "protocol", "skip_positions", "num_tokens",
            line=pl.concat_str(pl.col("model", "read", "revision", "dtype"), separator=" ", ignore_nulls=True),
            positions=pl.when(skipped > 0).then(pl.lit(WITHOUT)).otherwise(pl.lit(WITH)),
            value=pl.col(quantity),
        )
        .filter(pl.lit(True) if family is None else pl.col("family") == family)
        .filter(pl.col("value").is_not_null() & ((pl.col("value") > 0) | (quantity != "sigma_min")))
        .filter(pl.col("positions").n_unique().over("line") == 2)
        .sort("line", "positions", "protocol")
    )  # fmt: skip
    if frame.is_empty():
        return None
    values = frame["value"].to_list()
    logarithmic = quantity == "sigma_min"
    axis = log_axis(min(values) / 2, 2 * max(values)) if logarithmic else linear_axis(values, least=0.05)
    base = alt.Chart(alt.NamedData(name="positions")).encode(
        y=alt.Y("line:N", title=None, sort=frame["line"].unique(maintain_order=True).to_list()),
        x=alt.X("value:Q", title=QUANTITIES[quantity], **axis),
    )
    scale = alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values()))
    marks = base.mark_point(filled=True, opacity=1).encode(
        color=alt.Color("positions:N", scale=scale, legend=alt.Legend(orient="bottom", title=None)),
        size=alt.Size("positions:N", scale=alt.Scale(domain=list(_COLOURS), range=_SIZES), title=None),
        tooltip=["line:N", "protocol:N", "skip_positions:Q", "num_tokens:Q", tooltip("value", ".4g", quantity)],
    )
    layers = alt.layer(base.mark_line(color=RULE, strokeWidth=1.5).encode(detail="line:N"), marks)
    return specification(layers, {"positions": frame.to_dicts()}, height=max(60, 26 * frame["line"].n_unique()))
