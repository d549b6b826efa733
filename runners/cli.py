"""The command line: a command parses, calls one function, prints. Heavy imports wait until a command needs them.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 the thing asked about does not hold, 2 bad
usage or input, 130 interrupted.
"""

import contextlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from runners.analysis_cli import app as analysis_app
from runners.census_command import census
from runners.console import (
    EXIT_FALSE,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Debug,
    Json,
    UserError,
    check_out,
    console,
    one_of,
)
from runners.plan_command import check_options, choose_cluster, plan

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Dead directions of transformers, read from the parameters and measured by one forward pass.",
)

_CLASSIFY_THREADS = 8

app.add_typer(analysis_app)  # without a name: its commands are ours
app.command()(plan)
app.command()(census)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from runners.versions import own_version

        print(own_version())
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def classify(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="[SOURCE]...", help="Folder, Hub id (org/name[@rev]), or URL.")
    ] = None,
    save_direction: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Write the inverse-scale directions (float64).")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Resolve by the modules' behaviour although the atlas has the architecture."),
    ] = False,
    module: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE:CLASS", help="Your own norm class, imported and put to the kernel test."),
    ] = None,
    width: Annotated[int, typer.Option(min=2, help="Width that the class of --module is built with.")] = 64,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Normalisation family, final norm and dead direction of checkpoints, from their parameters alone.

    Opens only headers, the configuration and the final norm's tensors.

    Example: [bold]deadbench classify openai-community/gpt2 ./my-checkpoint --save-direction v.safetensors[/bold]
    """
    if module is not None:
        if sources or save_direction is not None:
            raise UserError("--module tests a class by itself; leave out SOURCE and --save-direction")
        _classify_module(module, width, as_json)
        return
    if not sources:
        raise UserError("Missing argument 'SOURCE...'; give a checkpoint, or --module package:Class")
    from suite.parameters import classify as classify_one

    if save_direction is not None and not save_direction.resolve().parent.is_dir():
        raise UserError(f"--save-direction {save_direction}: no such directory")
    read: list[tuple[dict[str, Any], Any]] = []
    with ThreadPoolExecutor(_CLASSIFY_THREADS) as pool:  # remote sources wait for their servers side by side
        for source, result in zip(sources, pool.map(lambda s: classify_one(s, verify), sources), strict=True):
            if len(sources) > 1 and sys.stderr.isatty():
                print(f"{len(read) + 1}/{len(sources)} {source}", file=sys.stderr)
            read.append(result)
    results = [result for result, _ in read]
    if save_direction is not None:
        from runners.directions_file import save_directions

        save_directions(save_direction, read)
    if as_json:
        print(json.dumps({"sources": results}, indent=2))
    else:
        _print_classified(results)
    if any(result["error"] for result in results):
        raise typer.Exit(EXIT_FALSE)


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder, Hub id (org/name[@rev]), or URL.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.safetensors", help="File to write.")],
    debug: Debug = False,
) -> None:
    """Dead directions of every norm of a checkpoint as safetensors, for other programs; from its parameters alone.

    Each norm's inverse-scale direction, predicted dead subspace and shift, in float64; names in the metadata.

    Example: [bold]deadbench export openai-community/gpt2 -o directions.safetensors[/bold]
    """
    from runners.directions_file import export_directions

    if not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: no such directory")
    print(f"{out}: {export_directions(source, out)} norms")


@app.command()
def run(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Registry ids or SOURCEs; none: the suite.")
    ] = None,
    suite: Annotated[str | None, typer.Option(metavar="NAME", help="Suite of the registry. [default: quick]")] = None,
    registry: Annotated[Path | None, typer.Option(metavar="FILE", help="Registry. [default: models.yaml]")] = None,
    reads: Annotated[str | None, typer.Option(help="Comma-separated: parameters, random, trained, functional.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray to join: local, auto, host:port. [default: local]")] = None,
    out: Annotated[str, typer.Option(metavar="DIR_OR_URI", help="Result set to write or continue.")] = "results",
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Skip finished reads, or redo them.")] = True,
    engine: Annotated[str, typer.Option(help="auto, torch, streaming (one block at a time) or vllm.")] = "auto",
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Devices (without GPUs: processes) that share one model. [default: gpus]")
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=1, help="Processes (with GPUs: one GPU each) that divide one model's tokens.")
    ] = 1,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to read. [default: the protocol's]")] = None,
    input_spec: Annotated[
        str | None,
        typer.Option("--input", metavar="SPEC", help="text[:FILE], image[:DIR], tokens:random, tokens:FILE.npy, hf:…"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights and inputs.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16, bfloat16, float64.")] = None,
    accumulator_gb: Annotated[
        float | None,
        typer.Option(min=0, metavar="GB", help="Memory for residual-stream accumulators. [default: 1/4 of the free]"),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds without progress before a model is given up.")] = 3600,
    max_retries: Annotated[
        int, typer.Option(min=0, help="Further attempts at a read of which a process died or hung.")
    ] = 1,
    checkpoint_interval: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How often a running read is saved, to go on there; 0: never."),
    ] = 300,
    autoscale: Annotated[
        str | None, typer.Option(metavar="SHAPE", help="Largest node that an autoscaler may add: 8x80GB.")
    ] = None,
    log_format: Annotated[str, typer.Option(help="text, or json: one event a line on stderr.")] = "text",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read models: parameters, random initialisation, trained weights; one Ray actor each, results as Arrow.

    Finished reads are skipped when the same command is given again.

    Example: [bold]deadbench run --suite quick --out results/quick[/bold]
    """
    from runners.cluster import PlanError, parse_cluster
    from runners.driver import Settings
    from runners.jobs import JobError, Overrides, build_jobs, unreachable
    from runners.plan import place_jobs
    from suite.registry import RegistryError, find_registry, load_registry

    check_out(out)
    check_options(engine, dtype, tokens, input_spec)
    one_of("--log-format", log_format, ("text", "json"))
    try:
        path = find_registry(registry)
        chosen = None if engine == "auto" else engine
        overrides = Overrides(tokens, input_spec, dtype, chosen, seed, accumulator_gb, tensor_parallel, replicas)
        wanted = [part.strip() for part in reads.split(",")] if reads is not None else None
        jobs = build_jobs(load_registry(path), path, models or [], suite, wanted, overrides)
        cannot_be_read = unreachable(jobs)
        cluster, added = choose_cluster(None, address), None
        if autoscale is not None:
            added = parse_cluster(autoscale, "--autoscale").largest
            cluster = cluster.with_node(added)
        jobs, remarks = place_jobs(jobs, cluster)
    except (RegistryError, JobError, PlanError) as error:
        raise UserError(str(error)) from error
    settings = Settings(address, timeout, max_retries, added.gpus if added else 0, checkpoint_interval)
    summary = _execute(jobs, out, resume, settings, [*cannot_be_read, *remarks], log_format, debug)
    if as_json:
        print(json.dumps({"run_id": summary.run_id, "out": out, **_counts(summary), "reads": summary.reads}, indent=2))
    else:
        print(f"{summary.ok} ok, {summary.failed} failed, {summary.skipped} already there; results in {out}")
    if summary.failed:
        raise typer.Exit(EXIT_FALSE)


