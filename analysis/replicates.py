"""Runs of one model that differ in a seed alone are replicates: one line, the mean over them and their spread.

A seed is that of a protocol (the column `seed`) or one of training, which a name tells: `pythia-160m-seed3`,
`multiberts-seed_0`, a revision `seed2-step1000`. Names that differ in that number alone, of the same architecture, are
one series, named with `seed*` in its place.
"""

import polars as pl

from deadbench.analysis.lines import LINE, last, ok_reads

_SEED = r"(?i)(^|[^a-z0-9])seed[-_=]?([0-9]+)($|[^a-z0-9])"
_ANY = "${1}seed*${3}"
_ARCHITECTURE = ["final_norm", "hidden_size", "num_blocks", "num_parameters"]


def general_name(name: str) -> pl.Expr:
    """Column `name` with `seed*` in the place of a seed."""
    return pl.col(name).str.replace_all(_SEED, _ANY)


def in_series(reads: pl.LazyFrame) -> pl.LazyFrame:
    """With `series` and `series_revision`: model and revision, with `seed*` where that names several trained alike.

    `member` is which of its series a row is of: its model, the seed in its revision, and the protocol's seed.
    """
    of_revision = pl.col("revision").str.extract(_SEED, 2)
    several = pl.col("model").n_unique().over(general_name("model"), *_ARCHITECTURE) > 1
    revisions = of_revision.n_unique().over("model") > 1
    return reads.with_columns(
        series=pl.when(several).then(general_name("model")).otherwise("model"),
        series_revision=pl.when(revisions).then(general_name("revision")).otherwise("revision"),
        member=pl.concat_str(pl.col("model", "seed"), of_revision, separator=" seed ", ignore_nulls=True),
    )


def series_lines(reads: pl.LazyFrame, columns: list[str]) -> pl.LazyFrame:
    """Of each line at most two rows, random and trained, as `forward_lines` has them; the mean over its replicates.

    A trained line is that of the last checkpoint, and of the replicates that came so far.
    """
    each = in_series(ok_reads(reads).filter(pl.col("read").is_in(["random", "trained"])))
    newest = last(each, [*LINE, "read", "member"])
    line = ["series", *LINE[1:], "read"]
    ended = newest.filter(pl.col("checkpoint_step").eq_missing(pl.col("checkpoint_step").max().over(line)))
    # At random initialisation the members of a series are one model: each seed of the protocol counts once.
    once = pl.when(pl.col("read") == "random").then(pl.col("seed").cast(pl.String)).otherwise("member")
    return averaged(ended.with_columns(member=once).unique([*line, "member"], keep="first"), [*LINE, "read"], columns)


def averaged(reads: pl.LazyFrame, by: list[str], columns: list[str]) -> pl.LazyFrame:
    """One row for each `by`, model and revision being the series'; of `columns` what its members have together.

    Of reals the mean and of counts the median; a flag holds where it does for all, a text is null where they differ.
    `depth_spread` is the standard deviation of their depths, null for one; `num_replicates` how many they are.
    """
    schema = reads.collect_schema()
    together = {name: _together(name, schema[name]) for name in columns if name not in by}
    named = reads.with_columns(model="series", revision="series_revision").sort("member")
    return named.group_by(by, maintain_order=True).agg(
        **together, depth_spread=pl.col("depth").std(), num_replicates=pl.col("member").n_unique().cast(pl.Int64)
    )


def _together(name: str, dtype: pl.DataType) -> pl.Expr:
    if dtype.is_float():
        return pl.col(name).mean()
    if dtype == pl.Boolean:
        return pl.col(name).cast(pl.Int8).min().cast(pl.Boolean)
    if dtype.is_integer() and name not in ("seed", "checkpoint_step"):
        return pl.col(name).median().round().cast(pl.Int64)
    known = pl.col(name).drop_nulls()
    return pl.when(known.n_unique() <= 1).then(known.first())
