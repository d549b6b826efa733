"""The report's plots: a function from frames to a Vega-Lite specification, or None where there is nothing to show.

A model's trained read at the last checkpoint stands for it, else its random one. Where the result set holds several
protocols or precisions, these are part of a line's name.
"""

from typing import Any

import polars as pl

from analysis.leaderboard import FAMILIES
from analysis.lines import LINE, best_lines, forward_lines, last
from analysis.results import collected, latest
from suite.schema import KEY

# One colour a family, readable on white and on near black.
FAMILY_COLOURS = dict(zip(FAMILIES, ("#3b82d6", "#e07b39", "#8a949e", "#9b6bd3", "#c05a7c"), strict=True))
MAX_POINTS = 200  # of one spectrum; both ends are kept exactly
MAX_SPECTRA, MAX_MODELS, MAX_HISTORIES = 40, 120, 40  # more cannot be told apart; the deepest are kept
MAX_STEP_TICKS = 8

Spec = dict[str, Any]


def spectra_plot(reads: pl.LazyFrame, spectra: pl.LazyFrame) -> Spec | None:
    """Eigenvalues by their place from the bottom, one line a model, and `lambda_v` as a diamond at the last place."""
    import altair as alt

    deepest = best_lines(reads).sort("depth", descending=True, nulls_last=True)
    chosen = _named(deepest).select(*KEY, "run_id", "line", "family", "lambda_v", "depth")
    # The measurement's place, not just its key: the spectrum of an older run is another one.
    final = spectra.filter(pl.col("site") == "final_norm").unique([*KEY, "run_id"])
    rows = collected(
        final.join(chosen, on=[*KEY, "run_id"], nulls_equal=True)
        .sort("depth", "line", descending=[True, False], nulls_last=True)
        .head(MAX_SPECTRA)
        .select("line", "family", "lambda_v", "eigenvalues")
    ).to_dicts()
    points, along_v = [], []
    for row in rows:
        named = {"line": row["line"], "family": row["family"]}
        points += [named | point for point in downsampled(row["eigenvalues"])]
        if row["lambda_v"] is not None and row["lambda_v"] > 0:
            along_v.append(named | {"place": 1, "value": row["lambda_v"]})
    if not points:
        return None
    picked = alt.selection_point(fields=["line"], bind="legend")
    scale = alt.Scale(type="log")
    base = alt.Chart(alt.NamedData(name="points")).encode(
        x=alt.X("place:Q", title="place from the bottom", scale=alt.Scale(type="log", reverse=True, nice=False),
                axis=alt.Axis(format="~s")),
        y=alt.Y("value:Q", title="eigenvalue", scale=scale, axis=alt.Axis(format=".0e")),
        color=_line_colour([row["line"] for row in rows]),
        opacity=alt.when(picked).then(alt.value(1.0)).otherwise(alt.value(0.08)),
    )  # fmt: skip
    about = ["line:N", "family:N", alt.Tooltip("place:Q", title="from the bottom"), _tooltip("value", ".3e")]
    curves = base.mark_line(strokeWidth=1.6).add_params(picked)
    # Wide transparent points: the line itself is too thin to hover on.
    targets = base.mark_point(size=90, opacity=0, filled=True).encode(opacity=alt.value(0), tooltip=about)
    on_v = base.mark_point(shape="diamond", size=90, strokeWidth=2).encode(
        tooltip=["line:N", "family:N", alt.Tooltip("value:Q", title="lambda_v", format=".3e")]
    )
    on_v.data = alt.NamedData(name="along_v")
    return _spec(alt.layer(curves, targets, on_v), {"points": points, "along_v": along_v}, height=380)


