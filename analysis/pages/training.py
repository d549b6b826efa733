"""A page for a run in training: each checkpoint's verdict, its curves with the gates drawn in, v's turning."""

import math
from collections.abc import Sequence
from typing import Any

import polars as pl

from deadbench.analysis.dead import dead_directions
from deadbench.analysis.formats import environment, html_rows
from deadbench.analysis.gate import DEFAULT, Gate
from deadbench.analysis.lines import ok_reads
from deadbench.analysis.pages.report import provenance, script_json, vega
from deadbench.analysis.plots.gated import gated_plot
from deadbench.analysis.plots.training import turning_plot
from deadbench.analysis.results import ResultsError, collected, scan
from deadbench.analysis.trajectory import trajectory
from deadbench.analysis.trend import checkpoints

_SCHEMA = {
    "revision": pl.String, "checkpoint_step": pl.Int64, "verdict": pl.String, "broken": pl.String,
    "opened": pl.String, "error": pl.String,
}  # fmt: skip


def training_page(
    location: str,
    model: str,
    verdicts: Sequence[dict[str, Any]],
    *,
    gate: Gate | None = None,
    baseline: pl.LazyFrame | None = None,
    refresh: float | None = None,
) -> str:
    """The page of `model` in the result set at `location`.

    Args:
        location: of the result set, which may have nothing of the model yet.
        model: its id.
        verdicts: of each checkpoint in training order, as `deadbench watch` stores them.
        gate: whose limits are drawn; None: the default.
        baseline: reads of what each checkpoint is compared with; its limits are drawn where it is one checkpoint.
        refresh: seconds after which a browser is to load it again; None: it is not live.

    Raises:
        ResultsError: no readable result set.
    """
    ours = pl.col("model") == model
    try:
        reads = scan(location).filter(ours)
        norms, spectra, blocks = (scan(location, table).filter(ours) for table in ("norms", "spectra", "blocks"))
        metrics = list((gate or DEFAULT).metrics)
        series = checkpoints(reads, model, metrics)
        turns = trajectory(series, model, reads, norms, dead_directions(reads, norms, spectra, blocks, every=True))
        facts = provenance(location, reads)
        plots = _plots(series, reads, norms, verdicts, gate or DEFAULT, baseline)
    except ResultsError:
        if verdicts:
            raise
        facts, plots, turns = {"results": location}, [], pl.DataFrame({"revision": []}, {"revision": pl.String})
    statuses = [each["status"] for each in verdicts]
    tiles = [
        (str(len(verdicts)), "checkpoints"),
        (str(statuses.count("broken")), "broken"),
        (str(statuses.count("failed")), "could not be read"),
        (str(verdicts[-1]["revision"]) if verdicts else "-", "the last one"),
    ]
    template = environment().get_template("training.html.j2")
    page: str = template.render(
        model=model,
        refresh=None if refresh is None else max(1, math.ceil(refresh)),
        tiles=tiles,
        verdicts=html_rows(_table(verdicts)),
        directions=html_rows(turns.select(name for name in turns.columns if turns[name].null_count() < len(turns))),
        plots=plots,
        facts=facts,
        library=vega() if plots else "",
        specs=script_json([spec for _, _, panels in plots for _, spec in panels]),
    )
    return page


def _table(verdicts: Sequence[dict[str, Any]]) -> pl.DataFrame:
    rows = [
        {
            "revision": each["revision"],
            "checkpoint_step": each["step"],
            "verdict": each["status"],
            "broken": "; ".join(_broken(each)),
            "opened": ", ".join(each["opened"]),
            "error": each["error"],
        }
        for each in verdicts
    ]
    return pl.DataFrame(rows, schema=_SCHEMA)


def _broken(verdict: dict[str, Any]) -> list[str]:
    """What broke, each metric once whatever the read."""
    sides = verdict["comparisons"]
    told = [f"{row['metric'] or row['read']} against {side['against']}" for side in sides for row in side["broken"]]
    return list(dict.fromkeys(told))


def _plots(
    series: pl.DataFrame,
    reads: pl.LazyFrame,
    norms: pl.LazyFrame,
    verdicts: Sequence[dict[str, Any]],
    gate: Gate,
    baseline: pl.LazyFrame | None,
) -> list[tuple[str, str, list[tuple[str, Any]]]]:
    levels = _levels(baseline, series["read"][0], list(gate.metrics))
    panels = []
    for metric, rule in gate.metrics.items():
        broke = [
            each["revision"]
            for each in verdicts
            if any(row["metric"] == metric for side in each["comparisons"] for row in side["broken"])
        ]
        panels.append((metric.replace("_", " "), gated_plot(series, metric, rule, broke, levels.get(metric))))
    caption = (
        "Each metric that the gate judges. The dashed line is the limit that the checkpoint before sets, a line of "
        "long dashes that of the baseline; noise is borne beyond them. A red cross broke the gate."
    )
    turning = "Degrees between v at each checkpoint and at the first, from the parameters alone."
    found = [
        ("Over training", caption, panels),
        ("Turning of v", turning, [("", turning_plot(reads, norms))]),
    ]
    told = [(title, words, [(name, spec) for name, spec in each if spec]) for title, words, each in found]
    return [(title, words, each) for title, words, each in told if each]


def _levels(baseline: pl.LazyFrame | None, read: str, metrics: list[str]) -> dict[str, float]:
    """The baseline's value of each metric, where it is one checkpoint."""
    if baseline is None:
        return {}
    rows = collected(ok_reads(baseline).filter(pl.col("read") == read).select(*metrics))
    return {name: float(rows[name][0]) for name in metrics if len(rows) == 1 and rows[name][0] is not None}
