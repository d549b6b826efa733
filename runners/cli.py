"""The command line: a command parses, calls one function, prints. Heavy imports wait until a command needs them.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 the thing asked about does not hold, 2 bad
usage or input, 130 interrupted.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Dead directions of transformers, read from the parameters and measured by one forward pass.",
)

EXIT_FALSE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
FORMATS = ("table", "json", "csv", "md", "html")
PLAN_WIDTH = 150  # columns of a table that is not printed to a terminal

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Format = Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")]
Results = Annotated[str, typer.Argument(metavar="RESULTS", help="A result set: folder or URI.")]


class UserError(Exception):
    """A mistake of the user's, in one line; exit code 2."""


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("deadbench"))
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def classify(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Folder, Hub id (org/name[@rev]), or URL.")],
    save_direction: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Write the inverse-scale directions (float64).")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Normalisation family, final norm and dead direction of checkpoints, from their parameters alone.

    Opens only headers, the configuration and the final norm's tensors.

    Example: [bold]deadbench classify openai-community/gpt2 ./my-checkpoint --save-direction v.safetensors[/bold]
    """
    from suite.parameters import classify as classify_one

    _quieten_transformers()
    if save_direction is not None and not save_direction.resolve().parent.is_dir():
        raise UserError(f"--save-direction {save_direction}: no such directory")
    read: list[tuple[dict[str, Any], Any]] = []
    for source in sources:
        if len(sources) > 1 and sys.stderr.isatty():
            print(f"{len(read) + 1}/{len(sources)} {source}", file=sys.stderr)
        read.append(classify_one(source))
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
def run(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Registry ids or SOURCEs; none: the suite.")
    ] = None,
    suite: Annotated[str | None, typer.Option(metavar="NAME", help="Suite of the registry. [default: quick]")] = None,
    registry: Annotated[Path | None, typer.Option(metavar="FILE", help="Registry. [default: models.yaml]")] = None,
    reads: Annotated[str | None, typer.Option(help="Comma-separated: parameters, random, trained.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray to join: local, auto, host:port. [default: local]")] = None,
    out: Annotated[str, typer.Option(metavar="DIR_OR_URI", help="Result set to write or continue.")] = "results",
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Skip finished reads, or redo them.")] = True,
    engine: Annotated[str, typer.Option(help="auto or torch.")] = "auto",
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Devices (without GPUs: processes) that share one model. [default: gpus]")
    ] = None,
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
    max_retries: Annotated[int, typer.Option(min=0, help="Further attempts when a model's process dies.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read models: parameters, random initialisation, trained weights; one Ray actor each, results as Arrow.

    Finished reads are skipped when the same command is given again.

    Example: [bold]deadbench run --suite quick --out results/quick[/bold]
    """
    from runners.jobs import ENGINES, JobError, Overrides, build_jobs
    from suite.registry import Dtype, RegistryError, find_registry, load_registry

    _one_of("--dtype", dtype, Dtype.__args__)  # type: ignore[attr-defined]
    if engine not in ENGINES:
        raise UserError(f"--engine {engine!r} cannot be run by this version; choose {' or '.join(ENGINES)}")
    if tokens is not None and input_spec is not None and input_spec.endswith(".npy"):
        raise UserError("--tokens does nothing with tokens:FILE.npy, which is used exactly as given; leave one out")
    try:
        path = find_registry(registry)
        chosen = None if engine == "auto" else engine
        overrides = Overrides(tokens, input_spec, dtype, chosen, seed, accumulator_gb, tensor_parallel)
        wanted = [part.strip() for part in reads.split(",")] if reads is not None else None
        jobs = build_jobs(load_registry(path), path, models or [], suite, wanted, overrides)
    except (RegistryError, JobError) as error:
        raise UserError(str(error)) from error
    summary = _execute(jobs, out, resume, address, timeout, max_retries, debug)
    if as_json:
        print(json.dumps({"run_id": summary.run_id, "out": out, **_counts(summary), "reads": summary.reads}, indent=2))
    else:
        print(f"{summary.ok} ok, {summary.failed} failed, {summary.skipped} already there; results in {out}")
    if summary.failed:
        raise typer.Exit(EXIT_FALSE)


@app.command()
def leaderboard(
    results: Results,
    format: Format = "table",
    sort: Annotated[str, typer.Option(help="Column to rank by.")] = "depth",
    family: Annotated[str | None, typer.Option(help="Only this normalisation family.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Models ranked by the depth of their dead direction, like protocols together.

    Example: [bold]deadbench leaderboard results/quick --format md[/bold]
    """
    from analysis.leaderboard import leaderboard as rank
    from analysis.results import scan

    _print_frame(rank(scan(results), sort=sort, family=family), "leaderboard", "json" if as_json else format)


@app.command()
def families(results: Results, format: Format = "table", as_json: Json = False, debug: Debug = False) -> None:
    """Each claim about the normalisation families as a row, with how many models hold it.

    Example: [bold]deadbench families results/quick[/bold]
    """
    from analysis.families import families as compare
    from analysis.results import scan

    _print_frame(compare(scan(results)), "families", "json" if as_json else format)


@app.command()
def report(
    results: Results,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.html", help="Page to write.")] = Path("report.html"),
    debug: Debug = False,
) -> None:
    """One self-contained page: leaderboard, claims and plots; no network needed to view it.

    Example: [bold]deadbench report results/quick -o report.html[/bold]
    """
    from analysis.report import write_report

    if not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: no such directory")
    write_report(results, out)
    print(out)


def main() -> None:
    """Entry point of the console script: one line for an error, a traceback only with --debug."""
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
    jobs: list[Any], out: str, resume: bool, address: str | None, timeout: float, max_retries: int, debug: bool
) -> Any:
    """Leave out what is finished, then run the rest; Ray is not even started when nothing is left."""
    from runners.driver import DriverError, Settings, Summary, execute, new_run_id
    from runners.progress import Reporter
    from runners.store import ResultStore

    store = ResultStore(out)
    done = store.finished() if resume else set()
    left = [job.without(done) for job in jobs]
    skipped = sum(len(job.reads) for job in jobs) - sum(len(job.reads) for job in left)
    left = [job for job in left if job.reads]
    run_id = new_run_id()
    if not left:
        return Summary(run_id, skipped=skipped)
    try:
        with Reporter(sum(len(job.reads) for job in left), debug=debug) as reporter:
            if skipped:
                reporter.say(f"{skipped} reads are already in {out}; --fresh reads them again")
            summary = execute(left, store, Settings(address, timeout, max_retries), reporter, run_id)
    except DriverError as error:
        raise UserError(str(error)) from error
    summary.skipped = skipped
    return summary


def _counts(summary: Any) -> dict[str, int]:
    return {"ok": summary.ok, "failed": summary.failed, "skipped": summary.skipped}


def _one_of(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise UserError(f"{option} {value!r} is unknown; choose {', '.join(allowed)}")


def _print_frame(frame: Any, title: str, format: str) -> None:
    from analysis.formats import render, rich_table

    _one_of("--format", format, FORMATS)
    if format == "table":
        _console().print(rich_table(frame, title))
    else:
        print(render(frame, format, title=title))


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
    _console().print(table)


def _console() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=PLAN_WIDTH)


def _quieten_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
