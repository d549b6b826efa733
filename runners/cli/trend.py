"""`deadbench trend`: a model over its checkpoints, and with --bisect the checkpoint that broke it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from deadbench.runners.cli.console import (
    EXIT_FALSE,
    Debug,
    Format,
    Json,
    Results,
    check_folder,
    model_named,
    print_frames,
    say,
)
from deadbench.runners.cli.options import GateFile


def trend(
    results: Results,
    model: Annotated[str, typer.Option(help="Of the result set; with --bisect of the registry, or a folder.")],
    metric: Annotated[list[str] | None, typer.Option(help="Column of reads; may be repeated.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a plot: .svg, .png or .pdf.")] = None,
    bisect: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Find the first checkpoint at which METRIC's gate breaks.")
    ] = None,
    gate: GateFile = None,
    registry: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --bisect. \\[default: models.yaml]")
    ] = None,
    suite: Annotated[str | None, typer.Option(metavar="NAME", help="With --bisect: its protocol and input.")] = None,
    address: Annotated[
        str | None, typer.Option(help="With --bisect: Ray to join; none: without. \\[default: local]")
    ] = None,
    format: Format = "table",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """A model's reads over its checkpoints in training order, with the change-point of each metric.

    Then its dead directions: how far v turned from one checkpoint to the next, and which directions opened when.

    --bisect takes the series from the registry, or from a folder of checkpoints, and reads only the checkpoints it
    needs, log2 of their number, into RESULTS; the first checkpoint is the baseline. Exit code 1 when a checkpoint
    breaks the gate.

    Example: [bold]deadbench trend results/quick --model twin-layernorm --plot trend.svg[/bold]

    Example: [bold]deadbench trend results/bisect --model twin-layernorm --bisect depth --suite quick[/bold]
    """
    from deadbench.analysis.cells import ERRORS
    from deadbench.analysis.dead import dead_directions
    from deadbench.analysis.results import scan
    from deadbench.analysis.trajectory import trajectory
    from deadbench.analysis.trend import METRICS, checkpoints, summary

    check_folder("--plot", plot)
    if bisect is not None:
        from deadbench.runners.cli.bisect import bisect_series

        found = bisect_series(results, model, bisect, gate, registry, suite, address, say)
        if as_json or format == "json":
            print(json.dumps({"bisect": found._asdict()}, indent=2))
        else:
            print(found.sentence())
        raise typer.Exit(EXIT_FALSE if found.first_failing is not None else 0)
    metrics = metric or METRICS
    model = model_named(scan(results), model)
    series = checkpoints(scan(results), model, metrics)
    sparks = summary(series, metrics)
    reads, norms, spectra, blocks = (scan(results, name) for name in ("reads", "norms", "spectra", "blocks"))
    dead = dead_directions(reads, norms, spectra, blocks, every=True)
    turns = trajectory(series, model, reads, norms, dead)
    if plot is not None:
        from deadbench.analysis.plots.export import save_plot
        from deadbench.analysis.plots.training import trend_plot

        turned = series.with_columns(turns["angle"])
        save_plot(trend_plot(turned, sparks, [*metrics, "angle"]), plot)
        say(f"wrote {plot}")
    if metric and format == "table" and not as_json:
        beside = [error for name in metric for error in ERRORS.get(name, ()) if error in series.columns]
        series = series.select("checkpoint_step", "revision", *metric, *beside, "protocol", "dtype", "num_replicates")
        print_frames({"checkpoints": series, "metrics": sparks, "directions": turns}, format)
    else:
        print_frames({"trend": series, "metrics": sparks, "directions": turns}, "json" if as_json else format)
