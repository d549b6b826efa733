"""`deadbench census`: thousands of checkpoints by their parameters alone."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deadbench.runners.cli.console import EXIT_FALSE, Debug, Json, UserError, check_out, say
from deadbench.runners.cli.options import Config, ModelType, Out, given_config
from deadbench.runners.planning.hardware import NO_RAY
from deadbench.suite.plain_text import MAX_LINE, plain

if TYPE_CHECKING:
    from deadbench.runners.census.census import Outcome


_PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal
_SHOWN_ERRORS = 20


def census(
    sources_file: Annotated[
        str, typer.Argument(metavar="SOURCES_FILE", help="One SOURCE a line; blank lines and # comments are left out.")
    ],
    out: Out,
    address: Annotated[
        str | None, typer.Option(help="Ray to join: local, auto or host:port. \\[default: local]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Skip finished sources, or read them again.")] = True,
    threads: Annotated[
        int, typer.Option(min=1, metavar="N", help="Sources that each CPU's process reads at once.")
    ] = 16,
    config: Config = None,
    model_type: ModelType = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Family, final norm and predicted depth of thousands of checkpoints, on Ray Data; a row of `reads` for each.

    Opens only headers, configurations and final norms' tensors; what cannot be read is a failed row. When a server
    limits requests, all processes wait as long as it says, but no longer than 15 minutes for one that has given nothing
    and two hours for another; sources elsewhere go on, and stderr says so. Given again, the command reads what is
    missing. Norms beside the final one, and counts of parameters, are left to `run --reads parameters`.

    Example: [bold]deadbench census sources.txt --out s3://bucket/census[/bold]
    """
    from deadbench.runners.census.census import list_sources, new_outcome, take_census, unfinished
    from deadbench.runners.cluster.joining import connect
    from deadbench.runners.results.outbox import UnwritableError
    from deadbench.runners.results.store import ResultStore
    from deadbench.suite.secrets import shown_place

    check_out(out)
    if address == NO_RAY:
        raise UserError("--address none: a census is read on Ray Data; give local, auto or host:port")
    given = given_config(config), model_type
    sources = list_sources(sources_file)
    store = ResultStore(out)
    unread = unfinished(sources, store)  # by --fresh too: what replaces a row must be told from it
    left = unread if resume else sources
    outcome = new_outcome(len(sources), skipped=len(sources) - len(left))
    if left:
        connection = connect(address)
        previous = signal.signal(signal.SIGTERM, _interrupt)  # after ray.init, which installs its own
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where Ray tells of workers that died
                _show(take_census(left, store, outcome, threads, given, say), outcome)
        except UnwritableError as error:
            say(f"deadbench: {error}; what is written is kept: give the same command to go on")
            raise typer.Exit(EXIT_FALSE) from error
        finally:
            signal.signal(signal.SIGTERM, previous)
            connection.leave()
    if as_json:
        told = {"run_id": outcome.run_id, "out": shown_place(out), "sources": outcome.total, "ok": outcome.ok}
        told |= {"failed": outcome.failed, "skipped": outcome.skipped, "seconds": outcome.seconds}
        print(json.dumps(told | {"families": dict(outcome.families), "errors": outcome.errors}, indent=2))
    else:
        for each in outcome.errors[:_SHOWN_ERRORS]:
            print(_explained(each), file=sys.stderr)
        more = len(outcome.errors) - _SHOWN_ERRORS
        if more > 0:
            print(f"and {more} more, in the rows whose status is failed", file=sys.stderr)
        print(f"{_counts(outcome)}, {outcome.skipped} already there; results in {shown_place(out)}")
    if outcome.failed:
        raise typer.Exit(EXIT_FALSE)


def _show(outcomes: "Iterable[Outcome]", outcome: "Outcome") -> None:
    """Progress on stderr: one live line on a terminal, else a plain one every few seconds."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console, last = Console(stderr=True, highlight=False), time.monotonic()
    if console.is_terminal:
        with Live(Text("starting"), console=console, transient=True) as live:
            for _ in outcomes:
                live.update(Text(_line(outcome)))
        return
    for _ in outcomes:
        if time.monotonic() - last >= _PLAIN_SECONDS:
            last = time.monotonic()
            print(_line(outcome), file=sys.stderr)


def _line(outcome: "Outcome") -> str:
    read = outcome.ok + outcome.failed
    rate = read / max(outcome.seconds, 1e-9)
    left = outcome.total - outcome.skipped - read
    return f"{_counts(outcome)} of {outcome.total - outcome.skipped}, {rate:.0f} sources/s, {left / rate:.0f} s left"


def _counts(outcome: "Outcome") -> str:
    return f"{outcome.ok} ok, {outcome.failed} failed"


def _explained(each: dict[str, str]) -> str:
    named = each["error"].startswith(each["source"])
    return plain(each["error"] if named else f"{each['source']}: {each['error']}", MAX_LINE)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
