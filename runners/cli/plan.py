"""`deadbench plan`: what `run` would do, printed before anything starts."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from deadbench.runners.cli import options
from deadbench.runners.cli.console import EXIT_FALSE, Debug, Json, console, say
from deadbench.runners.cli.init import check_named
from deadbench.suite.plain_text import MAX_LINE, plain


def plan(
    models: options.Models = None,
    factory: options.Factory = None,
    assume: Annotated[
        str | None, typer.Option(metavar="SHAPE", help="Plan for 1x24GB, 8x80GB, 2x8x141GB (nodes x GPUs x memory).")
    ] = None,
    suite: options.Suite = None,
    registry: options.Registry = None,
    reads: options.Reads = None,
    address: Annotated[
        str | None, typer.Option(help="Ray to ask for its nodes; none: one process. \\[default: this machine]")
    ] = None,
    autoscale: options.Autoscale = None,
    out: Annotated[str | None, typer.Option(metavar="DIR_OR_URI", help="Result set that run would continue.")] = None,
    resume: options.Resume = True,
    engine: options.Engine = "auto",
    tensor_parallel: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Devices that share one model. \\[default: as few as it fits on]"),
    ] = None,
    replicas: options.Replicas = 1,
    tokens: options.Tokens = None,
    input_spec: options.InputSpec = None,
    taps: options.Taps = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = None,
    config: options.Config = None,
    model_type: options.ModelType = None,
    accumulator_gb: options.AccumulatorGb = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Which engine, devices, memory, passes and time each read would take; exit code 1 if one cannot be placed.

    Sizes come from headers and configurations: nothing is loaded. Times are counted work over the device's rates: those
    that `deadbench doctor` kept, else of a data sheet, and the last line says which.

    Example: [bold]deadbench plan --suite quick --assume 1x24GB[/bold]
    """
    from deadbench.runners.planning.plan import as_rows, make_plan
    from deadbench.runners.planning.seconds import rates_of

    if factory is None:
        check_named(models, suite, registry)
    overrides = options.overridden(
        engine=engine, tokens=tokens, input_spec=input_spec, dtype=dtype, seed=seed,
        accumulator_gb=accumulator_gb, tensor_parallel=tensor_parallel, replicas=replicas,
        config=config, model_type=model_type, taps=taps,
    )  # fmt: skip
    jobs, cluster, names = options.jobs_and_cluster(
        models,
        suite,
        registry,
        reads,
        overrides,
        assume=assume,
        address=address,
        factory=factory,
        autoscale=autoscale,
    )
    for remark in names:
        say(plain(f"deadbench: {remark}", MAX_LINE))
    done = _finished(out) if out is not None and resume else set()
    rows = as_rows(make_plan(jobs, cluster, done))
    if as_json:
        print(json.dumps({"cluster": cluster.label, "rates": rates_of(cluster)[1], "reads": rows}, indent=2))
    else:
        _print(rows, cluster.label, rates_of(cluster)[1])
    if any(row["problem"] for row in rows):
        raise typer.Exit(EXIT_FALSE)


def _finished(out: str) -> set[tuple[Any, ...]]:
    """What is finished in the result set at `out`; a folder that is not there is not made."""
    from deadbench.runners.results.store import ResultStore
    from deadbench.suite.storage import is_url

    return ResultStore(out).finished() if is_url(out) or Path(out).exists() else set()


def _print(rows: list[dict[str, Any]], label: str, rates: str) -> None:
    from deadbench.analysis.terminal import NOTHING, Column, Layout, table

    def column(name: str, header: str, cells: list[str], *, is_text: bool = False) -> Column:
        return Column(name, header, cells, is_text, is_number=not is_text and name not in ("order", "read"))

    def gigabytes(name: str) -> list[str]:
        return [NOTHING if row[name] is None else f"{row[name] / 1e9:.1f}" for row in rows]

    names = [" ".join(part for part in (row["model"], row["revision"]) if part) for row in rows]
    notes = [f"cannot run: {row['problem']}" if row["problem"] else row["note"] or "" for row in rows]
    columns = [
        column("order", "#", [str(row["order"]) for row in rows]),
        column("model", "model", names, is_text=True),
        column("read", "read", [row["read"] for row in rows]),
        column("engine", "engine", [row["engine"] or NOTHING for row in rows], is_text=True),
        column("dtype", "dtype", [row["dtype"] or NOTHING for row in rows], is_text=True),
        column("gpus", "GPUs", [f"{row['gpus']:g}" for row in rows]),
        column("passes", "passes", [str(row["passes"] or NOTHING) for row in rows]),
        column("weight_bytes", "weights", gigabytes("weight_bytes")),
        column("activation_bytes", "activ.", gigabytes("activation_bytes")),
        column("accumulator_bytes", "accum.", gigabytes("accumulator_bytes")),
        column("peak_bytes", "peak", gigabytes("peak_bytes")),
        column("peak_host_bytes", "host", gigabytes("peak_host_bytes")),
        column("disk_bytes", "disk", gigabytes("disk_bytes")),
        column("seconds", "time, most of it", list(map(_time, rows)), is_text=True),
        column("note", "note", notes, is_text=True)._replace(is_prose=True),
    ]
    layout = Layout(
        [each.name for each in columns],
        keys=["order", "model", "read", "peak_bytes", "seconds", "note"],
        dropped=[
            "disk_bytes",
            "passes",
            "activation_bytes",
            "accumulator_bytes",
            "weight_bytes",
            "dtype",
            "peak_host_bytes",
            "gpus",
            "engine",
        ],
    )
    terminal = console()
    title = f"plan for {label}, GB"
    terminal.print(table(columns, layout, width=terminal.width, title=title, elsewhere="--json"))
    if any(row["seconds"] is not None for row in rows):
        terminal.print(f"time: projected from counted work and {rates}", highlight=False, markup=False)


def _time(row: dict[str, Any]) -> str:
    """`34 s, forward`, or `3 min, load; then 9 s, spectra`: how long a read takes, and which step most of it."""
    from deadbench.analysis.terminal import NOTHING
    from deadbench.runners.planning.seconds import Seconds
    from deadbench.runners.reporting.progress import duration

    if row["seconds"] is None:
        return NOTHING
    taken = Seconds(row["load_seconds"], row["forward_seconds"], row["spectrum_seconds"])
    then = f"; then {duration(taken.loaded)}, {taken.most_once_loaded}" if taken.most == "load" else ""
    return f"{duration(taken.load if then else taken.total)}, {taken.most}{then}"
