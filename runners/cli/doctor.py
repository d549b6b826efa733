"""`deadbench doctor`: whether this machine, or each node of a cluster, can do the reads."""

import json
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from deadbench.runners.cli.console import EXIT_FALSE, Debug, Json
from deadbench.suite.errors import one_line

if TYPE_CHECKING:
    from deadbench.runners.doctor.lines import Line

_SIGNS = {"ok": "ok", "wrong": "WRONG", "skipped": "-"}


def doctor(
    address: Annotated[
        str | None, typer.Option(help="Ray whose nodes are examined: auto, host:port. \\[default: none, this machine]")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Try small steps of every kind that reads take, a line each; exit code 1 if one is not right.

    Of each node: versions, GPUs as torch has them, threads, memory, disk, network, its clock, the Hub; decompositions
    against their certificates; a bundled model with a known answer, state-space models, and whether a read takes the
    memory that is planned for it; rates, which are kept in the cache folder. Then a group of ranks, and vLLM where it
    is installed. One to two minutes in all.

    Example: [bold]deadbench doctor[/bold]

    Example: [bold]deadbench doctor --address auto --json[/bold]
    """
    from dataclasses import asdict

    lines = []
    for line in _examined(None if address in ("", "none") else address):
        lines.append(line)
        if not as_json:
            print(f"{_SIGNS[line.verdict]:<6}{line.node}  {line.check}: {line.told}", flush=True)
    wrong = [line for line in lines if line.verdict == "wrong"]
    if as_json:
        print(json.dumps({"well": not wrong, "lines": [asdict(line) for line in lines]}, indent=2))
    else:
        print(f"{len(wrong)} of {len(lines)} are wrong" if wrong else "all is well")
    if wrong:
        raise typer.Exit(EXIT_FALSE)


def _examined(address: str | None) -> "Iterator[Line]":
    """The lines, as they come; one, where this process cannot even import what would examine."""
    from deadbench.runners.doctor.lines import Line

    try:
        from deadbench.runners.doctor.examine import examine_here
    except (ImportError, OSError) as error:  # of a library that torch loads by itself
        told = f"what reads need cannot be imported ({one_line(error, 300)}); install it anew in a fresh environment"
        yield Line(socket.gethostname(), "imports", "wrong", told)
        return
    yield from examine_here(address)
