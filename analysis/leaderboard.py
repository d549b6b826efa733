"""The leaderboard: models by the depth of their dead direction, like protocols and precisions together."""

import polars as pl

from deadbench.analysis.lines import LINE, failed_lines, last, parameter_lines, parameter_reads
from deadbench.analysis.replicates import averaged, in_series, series_lines
from deadbench.analysis.results import ResultsError, collected
from deadbench.suite.schema import READS

FAMILIES = ("layernorm", "rmsnorm", "none", "other", "undetermined")

# Every column that the leaderboard shows, in order; what is not in the reads is computed below.
COLUMNS = [
    "rank",
    "model",
    "revision",
    "family",
    "objective",
    "read",
    "kernel",
    "depth",
    "depth_standard_error",
    "depth_spread",
    "depth_random",
    "depth_random_spread",
    "deepening",
    "depth_as_executed",
    "deepening_as_executed",
    "depth_predicted",
    "depth_exact",
    "kernel_exact",
    "precision_slope",
    "alignment",
    "containment",
    "num_dead_1e6",
    "num_algebraic",
    "num_learned",
    "num_rounding",
    "num_zero_scales",
    "dead_parameters",
    "dead_parameters_share",
    "num_parameters",
    "hidden_size",
    "num_blocks",
    "blocks_preserved",
    "worst_block",
    "worst_block_ratio",
    "blocks_nondecreasing",
    "num_seeds",
    "num_replicates",
    "input",
    "protocol",
    "dtype",
    "status",
    "error",
]
SORTABLE = [
    "depth",
    "depth_random",
    "deepening",
    "depth_as_executed",
    "deepening_as_executed",
    "depth_predicted",
    "depth_exact",
    "alignment",
    "containment",
    "num_dead_1e6",
    "num_algebraic",
    "num_learned",
    "num_zero_scales",
    "dead_parameters",
    "dead_parameters_share",
    "num_parameters",
    "hidden_size",
    "worst_block_ratio",
]
GROUP = ["protocol", "dtype"]
_READ = [column.name for column in READS if column.name in {*COLUMNS, "kernel_exact", "num_zero_scales"}]
# A zero scale makes these large, and no kernel does: they rank kernels alone.
_OF_THE_KERNEL = (
    "depth", "depth_exact", "depth_predicted", "deepening", "depth_as_executed", "deepening_as_executed",
)  # fmt: skip
_DEAD = 6  # decades from which a direction that no kernel explains is dead, as where dead directions are counted


