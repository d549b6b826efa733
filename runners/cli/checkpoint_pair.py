"""What `deadbench compare` says of two checkpoints: have norms been scaled, and all that they feed with them?"""

import os
from pathlib import Path

import typer

from deadbench.runners.cli.console import EXIT_FALSE, UserError, print_frames, say


def are_checkpoints(*sides: str) -> bool:
    """Whether two sides of a comparison are SOURCES: one surely is, and the other may be.

    A folder with a table of reads is a result set, and so is `RESULTS@REVISION` where there is such a folder; a name
    that could be the Hub's is one beside a checkpoint, or where it says so (`hf://`).
    """
    kinds = [_kind(side) for side in sides]
    return "checkpoint" in kinds and "results" not in kinds


def _kind(side: str) -> str:
    from deadbench.suite.checkpoints.checkpoint import Checkpoint
    from deadbench.suite.checkpoints.no_weights import ADAPTER_FILE
    from deadbench.suite.checkpoints.sources import is_hub_id, locate
    from deadbench.suite.checkpoints.weight_files import has_weights

    if any(Path(folder, "reads").is_dir() for folder in (side, side.rpartition("@")[0])):
        return "results"
    if side.startswith("hf://"):
        return "checkpoint"
    place = locate(side)
    if os.path.isfile(place):
        return "checkpoint"
    if os.path.isdir(place):
        there = Checkpoint(side, place=place)
        return "checkpoint" if there.has("config.json") or there.has(ADAPTER_FILE) or has_weights(there) else "results"
    return "either" if is_hub_id(side) else "results"


def compare_checkpoints(baseline: str, candidate: str, format: str, *, show_all: bool) -> None:
    """Print a row for each norm that changed (all: every norm); exit code 1 where something was left unscaled."""
    import polars as pl

    from deadbench.suite.checkpoints.adapters import open_checkpoint
    from deadbench.suite.reads.scaled_norms import scaled_norms

    if format == "github":
        raise UserError("--format github reports a gate, and a gate judges result sets, not checkpoints")
    norms = scaled_norms(open_checkpoint(baseline), open_checkpoint(candidate))
    broken = [norm for norm in norms if norm.verdict == "broken"]
    rows = [norm.row() for norm in norms if show_all or norm.verdict != "same"]
    if rows or format != "table":
        types = {"angle": pl.Float64, "predicted_angle": pl.Float64, "scaled": pl.Int64}
        schema = {name: types.get(name, pl.String) for name in norms[0].row()}
        print_frames({"scaled_norms": pl.DataFrame(rows, schema=schema)}, format)
    turned = sum(norm.verdict == "turned" for norm in norms)
    unknown = sum(norm.verdict == "cannot tell" for norm in norms)
    say(
        f"{len(norms)} norms: {turned} turned with all that they feed, {len(broken)} broken, {unknown} of which it "
        f"cannot be told, {len(norms) - turned - len(broken) - unknown} the same"
    )
    if broken:
        raise typer.Exit(EXIT_FALSE)
