"""`deadbench run`: the main job."""

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deadbench.runners.cli import options
from deadbench.runners.cli.console import EXIT_FALSE, Debug, Json, UserError, check_out, one_of, say
from deadbench.runners.cli.init import check_named
from deadbench.suite.errors import message
from deadbench.suite.read_specs import READ_SPECS
from deadbench.suite.secrets import shown_place

if TYPE_CHECKING:
    from deadbench.runners.jobs.job import ModelJob


def run(
    models: options.Models = None,
    factory: options.Factory = None,
    suite: options.Suite = None,
    registry: options.Registry = None,
    reads: options.Reads = None,
    address: options.Address = None,
    out: options.Out = "results",
    resume: options.Resume = True,
    engine: options.Engine = "auto",
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Devices (without GPUs: processes) that share one model. \\[default: gpus]"
        ),
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
    timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Seconds without progress before a model is given up.")
    ] = 3600,
    max_retries: Annotated[
        int, typer.Option(min=0, metavar="N", help="Further attempts at a read of which a process died or hung.")
    ] = 1,
    checkpoint_interval: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How often a running read is saved, to go on there; 0: never."),
    ] = 300,
    autoscale: options.Autoscale = None,
    log_format: Annotated[str, typer.Option(help="text, or json: one event a line on stderr.")] = "text",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read models: parameters, random initialisation, trained weights; one Ray actor each, results as Arrow.

    Finished reads are skipped when the same command is given again; given on several machines with one --out, it
    shares the reads among them. With --address none all is read in this process,
    one model after another, and Ray is not started: the same rows, sooner for a small model; a read that is killed
    takes the command with it, and --timeout does not reach into a call of a library.

    Example: [bold]deadbench run --suite quick --out results/quick[/bold]
    """
    from deadbench.runners.driver.loop import Settings
    from deadbench.runners.jobs.opening import unreachable
    from deadbench.runners.planning.assign import place_jobs
    from deadbench.runners.planning.hardware import NO_RAY

    check_out(out)
    if factory is None:
        check_named(models, suite, registry)
    one_of("--log-format", log_format, ("text", "json"))
    overrides = options.overridden(
        engine=engine, tokens=tokens, input_spec=input_spec, dtype=dtype, seed=seed,
        accumulator_gb=accumulator_gb, tensor_parallel=tensor_parallel, replicas=replicas,
        config=config, model_type=model_type, taps=taps,
    )  # fmt: skip
    if sys.stderr.isatty() and log_format == "text":  # who waits sees at once that something happens
        say("planning …" if address == NO_RAY else "planning, then starting Ray …")
    if autoscale is not None and address in ("local", NO_RAY):
        raise UserError(f"--autoscale {autoscale}: --address {address} gets no more nodes; name a Ray that does")
    jobs, cluster, names = options.jobs_and_cluster(
        models, suite, registry, reads, overrides, address=address, factory=factory, autoscale=autoscale
    )
    cannot_be_read = unreachable(jobs)
    jobs, remarks = place_jobs(jobs, cluster)
    to_come = [(node.gpus, node.gpu_bytes) for node in cluster.nodes[len(cluster.here().nodes) :]]
    settings = Settings(
        address, timeout, max_retries, tuple(to_come), checkpoint_interval, gpu_bytes=cluster.gpu_bytes()
    )
    summary = execute_jobs(jobs, out, resume, settings, [*names, *cannot_be_read, *remarks], log_format, debug)
    out = shown_place(out)
    if as_json:
        print(json.dumps({"run_id": summary.run_id, "out": out, **_counts(summary), "reads": summary.reads}, indent=2))
    else:
        print(f"{summary.ok} ok, {summary.failed} failed, {summary.skipped} already there; results in {out}")
        if log_format == "text" and not summary.failed:
            say(f"next: {_next_command(jobs, out)}")
    if summary.failed:
        raise typer.Exit(EXIT_FALSE)


def _next_command(jobs: "list[ModelJob]", out: str) -> str:
    """What shows the results that are there now: the trend of a single series, else the leaderboard."""
    checkpoints = {read.revision for job in jobs for read in job.reads if READ_SPECS[read.read].per_checkpoint}
    if len(jobs) == 1 and len(checkpoints) > 1:
        return f"deadbench trend {shlex.quote(out)} --model {shlex.quote(jobs[0].model_id)}"
    return f"deadbench leaderboard {shlex.quote(out)}"


def execute_jobs(
    jobs: list[Any], out: str, resume: bool, settings: Any, remarks: list[str], log_format: str, debug: bool
) -> Any:
    """Leave out what is finished, then run the rest; Ray is not even started when nothing is left."""
    from deadbench.runners.driver.books import Summary
    from deadbench.runners.driver.driver import DriverError, StoppedError, new_run_id
    from deadbench.runners.driver.in_process import execute_at
    from deadbench.runners.reporting.event_log import EventLog
    from deadbench.runners.reporting.progress import Reporter
    from deadbench.runners.results.store import ResultStore
    from deadbench.runners.worker.progress_folder import remove_checkpoints

    store = ResultStore(out)
    finished = store.finished()  # by --fresh too: what replaces a row must be told from it
    done = finished if resume else set()
    jobs = [job.as_stored(done) for job in jobs]
    for read in (read for job in jobs for read in job.reads if not resume or read.identity() in done):
        remove_checkpoints(out, *read.by_any_engine())
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
                reporter.say(f"{skipped} reads are already in {store.location}; --fresh reads them again")
            summary = execute_at(settings.address)(left, store, settings, reporter, run_id)
    except DriverError as error:
        raise UserError(str(error)) from error
    except StoppedError as error:
        print(f"deadbench: {message(error, None)}", file=sys.stderr, flush=True)
        if error.lost:
            os._exit(EXIT_FALSE)  # an ordinary end would wait for Ray, which waits for its head
        raise typer.Exit(EXIT_FALSE) from error
    summary.skipped += skipped
    return summary


def _counts(summary: Any) -> dict[str, int]:
    return {"ok": summary.ok, "failed": summary.failed, "skipped": summary.skipped}
