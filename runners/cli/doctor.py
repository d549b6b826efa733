"""`deadbench doctor`: whether this machine, or each node of a cluster, can do the reads."""

import json
from typing import Annotated

import typer

from deadbench.runners.cli.console import EXIT_FALSE, Debug, Json

_SIGNS = {"ok": "ok", "wrong": "WRONG", "skipped": "-"}


def doctor(
    address: Annotated[
        str | None, typer.Option(help="Ray whose nodes are examined: auto, host:port. \\[default: this machine]")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Try small steps of every kind that reads take, a line each; exit code 1 if one is not right.

    Of each node: versions, GPUs as torch has them, threads, memory, disk, network; decompositions against their
    certificates; a bundled model with a known answer, state-space models, and whether a read takes the memory that is
    planned for it; rates, which are kept in the cache folder. Then a group of ranks, and vLLM where it is installed.
    One to two minutes in all.

    Example: [bold]deadbench doctor[/bold]

    Example: [bold]deadbench doctor --address auto --json[/bold]
    """
    from dataclasses import asdict

    from deadbench.runners.doctor.examine import examine_here

    lines = []
    for line in examine_here(address):
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
