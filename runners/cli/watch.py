"""`deadbench watch`: the checkpoints of a training, each read and judged when it appears."""

import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deadbench.runners.cli import options
from deadbench.runners.cli.console import (
    EXIT_FALSE,
    Debug,
    Json,
    UserError,
    check_folder,
    check_out,
    say,
)
from deadbench.suite.read_specs import READ_SPECS
from deadbench.suite.secrets import shown_place


def watch(
    place: Annotated[
        str, typer.Argument(metavar="DIR_OR_URI", help="Where checkpoints appear: a folder, a bucket, hf://ORG/NAME.")
    ],
    out: options.Out = "results",
    reads: Annotated[str, typer.Option(help="Of parameters, trained, functional.")] = "parameters",
    gate: options.GateFile = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="RESULTS[@REVISION]", help="Compare each checkpoint with this too, not only the one before."
        ),
    ] = None,
    on_break: Annotated[
        str | None,
        typer.Option(
            metavar="CMD", help="Run at a break for 600 s at most, the verdict as JSON on its stdin; no shell."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--once", help="Until interrupted, or one look: for cron, CI.")
    ] = True,
    interval: Annotated[float, typer.Option(min=0.05, metavar="SECONDS", help="Between two looks.")] = 30.0,
    until_idle: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="End when nothing new came for so long.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Page to write. \\[default: OUT/report.html]")
    ] = None,
    address: Annotated[
        str, typer.Option(help="none: this process, without Ray; else Ray to join: local, auto, host:port.")
    ] = "none",
    engine: options.Engine = "auto",
    tokens: options.Tokens = None,
    input_spec: options.InputSpec = None,
    taps: options.Taps = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = None,
    config: options.Config = None,
    model_type: options.ModelType = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read each checkpoint of a training when it is whole, and judge it against the one before it.

    Whole means: what its framework writes last is there (trainer_state.json of transformers' Trainer, .metadata of
    torch.distributed.checkpoint), or the framework's pointer names it (Megatron, DeepSpeed); a single file, and any
    other folder, is read when two looks find it the same and its headers whole.

    A break is a check that --gate breaks, or without one the default gate, a direction that opened, and a checkpoint
    that is there and cannot be read, as where its values are not finite. Exit code 1 when a checkpoint broke or could
    not be read. What is in OUT is neither read nor told of again.

    Example: [bold]deadbench watch runs/gpt2 --out results/gpt2 --on-break "python alert.py"[/bold]

    Example: [bold]deadbench watch s3://bucket/run --once --baseline results/main@step1000 --out results/run[/bold]
    """
    from deadbench.analysis.gate import load_gate
    from deadbench.analysis.sides import open_side
    from deadbench.runners.cli.watching import Watch
    from deadbench.runners.driver.in_process import interruptible
    from deadbench.runners.driver.loop import Settings
    from deadbench.runners.planning.hardware import NO_RAY, this_machine

    check_out(out)
    check_folder("--report", page)
    if not follow and until_idle is not None:
        raise UserError("--until-idle is of --follow; leave it out, or --once")
    if on_break is not None:
        _check_command(on_break)
    overrides = options.overridden(
        engine=engine, tokens=tokens, input_spec=input_spec, dtype=dtype, seed=seed, accumulator_gb=None,
        tensor_parallel=None, replicas=1, config=config, model_type=model_type, taps=taps,
    )  # fmt: skip
    registry, path, passed_over = options.registry_at(None, needed=False, names=[])
    for line in passed_over:
        say(line)
    where, name = _place_and_name(place)
    if not follow and os.path.isabs(where) and not os.path.exists(where):
        raise UserError(f"{shown_place(place)}: no such folder; --follow waits for one that comes")
    watching = Watch(
        where, name, (registry, path), out, _reads(reads), overrides, Settings(address),
        this_machine(most_gpus=1 if address == NO_RAY else None),
        load_gate(gate) if gate is not None else None,
        (shown_place(baseline), open_side(baseline)) if baseline is not None else None,
        on_break, page, interval, say, lambda verdict: None if as_json else print(verdict.line(), flush=True), debug,
    )  # fmt: skip
    with interruptible():
        try:
            verdicts = watching.follow(until_idle) if follow else watching.once()
        finally:
            if as_json:
                print(json.dumps({"watch": [asdict(verdict) for verdict in watching.verdicts]}, indent=2))
    if any(verdict.status in ("broken", "failed") or verdict.error for verdict in verdicts):
        raise typer.Exit(EXIT_FALSE)


def _reads(told: str) -> list[str]:
    wanted = [part.strip() for part in told.split(",")]
    allowed = [name for name, spec in READ_SPECS.items() if spec.per_checkpoint]
    for read in wanted:
        if read not in allowed:
            raise UserError(f"--reads {read!r} is no read of a checkpoint; choose {', '.join(allowed)}")
    return [read for read in allowed if read in wanted]


def _place_and_name(place: str) -> tuple[str, str]:
    """The place for every step of the way, and the model's name, which is the one that `run` gives the folder.

    A folder that is not there yet must not turn into a Hub id, which `runs/gpt2` could be.
    """
    from deadbench.suite.checkpoints.series import Series
    from deadbench.suite.storage import is_url

    name = shown_place(Series(place, (), "").name)
    return (place if is_url(place) else str(Path(os.path.expanduser(place)).absolute())), name


def _check_command(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--on-break {command!r}: {error}") from error
    if not words:
        raise UserError("--on-break is empty; give a program and its arguments")