def main() -> None:
    """Entry point of the console script: one line for an error, a traceback only with --debug."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings say nothing that our answers do not
    try:
        code = app(standalone_mode=False)  # Typer turns Ctrl-C into this exit code
        if code == EXIT_INTERRUPTED:
            print("deadbench: interrupted; what finished is kept", file=sys.stderr)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        code = _explain(error)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> int:
    """Print one line for `error`; returns the exit code."""
    from typer.exceptions import TyperException

    if isinstance(error, TyperException):
        text = error.format_message()
    else:
        text = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, (UserError, ValueError)):
            text = f"{type(error).__name__}: {text}"
    print(f"deadbench: {text}", file=sys.stderr)
    expected = isinstance(error, (TyperException, UserError, ValueError))
    return EXIT_USAGE if expected else EXIT_FALSE


def _execute(
    jobs: list[Any], out: str, resume: bool, settings: Any, remarks: list[str], log_format: str, debug: bool
) -> Any:
    """Leave out what is finished, then run the rest; Ray is not even started when nothing is left."""
    from runners.checkpoints import remove_checkpoints
    from runners.driver import DriverError, StoppedError, Summary, execute, new_run_id
    from runners.event_log import EventLog
    from runners.progress import Reporter
    from runners.store import ResultStore

    store = ResultStore(out)
    done = store.finished() if resume else set()
    for read in (read for job in jobs for read in job.reads if not resume or read.identity() in done):
        remove_checkpoints(out, read)
    left = [job.without(done) for job in jobs]
    skipped = sum(len(job.reads) for job in jobs) - sum(len(job.reads) for job in left)
    left = [job for job in left if job.reads]
    run_id = new_run_id()
    if not left:
        return Summary(run_id, skipped=skipped)
    try:
        kind = EventLog if log_format == "json" else Reporter
        with kind(sum(len(job.reads) for job in left), debug=debug) as reporter:
            for remark in remarks:
                reporter.say(remark)
            if skipped:
                reporter.say(f"{skipped} reads are already in {out}; --fresh reads them again")
            summary = execute(left, store, settings, reporter, run_id)
    except DriverError as error:
        raise UserError(str(error)) from error
    except StoppedError as error:
        print(f"deadbench: {error}", file=sys.stderr, flush=True)
        if error.lost:
            os._exit(EXIT_FALSE)  # an ordinary end would wait for Ray, which waits for its head
        raise typer.Exit(EXIT_FALSE) from error
    summary.skipped = skipped
    return summary


def _counts(summary: Any) -> dict[str, int]:
    return {"ok": summary.ok, "failed": summary.failed, "skipped": summary.skipped}


def _print_classified(results: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Column, Table

    source, norm = Column("source", overflow="fold"), Column("final norm", overflow="fold", min_width=30)
    headers = ("family", norm, "placement", "scale", "D", "zero", "depth", "bytes read")
    table = Table(source, *headers, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for result in results:
        if result["error"]:
            table.add_row(escape(result["source"]), "-", escape(result["error"]))
            continue
        depth = result["depth_predicted"]
        table.add_row(
            escape(result["source"]),
            result["family"],
            escape(result["final_norm"] or "; ".join(result["evidence"]) or "-"),
            *(str(result[name] or "-") for name in ("placement", "scale", "hidden_size")),
            "-" if result["num_zero_scales"] is None else str(result["num_zero_scales"]),
            "-" if depth is None else f"{depth:.2f}",
            f"{result['bytes_read']:,} of {result['bytes_total']:,}",
        )
    console().print(table)


def _classify_module(name: str, width: int, as_json: bool) -> None:
    """Print what the kernel test finds in a user's own class; exit code 1 where it is no known normalisation."""
    from suite.norms import kernel_dimension, load_norm_class, probe

    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own folder, as with `python -m`
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no part of the answer
        module = load_norm_class(name, width)
        found, dimension = probe(module, width), kernel_dimension(module, width)
    facts = {
        "module": name,
        "family": found.family,
        "kernel": None if dimension is None else dimension > 0,
        "kernel_dimension": dimension,
        "scale": found.scale,
        "has_bias": None if found.family == "other" else found.shift_parameter is not None,
        "eps": found.eps,
        "evidence": list(found.evidence),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        verdict = "whether it has dead directions cannot be told"
        if dimension is not None:
            verdict = f"{dimension} dead of {width} output directions"
            verdict += ", gamma^-1" if found.family == "layernorm" and dimension == 1 else ""
        print(f"{name}: {found.family}, {verdict} ({'; '.join(found.evidence)})")
    if found.family == "other":
        raise typer.Exit(EXIT_FALSE)
