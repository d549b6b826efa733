"""What `deadbench compare` says of two checkpoints: have norms been scaled, and all that they feed with them?"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from deadbench.runners.cli.console import EXIT_FALSE, UserError, print_frames, say
from deadbench.suite.errors import ArchitectureError

if TYPE_CHECKING:
    import polars as pl


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
    if format == "github":
        raise UserError("--format github reports a gate, and a gate judges result sets, not checkpoints")
    frame, told, num_broken = _scaled_norms(baseline, candidate, show_all=show_all)
    if len(frame) or format != "table":
        print_frames({"scaled_norms": frame}, format)
    say(told)
    if num_broken:
        raise typer.Exit(EXIT_FALSE)


def frames_of_quantised_pair(
    one: "pl.LazyFrame", other: "pl.LazyFrame", *, show_all: bool
) -> "dict[str, pl.DataFrame]":
    """The norms of two result sets' checkpoints, where each is of one that is here, and one of them is quantised."""
    from deadbench.suite.checkpoints.adapters import open_checkpoint
    from deadbench.suite.checkpoints.quantised import method_of
    from deadbench.suite.errors import CheckpointError

    places = [_only_checkpoint(side) for side in (one, other)]
    if None in places or places[0] == places[1]:
        return {}
    baseline, candidate = map(str, places)
    try:
        methods = [method_of(open_checkpoint(side).config()) for side in (baseline, candidate)]
        if methods[0] == methods[1]:
            return {}
        frame, told, _ = _scaled_norms(baseline, candidate, show_all=show_all)
    except (CheckpointError, ArchitectureError) as error:  # what was read may be gone since
        say(f"whether norms were scaled with what they feed cannot be told: {error}")
        return {}
    say(told)
    return {"scaled_norms": frame}


def _only_checkpoint(reads: "pl.LazyFrame") -> str | None:
    """Where the one checkpoint is that a side's reads are of; None where there are several, or it is not here."""
    import polars as pl

    from deadbench.analysis.results import collected
    from deadbench.suite.checkpoints.sources import locate

    which = reads.filter(pl.col("status") == "ok", pl.col("read") != "random").select("source", "revision").unique()
    found = collected(which).rows()
    if len(found) != 1 or found[0][0] is None:
        return None
    place = locate(found[0][0])
    below = os.path.join(place, found[0][1] or "")
    place = below if os.path.isdir(below) else place
    return place if os.path.isabs(place) and os.path.exists(place) else None


def _scaled_norms(baseline: str, candidate: str, *, show_all: bool) -> "tuple[pl.DataFrame, str, int]":
    """A row for each norm, those that are the same left out unless all are shown; what is told; how many are broken."""
    import polars as pl

    from deadbench.suite.checkpoints.adapters import open_checkpoint
    from deadbench.suite.reads.scaled_norms import scaled_norms

    norms = scaled_norms(open_checkpoint(baseline), open_checkpoint(candidate))
    rows = [norm.row() for norm in norms if show_all or norm.verdict != "same"]
    types = {"angle": pl.Float64, "predicted_angle": pl.Float64, "scaled": pl.Int64}
    frame = pl.DataFrame(rows, schema={name: types.get(name, pl.String) for name in norms[0].row()})
    count = {verdict: sum(norm.verdict == verdict for norm in norms) for verdict in ("turned", "broken", "cannot tell")}
    told = (
        f"{len(norms)} norms: {count['turned']} turned with all that they feed, {count['broken']} broken, "
        f"{count['cannot tell']} of which it cannot be told, {len(norms) - sum(count.values())} the same"
    )
    return frame, told, count["broken"]
