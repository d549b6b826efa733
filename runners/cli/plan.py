"""`deadbench plan`: what `run` would do, printed before anything starts."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from deadbench.runners.cli.options import check_options, choose_cluster


def plan(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Registry ids or SOURCEs; none: the suite.")
    ] = None,
    assume: Annotated[
        str | None, typer.Option(metavar="SHAPE", help="Plan for 1x24GB, 8x80GB, 2x8x141GB (nodes x GPUs x memory).")
    ] = None,
    suite: Annotated[str | None, typer.Option(metavar="NAME", help="Suite of the registry. [default: quick]")] = None,
    registry: Annotated[Path | None, typer.Option(metavar="FILE", help="Registry. [default: models.yaml]")] = None,
    reads: Annotated[str | None, typer.Option(help="Comma-separated: parameters, random, trained, functional.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray to ask for its nodes. [default: this machine]")] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_URI", help="Result set that run would continue."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="As for run.")] = True,
    engine: Annotated[str, typer.Option(help="auto, torch, streaming (one block at a time) or vllm.")] = "auto",
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Devices that share one model. [default: as few as it fits on]")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="As for run.")] = 1,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to read. [default: the protocol's]")] = None,
    input_spec: Annotated[str | None, typer.Option("--input", metavar="SPEC", help="As for run.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="As for run.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16, bfloat16, float64.")] = None,
    accumulator_gb: Annotated[
        float | None, typer.Option(min=0, metavar="GB", help="Memory for residual-stream accumulators.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Which engine, devices, memory and passes each read would take; exit code 1 if one cannot be placed.

    Sizes come from headers and configurations: nothing is loaded.

    Example: [bold]deadbench plan --suite quick --assume 1x24GB[/bold]
    """
    from deadbench.runners.cli.console import EXIT_FALSE, UserError
    from deadbench.runners.jobs.build import build_jobs
    from deadbench.runners.jobs.job import JobError, Overrides
    from deadbench.runners.planning.hardware import PlanError
    from deadbench.runners.planning.plan import as_rows, make_plan
    from deadbench.suite.registry.entries import RegistryError
    from deadbench.suite.registry.loading import find_registry, load_registry

    check_options(engine, dtype, tokens, input_spec)
    try:
        cluster = choose_cluster(assume, address)
        path = find_registry(registry)
        chosen = None if engine == "auto" else engine
        overrides = Overrides(tokens, input_spec, dtype, chosen, seed, accumulator_gb, tensor_parallel, replicas)
        wanted = [part.strip() for part in reads.split(",")] if reads is not None else None
        jobs = build_jobs(load_registry(path), path, models or [], suite, wanted, overrides, assumed=assume is not None)
    except (RegistryError, JobError, PlanError) as error:
        raise UserError(str(error)) from error
    done = _finished(out) if out is not None and resume else set()
    rows = as_rows(make_plan(jobs, cluster, done))
    if as_json:
        print(json.dumps({"cluster": cluster.label, "reads": rows}, indent=2))
    else:
        _print(rows, cluster.label)
    if any(row["problem"] for row in rows):
        raise typer.Exit(EXIT_FALSE)


def _finished(out: str) -> set[tuple[Any, ...]]:
    """What is finished in the result set at `out`; a folder that is not there is not made."""
    from deadbench.runners.results.store import ResultStore

    return ResultStore(out).finished() if "://" in out or Path(out).exists() else set()


def _print(rows: list[dict[str, Any]], label: str) -> None:
    from deadbench.analysis.terminal import NOTHING, Column, Layout, table
    from deadbench.runners.cli.console import console

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
        column("note", "note", notes, is_text=True),
    ]
    layout = Layout(
        [each.name for each in columns],
        keys=["order", "model", "read", "peak_bytes", "note"],
        dropped=["passes", "activation_bytes", "accumulator_bytes", "weight_bytes", "dtype", "peak_host_bytes", "gpus"],
    )
    terminal = console()
    title = f"plan for {label}, GB"
    terminal.print(table(columns, layout, width=terminal.width, title=title, elsewhere="--json"))
