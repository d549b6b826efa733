"""Which reads speak for a model: one random and one trained read a line, a line being (model, protocol, dtype).

Depths are compared only at equal protocol and precision, so a model read under two protocols has two lines. The hash
of the protocol is no part of it: the hashes of a model's random and trained reads differ by construction.
"""

import re

import polars as pl

from deadbench.analysis.results import latest

LINE = ["model", "protocol", "dtype"]


def forward_lines(reads: pl.LazyFrame, *, each_seed: bool = False) -> pl.LazyFrame:
    """Of each line at most two rows: its newest random read, and its trained read at the last checkpoint.

    The last checkpoint has the largest `checkpoint_step`; a null step counts as the only checkpoint. Reads that
    failed do not speak. With `each_seed` two rows for every seed.
    """
    forward = ok_reads(reads).filter(pl.col("read").is_in(["random", "trained"]))
    return last(forward, [*LINE, "read", *(["seed"] if each_seed else [])])


def best_lines(reads: pl.LazyFrame) -> pl.LazyFrame:
    """One row a line: the trained read of `forward_lines` if there is one, else the random read."""
    trained_first = forward_lines(reads).sort(pl.col("read") == "trained", descending=True, maintain_order=True)
    return trained_first.unique(LINE, keep="first", maintain_order=True)


def parameter_reads(reads: pl.LazyFrame) -> pl.LazyFrame:
    """Every ok read of parameters, one a checkpoint."""
    return last(ok_reads(reads).filter(pl.col("read") == "parameters"), ["model", "protocol", "revision"])


def parameter_lines(reads: pl.LazyFrame) -> pl.LazyFrame:
    """For (model, protocol) without any forward read: the read of parameters at the last checkpoint."""
    parameters = last(parameter_reads(reads), ["model", "protocol"])
    return _without(parameters, forward_lines(reads))


def failed_lines(reads: pl.LazyFrame) -> pl.LazyFrame:
    """For (model, protocol) of which nothing but failures exists: the newest failure."""
    newest = failed_reads(reads).unique(["model", "protocol"], keep="first", maintain_order=True)
    return _without(newest, ok_reads(reads))


def failed_reads(reads: pl.LazyFrame) -> pl.LazyFrame:
    """Reads that never came to an ok row, newest first."""
    failed = latest(reads).filter(pl.col("status").ne_missing("ok"))
    return failed.sort("finished_at", descending=True, nulls_last=True, maintain_order=True)


def ok_reads(reads: pl.LazyFrame) -> pl.LazyFrame:
    """The newest ok row of every key."""
    return latest(reads).filter(pl.col("status") == "ok")


def last(reads: pl.LazyFrame, by: list[str]) -> pl.LazyFrame:
    """One row for each `by`: that of the largest `checkpoint_step`, null being smallest, then the newest.

    Of checkpoints whose step is not known, the last in the natural order of their names.
    """
    unnamed = pl.when(pl.col("checkpoint_step").is_null()).then(in_natural_order("revision"))
    order = [pl.col("checkpoint_step"), unnamed, pl.col("finished_at")]
    newest_first = reads.sort(order, descending=True, nulls_last=True, maintain_order=True)
    return newest_first.unique(by, keep="first", maintain_order=True)


def distinct(names: pl.Series) -> list[str]:
    """The names of a column, sorted, each once; a stranger's row without one is none of them."""
    return names.drop_nulls().unique().sort().to_list()


def in_natural_order(column: str) -> pl.Expr:
    """What the names of `column` sort by when numbers in them count as numbers: checkpoint-2 before checkpoint-10."""
    return pl.col(column).map_batches(_sortable, return_dtype=pl.String)


def natural(name: str) -> str:
    """`name` with each number preceded by how many digits it has; whole at the end, so that 7 and 07 differ."""
    numbers = re.sub(r"[0-9]+", lambda match: f"{len(match[0].lstrip('0')):04}{match[0].lstrip('0')}", name)
    return f"{numbers}\0{name}"


def _sortable(names: pl.Series) -> pl.Series:
    distinct = names.drop_nulls().unique()
    keys = [natural(name) for name in distinct.to_list()]
    return names.cast(pl.String).replace_strict(distinct, keys, default=None, return_dtype=pl.String)


def _without(reads: pl.LazyFrame, others: pl.LazyFrame) -> pl.LazyFrame:
    return reads.join(others, on=["model", "protocol"], how="anti", nulls_equal=True)
