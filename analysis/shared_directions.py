"""Which reads have a direction too: by its coordinates, without a row for each pair of a direction and a read.

Thousands of checkpoints of a series share their directions: pairs are quadratic in them. Directions with the same
coordinates and weights are one *pattern*, reads with the same coordinates at a place one *set*, and patterns that are
in the same sets one *group*, whose reads are counted once. What is left of pairs is taken some at a time.
"""

from collections.abc import Iterator, Sequence

import polars as pl

from deadbench.analysis.results import ResultsError

PLACE = ["architecture", "kind", "site"]
SERIES = ["model", "read", "seed", "protocol", "dtype"]  # of a read that is of the same training
_SAME = 0.9  # of the weight of a direction's listed coordinates
_PAIRS = 2_000_000  # rows at a time
_MOST_PAIRS = 100_000_000


def shared(found: pl.DataFrame, ok: pl.DataFrame) -> pl.DataFrame:
    """For each direction of `found`: which reads have it.

    Args:
        found: `direction`, `read_id`, `run`, `coordinates` and `weights` (lists of one length), PLACE and SERIES.
        ok: the reads: `read_id` in the order of training within a series, `run`, `is_last`, `checkpoint_step`,
            `revision` and SERIES.

    Returns:
        `direction`, `opened_step`, `opened_revision`, `in_checkpoints`, `in_runs`, `in_random`; none without its place.
    """
    reads = ok.with_columns(_number(ok, SERIES, "series"))
    known = found.join(reads.select("read_id", "series"), on="read_id").drop_nulls(PLACE)
    sets, of_read = _sets(known)
    known = known.with_columns(_number(known, [*PLACE, *map(_as_text, ("coordinates", "weights"))], "pattern"))
    groups = _groups(known, sets)
    known = known.join(groups, on="pattern").select("direction", "group", "series", "read", "run", "model")
    of_group = groups.select("group", "sets").unique("group")
    reads_of_set = of_read.group_by("set").agg(pairs=pl.len())
    of_group = of_group.join(
        of_group.explode("sets")
        .join(reads_of_set, left_on="sets", right_on="set")
        .group_by("group")
        .agg(pl.sum("pairs")),
        on="group",
    )
    parts = [_counted(known.join(some, on="group", how="semi"), some, of_read, reads) for some in _cut(of_group)]
    first = reads.select(opened="read_id", opened_step="checkpoint_step", opened_revision="revision")
    return pl.concat(parts).join(first, on="opened", how="left").drop("opened")


def _counted(known: pl.DataFrame, groups: pl.DataFrame, of_read: pl.DataFrame, reads: pl.DataFrame) -> pl.DataFrame:
    """`opened` (a read_id) and the counts of the directions of these groups."""
    pairs = groups.explode("sets").join(of_read, left_on="sets", right_on="set").select("group", "read_id")
    pairs = pairs.join(reads.select("read_id", "series", "read", "run", "model", "is_last"), on="read_id")
    mine = pairs.group_by("group", "series").agg(in_checkpoints=pl.len().cast(pl.Int64), opened=pl.col("read_id").min())
    runs = pairs.filter("is_last").select("group", "read", "run").drop_nulls().unique()
    of_all = runs.group_by("group", "read").agg(in_runs=pl.len().cast(pl.Int64))
    random = pairs.filter(read="random").select("group", "model", in_random=True).unique()
    table = (
        known.join(mine, on=["group", "series"], how="left")
        .join(of_all, on=["group", "read"], how="left")
        .join(runs.with_columns(own=1), on=["group", "read", "run"], how="left")
        .join(random, on=["group", "model"], how="left")
    )
    runs_beside = pl.when(pl.col("run").is_not_null()).then("in_runs").fill_null(0) - pl.col("own").fill_null(0)
    return table.select(
        "direction", "opened", pl.col("in_checkpoints").fill_null(0), in_runs=runs_beside,
        in_random=pl.col("in_random").fill_null(False),
    )  # fmt: skip


def _sets(known: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Each set's coordinates at its place, a row for each; and the set of each read there."""
    there = known.select(*PLACE, "read_id", "coordinates").explode("coordinates").drop_nulls().unique()
    of_read = there.group_by(*PLACE, "read_id").agg(pl.col("coordinates").sort())
    of_read = of_read.with_columns(_number(of_read, [*PLACE, _as_text("coordinates")], "set"))
    sets = of_read.unique("set").select(*PLACE, "set", "coordinates").explode("coordinates")
    return sets, of_read.select("set", "read_id")


def _groups(known: pl.DataFrame, sets: pl.DataFrame) -> pl.DataFrame:
    """`pattern`, its `group`, and the `sets` that have it."""
    patterns = known.unique("pattern").select(
        "pattern", *PLACE, "coordinates", "weights", total=pl.col("weights").list.sum()
    )
    places = [*PLACE, "coordinates"]
    met = patterns.select("pattern", *places).explode("coordinates")
    met = met.join(sets.group_by(places).agg(pairs=pl.len()), on=places).group_by("pattern").agg(pl.sum("pairs"))
    hits = [
        some.explode("coordinates", "weights")
        .join(sets, on=places)
        .group_by("pattern", "set")
        .agg(pl.col("weights").sum(), pl.col("total").first())
        .filter(pl.col("weights") >= _SAME * pl.col("total"))
        .group_by("pattern")
        .agg(sets=pl.col("set").sort())
        for some in _cut(patterns.join(met, on="pattern"))
    ]
    found = pl.concat(hits)
    return found.with_columns(_number(found, [_as_text("sets")], "group"))


def _as_text(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.List(pl.String)).list.join(" ", ignore_nulls=False)


def _number(frame: pl.DataFrame, by: Sequence[str | pl.Expr], name: str) -> pl.Series:
    """A number for each row, the same where all of `by` are, null like any other value."""
    keys = frame.select(pl.struct(by)).to_series()
    return keys.rank("dense").alias(name) if len(frame) else pl.Series(name, [], pl.UInt32)


def _cut(frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The frame in pieces, one at least, each of about so many `pairs` as are taken at a time.

    Raises:
        ResultsError: there are more than any result set of ours comes to.
    """
    total = int(frame["pairs"].sum())
    if total > _MOST_PAIRS:
        raise ResultsError(
            f"{len(frame):,} different dead directions in {total:,} pairs with a read that may have it, compared up to "
            f"{_MOST_PAIRS:,}; give a result set of fewer reads"
        )
    piece = frame["pairs"].cum_sum() // _PAIRS
    yield from frame.with_columns(piece=piece).partition_by("piece", include_key=False) if len(frame) else [frame]
