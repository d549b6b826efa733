"""`deadbench attach`: a run that goes on elsewhere, followed to its end."""

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deadbench.runners.cli.console import EXIT_FALSE, EXIT_INTERRUPTED, Debug, Json, UserError, say
from deadbench.suite.plain_text import MAX_LINE, plain
from deadbench.suite.secrets import scrubbed, shown_place

if TYPE_CHECKING:
    from deadbench.runners.cluster.submitted import Submitted

_RAY = re.compile(r"auto|(?:https?|ray)://\S+|(?:\[[^\]/]+\]|[^:/\[\]]+):\d{1,5}")

_HELD = 4096  # letters of one line


def attach(
    address: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS", help="A result set (--out of the run), or a Ray: http://HOST:8265, HOST:PORT, auto."
        ),
    ],
    run_id: Annotated[
        str | None,
        typer.Option(
            "--run", metavar="ID", help="Of a run, or of a submitted job. \\[default: the newest that goes on]"
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Follow a run that goes on elsewhere, until it ends; exit code as the run's own.

    Of a Ray the job that `ray job submit` started is followed, by what it prints; of a result set any run, by its rows
    and its driver's signs of life. Ctrl-C leaves it (exit code 130): the run does not notice, and can be attached to
    again.

    Example: [bold]deadbench attach s3://bucket/results[/bold]

    Example: [bold]deadbench attach http://127.0.0.1:8265[/bold]
    """
    try:
        code = _follow(address, run_id, as_json)
    except KeyboardInterrupt:
        say(f"deadbench: left; the run goes on: deadbench attach {shown_place(address)} comes back")
        sys.exit(EXIT_INTERRUPTED)
    if code:
        raise typer.Exit(code)


def _follow(address: str, run_id: str | None, as_json: bool) -> int:
    from deadbench.suite.storage import is_url

    if not address.strip():
        raise UserError("ADDRESS is empty; give a run's --out, or a Ray as http://HOST:8265, HOST:PORT or auto")
    if not os.path.isdir(address):  # which a name that none can have is not, without an error
        if _RAY.fullmatch(address):
            return _follow_ray(address, run_id, as_json)
        if not is_url(address):
            raise UserError(
                f"{plain(address)}: no such folder; give a run's --out, or a Ray as http://HOST:8265, HOST:PORT or auto"
            )
    return _follow_results(address, run_id, as_json)


def _follow_results(location: str, run_id: str | None, as_json: bool) -> int:
    """Follow a run in a result set; returns its exit code."""
    from deadbench.runners.reporting.following import follow

    followed = follow(location, run_id)
    counts, error = followed.counts(), followed.record.get("error")
    out, command = shown_place(location), followed.record.get("command")
    if as_json:
        facts = {"run_id": followed.run_id, "status": followed.ending, "out": out, **counts, "error": error}
        print(json.dumps(facts | {"reads": followed.record["reads"]}, indent=2))
    else:
        told = "{ok} ok, {failed} failed, {by_others} by other runs".format(**counts)
        print(f"{followed.ending}: {told}; results in {out}")
    if followed.ending == "gone":
        say(
            f"deadbench: run {followed.run_id} on {followed.host} gives no sign of life; what finished is kept, and "
            f"its command goes on: {command}"
        )
    elif error:
        say(f"deadbench: {error}")
    if followed.ending == "interrupted":
        return EXIT_INTERRUPTED
    return EXIT_FALSE if counts["failed"] or followed.ending != "finished" else 0


def _follow_ray(address: str, job_id: str | None, as_json: bool) -> int:
    """Follow a job of a Ray; returns its exit code."""
    from deadbench.runners.cluster.submitted import Jobs

    jobs = Jobs(address)
    job = jobs.latest(job_id)
    if job.id is None:
        return _follow_driver(job, as_json)
    name = plain(job.id)
    say(plain(f"job {name}: {scrubbed(job.entrypoint)}", MAX_LINE))
    lines = _Lines()
    ended = jobs.follow(job, lines.take, say)
    lines.end()
    out = shown_place(job.out) if job.out is not None else None
    facts: dict[str, Any] = {"job": name, "status": ended.status.lower(), "out": out}
    if as_json:
        print(json.dumps(facts | {"exit_code": ended.code()}, indent=2))
    else:
        where = f"; results in {out}" if out is not None else ""
        print(f"job {name} {facts['status']}, exit code {ended.code()}{where}")
    return ended.code()


def _follow_driver(job: "Submitted", as_json: bool) -> int:
    """A driver that joined by itself prints where it runs, and nowhere else: its result set is followed."""
    from deadbench.suite.storage import is_url

    out = job.out or "results"  # as `run` has it
    shown = shown_place(out)
    if is_url(out) or (Path(out).is_absolute() and Path(out).is_dir()):
        say(plain(f"a driver of its own, {scrubbed(job.entrypoint)}: its result set is followed", MAX_LINE))
        return _follow_results(out, None, as_json)
    raise UserError(
        f"{scrubbed(job.entrypoint)}: was not submitted as a job, and its result set, {shown}, is not seen from here; "
        f"on its machine, give: deadbench attach {shown}"
    )


class _Lines:
    """What comes in pieces, printed on stderr line by line; of a line without end its beginning is held."""

    def __init__(self) -> None:
        self._rest = ""

    def take(self, text: str) -> None:
        *lines, last = text.split("\n")
        for line in lines:
            self._tell(line)
        self._rest += last[: _HELD - len(self._rest)]

    def end(self) -> None:
        if self._rest:
            self._tell("")

    def _tell(self, line: str) -> None:
        line, self._rest = self._rest + line[: _HELD - len(self._rest)], ""
        say(plain(scrubbed(line), MAX_LINE))