def leaderboard(reads: pl.LazyFrame, *, sort: str = "depth", family: str | None = None) -> pl.DataFrame:
    """One line per (model, protocol, dtype): its trained read at the last checkpoint, else its random read.

    Reads that differ in a seed alone, of the protocol or of training, are one line (`analysis/replicates.py`): the mean
    over `num_replicates`. `depth = log10(lambda_mean / lambda_v)` in decades, `depth_standard_error` from the sample of
    tokens, `depth_spread` the standard deviation over the replicates, null for one. `depth_random` is that of the same
    model, protocol and dtype at random initialisation, the mean over `num_seeds` seeds, and `depth_random_spread` their
    standard deviation, null for one; `deepening = depth - depth_random` where the line is a trained read,
    `deepening_as_executed` that of the outputs in the precision that the model ran in, which is `dtype`. The family is
    what the read found the norm to do, not what the registry expects. `dead_parameters` and their share of all
    parameters are counted at the line's own parameters: beside a trained read, by the read of parameters of the same
    checkpoint.

    `kernel` says what the depth is of: algebraic (the kernel of a LayerNorm, which rounding alone fills), learned (zero
    scales, or another direction that training closed), none (nothing is dead along the inverse scales), null where no
    read tells. Learned directions are as deep as a scale is small, which says nothing of a kernel: they have no rank by
    depth, and are listed below their group.

    `rank` counts within a (protocol, dtype) group, largest `sort` first; equal values share the smaller rank, a missing
    value has none and comes last. `sort="model"` lists a group by name and ranks by depth. Groups with more ranked
    models come first. Models with a read of parameters only have a line without a depth; models of which only failed
    reads exist end the list with their error.

    Raises:
        ResultsError: `sort` or `family` is unknown.
    """
    if sort != "model" and sort not in SORTABLE:
        raise ResultsError(f"--sort {sort!r} is unknown; choose {', '.join([*SORTABLE, 'model'])}")
    if family is not None and family not in FAMILIES:
        raise ResultsError(f"--family {family!r} is unknown; choose {', '.join(FAMILIES)}")

    forward = series_lines(reads, _READ)
    random = forward.filter(pl.col("read") == "random").select(
        *LINE,
        depth_random="depth",
        depth_random_spread="depth_spread",
        executed_random="depth_as_executed",
        num_seeds="num_replicates",
    )
    trained_first = forward.sort(pl.col("read") == "trained", descending=True, maintain_order=True)
    best = trained_first.unique(LINE, keep="first", maintain_order=True)
    parameters = averaged(in_series(parameter_lines(reads)), [*LINE, "read"], _READ)
    read = pl.concat([best, parameters, failed_lines(reads).select(_READ)], how="diagonal")
    is_trained = pl.col("read") == "trained"
    lines = read.join(random, on=LINE, how="left", nulls_equal=True, maintain_order="left").with_columns(
        deepening=pl.when(is_trained).then(pl.col("depth") - pl.col("depth_random")),
        deepening_as_executed=pl.when(is_trained).then(pl.col("depth_as_executed") - pl.col("executed_random")),
    )
    # Which parameters are dead a trained read does not say; that of the same checkpoint's parameters does.
    census = ["dead_parameters", "dead_parameters_share"]
    counted = averaged(in_series(last(parameter_reads(reads), ["model", "revision"])), ["model", "revision"], census)
    counted = counted.select("model", "revision", *census)
    lines = lines.join(counted, on=["model", "revision"], how="left", nulls_equal=True, suffix="_counted")
    lines = lines.with_columns(
        pl.coalesce(name, pl.when(pl.col("read") != "random").then(pl.col(f"{name}_counted"))) for name in census
    )
    if family is not None:
        lines = lines.filter(pl.col("family") == family)
    ranked_by = "depth" if sort == "model" else sort
    lines = lines.with_columns(kernel=_KERNEL)
    is_ranked = pl.col("kernel").ne_missing("learned") | pl.lit(ranked_by not in _OF_THE_KERNEL)
    ranked = pl.when(is_ranked).then(pl.col(ranked_by))
    lines = lines.with_columns(rank=ranked.rank("min", descending=True).over(GROUP).cast(pl.Int64))
    return collected(_ordered(lines, sort).select(COLUMNS))


_ZEROS = pl.col("num_zero_scales").fill_null(0) > 0
_KERNEL = (
    pl.when(_ZEROS | (~pl.col("kernel_exact") & (pl.col("depth") >= _DEAD)))
    .then(pl.lit("learned"))
    .when("kernel_exact")
    .then(pl.lit("algebraic"))
    .when(~pl.col("kernel_exact"))
    .then(pl.lit("none"))
)


def _ordered(lines: pl.LazyFrame, sort: str) -> pl.LazyFrame:
    group_size = pl.col("rank").is_not_null().sum().over(GROUP)
    failed = pl.col("status").ne_missing("ok")
    order = [failed, -group_size.cast(pl.Int64), *map(pl.col, GROUP)]
    if sort != "model":
        apart = (pl.col("kernel") == "learned").fill_null(False) & (sort in _OF_THE_KERNEL)
        order += [apart, pl.col("rank"), pl.when(apart).then(-pl.col(sort))]
    return lines.sort([*order, pl.col("model")], nulls_last=True)
