"""The two sides of a comparison: result sets, or single checkpoints of one."""

from typing import NamedTuple

import polars as pl

from deadbench.analysis.lines import natural
from deadbench.analysis.results import ResultsError, collected, scan


class Side(NamedTuple):
    """One side: its reads, and the sums by sequence that belong to them."""

    reads: pl.LazyFrame
    samples: pl.LazyFrame
    until: pl.LazyFrame  # its reads and those of the checkpoints before


def open_side(location: str) -> Side:
    """One side of a comparison: `RESULTS`, or `RESULTS@REVISION` for one checkpoint of every model.

    Raises:
        ResultsError: no result set, or no such revision in it.
    """
    try:
        reads = scan(location)
        return Side(reads, scan(location, "samples"), reads)
    except ResultsError:
        folder, at, revision = location.rpartition("@")
        if not at or not folder:
            raise
    reads = scan(folder)
    known = collected(reads.select(pl.col("revision").drop_nulls().unique()))["revision"].to_list()
    if revision not in known:
        shown = ", ".join(sorted(known, key=natural)[:20]) or "none"
        raise ResultsError(f"{location}: no checkpoint {revision!r} in {folder}; choose {shown}")
    here = pl.col("revision") == revision
    step = pl.col("checkpoint_step").filter(here).max()
    return Side(
        reads.filter(here), scan(folder, "samples").filter(here), reads.filter(pl.col("checkpoint_step") <= step)
    )