def depth_plot(reads: pl.LazyFrame) -> Spec | None:
    """Depth of each model, random and trained joined by a rule, coloured by family."""
    import altair as alt

    frame = collected(
        _named(forward_lines(reads))
        .filter(pl.col("depth").is_not_null())
        .select("line", "family", "read", "depth", deepest=pl.col("depth").max().over("line"))
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
    colours = alt.Scale(domain=list(FAMILY_COLOURS), range=list(FAMILY_COLOURS.values()))
    present = [family for family in FAMILIES if family in {row["family"] for row in rows}]
    marks = base.mark_point(filled=True, size=90, opacity=1).encode(
        color=alt.Color("family:N", scale=colours, legend=alt.Legend(orient="bottom", values=present)),
        shape=alt.Shape(
            "read:N",
            scale=alt.Scale(domain=["random", "trained"], range=["circle", "diamond"]),
            legend=alt.Legend(orient="bottom"),
        ),
        tooltip=["line:N", "family:N", "read:N", _tooltip("depth", ".2f")],
    )
    return _spec(alt.layer(rules, marks), {"depths": rows}, height=alt.Step(24))


def training_plot(reads: pl.LazyFrame, column: str) -> Spec | None:
    """`column` (depth, or lambda_v on a log axis) over training steps, of every model with at least two checkpoints."""
    import altair as alt

    trained = latest(reads).filter(
        (pl.col("status") == "ok") & (pl.col("read") == "trained") & pl.col("checkpoint_step").is_not_null()
    )
    measured = trained.filter(pl.col(column).is_not_null() & ((pl.col(column) > 0) | pl.lit(column != "lambda_v")))
    frame = collected(
        _named(last(measured, [*LINE, "checkpoint_step"]))
        .filter(pl.len().over("line") >= 2)
        .select("line", "family", step="checkpoint_step", value=column)
        .sort("line", "step")
    )
    if frame.is_empty():
        return None
    shown = frame["line"].unique(maintain_order=True).head(MAX_HISTORIES)
    rows = frame.filter(pl.col("line").is_in(shown.implode()))
    log = column == "lambda_v"
    chart = (
        alt.Chart(alt.NamedData(name="history"))
        .mark_line(point=alt.OverlayMarkDef(size=45, filled=True), strokeWidth=1.6)
        .encode(
            x=alt.X("step:Q", title="training step", scale=alt.Scale(type="symlog", nice=False),
                    axis=alt.Axis(values=step_ticks(rows["step"].to_list()), labelOverlap=True, format=",d")),
            y=alt.Y("value:Q", title="lambda_v" if log else "depth, decades",
                    scale=alt.Scale(type="log" if log else "linear"), axis=alt.Axis(format=".0e" if log else "~g")),
            color=_line_colour(shown.to_list()),
            tooltip=["line:N", "family:N", "step:Q",
                     alt.Tooltip("value:Q", title=column, format=".3e" if log else ".2f")],
        )
    )  # fmt: skip
    return _spec(chart, {"history": rows.to_dicts()}, height=260)


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


def step_ticks(steps: list[int]) -> list[int]:
    """Where a symlog axis is labelled: at the checkpoints if they are few, else at zero and the powers of ten."""
    distinct = sorted(set(steps))
    if len(distinct) <= MAX_STEP_TICKS:
        return distinct
    powers = [10**exponent for exponent in range(19) if distinct[0] <= 10**exponent <= distinct[-1]]
    return ([0] if distinct[0] == 0 else []) + powers


def _named(lines: pl.LazyFrame) -> pl.LazyFrame:
    """With a column `line`: the model, and its protocol and dtype if the result set holds more than one."""
    together = pl.concat_str(pl.col("protocol", "dtype"), separator=", ", ignore_nulls=True)
    one_group = pl.struct("protocol", "dtype").n_unique() == 1
    return lines.with_columns(
        line=pl.when(one_group).then("model").otherwise(pl.format("{} ({})", pl.col("model"), together))
    )


def _line_colour(lines: list[str]) -> Any:
    import altair as alt

    return alt.Color("line:N", scale=alt.Scale(domain=lines), legend=alt.Legend(orient="bottom", title=None))


def _tooltip(column: str, format: str) -> Any:
    import altair as alt

    return alt.Tooltip(f"{column}:Q", format=format)


def _spec(chart: Any, datasets: dict[str, list[dict[str, Any]]], *, height: Any) -> Spec:
    # The rows go in once and beside the chart: Altair neither copies, checks nor counts them.
    spec: Spec = chart.properties(width="container", height=height).to_dict()
    return spec | {"datasets": datasets, "autosize": {"type": "fit-x", "contains": "padding"}}
