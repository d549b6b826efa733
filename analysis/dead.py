"""The dead directions of a result set, one by one: where, how deep, of which kind, and what else has them.

Three kinds: `zero scale` (a norm's scale that is zero for all purposes, from the parameters), `output` (a direction of
the final norm's output below 1e-6 of the mean eigenvalue, from its spectrum) and `stream` (a direction of the residual
stream that a block collapsed). A direction is compared with others of its kind at the same site by its largest
coordinates: another read has it when 0.9 of their weight lies on the coordinates of the directions found there. One
that is spread thin, with less than half of its weight on its sixteen largest coordinates, cannot be compared so: null.
"""

import polars as pl

from deadbench.analysis.lines import in_natural_order, ok_reads
from deadbench.analysis.results import collected
from deadbench.analysis.shared_directions import shared
from deadbench.suite.schema import KEY
from deadbench.suite.spectra.directions import FLOAT64_EPS

VERDICTS = ("algebraic", "learned", "rounding", "collapsed")
COLUMNS = [
    "model", "revision", "checkpoint_step", "read", "seed", "kind", "site", "verdict", "coordinates", "weights",
    "depth", "at_random", "opened_step", "opened_revision", "in_checkpoints", "num_checkpoints", "in_runs", "num_runs",
]  # fmt: skip
_SERIES = ["model", "read", "seed", "protocol", "dtype", "engine"]  # whose members differ in the checkpoint alone
_ARCHITECTURE = ["family", "final_norm", "hidden_size", "num_blocks", "num_parameters"]
_TOLD = 0.5  # of the direction's own weight


def dead_directions(
    reads: pl.LazyFrame, norms: pl.LazyFrame, spectra: pl.LazyFrame, blocks: pl.LazyFrame, *, every: bool = False
) -> pl.DataFrame:
    """Every dead direction of each series' last checkpoint, or of `every` checkpoint, deepest first within a model.

    `depth` in decades: of a zero scale `log10(mean gamma^2 / gamma_i^2)`, of an output direction `log10(mean eigenvalue
    / its own)`, of the stream `2 log10(median / smallest singular value)`; cut at what float64 resolves. `verdict`:
    a zero scale is learned, an output's direction what the read found, the stream's `collapsed`. `at_random`: a read of
    the model at random initialisation has it too; null where there is none.

    Of the `num_checkpoints` of its series `in_checkpoints` have it, first `opened_revision`. Of the `num_runs` other
    runs of the same architecture (models, and seeds of random initialisations), `in_runs` have it at their last
    checkpoint. All of these are null for a direction that is spread thin.
    """
    ok = collected(_ok(reads))
    lazy = ok.lazy()
    parts = pl.concat([_zero_scales(lazy, norms), _outputs(lazy, spectra), _stream(lazy, blocks)])
    found = _without_zero_scales(collected(parts)).with_row_index("direction")
    has = shared(found, ok)
    listed = found if every else found.filter("is_last")
    random = (
        ok.filter(read="random").group_by("model").agg(has_random=pl.lit(True), zeros=pl.col("num_zero_scales").max())
    )
    table = listed.join(has, on="direction", how="left").join(random, on="model", how="left")
    # Random reads list no scales; they count those of the final norm.
    by_count = pl.when((pl.col("site") == pl.col("final_norm")) & (pl.col("zeros") == 0)).then(False)
    told = pl.col("weights").list.sum() >= _TOLD
    comparison = COLUMNS[COLUMNS.index("opened_step") :]
    table = table.with_columns(
        at_random=pl.when(pl.col("kind") == "zero scale").then(by_count).when(told & pl.col("has_random"))
        .then(pl.col("in_random").fill_null(False)),
    ).with_columns(pl.when(told).then(pl.col(name)) for name in comparison)  # fmt: skip
    order = [pl.col("model", "read", "seed", "checkpoint_step"), in_natural_order("revision"), -pl.col("depth")]
    return table.sort(order, nulls_last=True).select(COLUMNS)


def _ok(reads: pl.LazyFrame) -> pl.LazyFrame:
    """Ok reads with what is needed of them: their architecture as one text, and whether they end their series."""
    parts = [pl.col(name).cast(pl.String).fill_null("-") for name in _ARCHITECTURE]
    ok = ok_reads(reads).filter(pl.col("read") != "functional").select(
        "run_id", *KEY, "protocol", "dtype", "checkpoint_step", *_ARCHITECTURE, "num_zero_scales", "lambda_mean",
        "depth_limit", architecture=pl.concat_str(parts, separator=" "),
        # What was trained is one run whatever the seed of its inputs.
        run=pl.concat_str(pl.col("model"), pl.when(pl.col("read") == "random").then(pl.col("seed")).otherwise(0)),
    )  # fmt: skip
    ordered = ok.sort("checkpoint_step", in_natural_order("revision"), nulls_last=False, maintain_order=True)
    return ordered.with_row_index("read_id").with_columns(  # which is the order of training within a series
        is_last=pl.col("read_id") == pl.col("read_id").max().over(_SERIES),
        num_checkpoints=pl.len().over(_SERIES).cast(pl.Int64),
        num_runs=pl.col("run").n_unique().over("architecture", "read").cast(pl.Int64) - 1,
    )


def _directions(frame: pl.LazyFrame, kind: str, depth: pl.Expr) -> pl.LazyFrame:
    limit = pl.coalesce("depth_limit", -(FLOAT64_EPS**2 * pl.col("hidden_size")).log10())
    cut = pl.when(depth.is_infinite()).then(limit).otherwise(pl.min_horizontal(depth, limit))
    columns = ["read_id", *COLUMNS[:5], "protocol", "dtype", "final_norm", "architecture", "run", "is_last"]
    return frame.drop_nulls(["coordinates", "weights"]).select(
        *columns, "num_checkpoints", "num_runs", "site", "verdict", kind=pl.lit(kind), depth=cut,
        coordinates=pl.col("coordinates").cast(pl.List(pl.Int64)), weights=pl.col("weights").cast(pl.List(pl.Float64)),
    )  # fmt: skip


def _zero_scales(ok: pl.LazyFrame, norms: pl.LazyFrame) -> pl.LazyFrame:
    told = norms.drop_nulls(["zero_coordinates", "zero_scales"]).filter(pl.col("num_zero_scales") > 0)
    listed = told.explode("zero_coordinates", "zero_scales").drop_nulls(["zero_coordinates", "zero_scales"])
    found = listed.join(ok.drop("family", "num_zero_scales"), on=[*KEY, "run_id"], nulls_equal=True).with_columns(
        site=pl.col("norm"), verdict=pl.lit("learned"), coordinates=pl.concat_list("zero_coordinates"),
        weights=pl.concat_list(pl.lit(1.0)),
    )  # fmt: skip
    return _directions(found, "zero scale", (pl.col("scale_mean_square") / pl.col("zero_scales").pow(2)).log10())


def _outputs(ok: pl.LazyFrame, spectra: pl.LazyFrame) -> pl.LazyFrame:
    final = spectra.filter((pl.col("site") == "final_norm") & (pl.col("verdicts").list.len() > 0)).drop("site")
    count = pl.col("verdicts").list.len()
    known = final.filter(
        pl.col("dead_coordinates").list.len() == count,
        pl.col("dead_weights").list.len() == count,
        pl.col("eigenvalues").list.len() >= count,
    )
    bottom = pl.col("eigenvalues").list.reverse().list.head(count)
    each = known.with_columns(eigenvalue=bottom).drop("eigenvalues").explode(
        "verdicts", "dead_coordinates", "dead_weights", "eigenvalue"
    )  # fmt: skip
    found = each.join(ok, on=[*KEY, "run_id"], nulls_equal=True).with_columns(
        site=pl.col("final_norm"), verdict=pl.col("verdicts"), coordinates=pl.col("dead_coordinates"),
        weights=pl.col("dead_weights"),
    )  # fmt: skip
    eigenvalue = pl.max_horizontal(pl.col("eigenvalue"), 0.0)
    return _directions(found, "output", (pl.col("lambda_mean") / eigenvalue).log10())


def _stream(ok: pl.LazyFrame, blocks: pl.LazyFrame) -> pl.LazyFrame:
    found = blocks.filter(pl.col("state") == "collapsed").join(ok, on=[*KEY, "run_id"], nulls_equal=True).with_columns(
        site=pl.format("block {}", "block"), verdict=pl.lit("collapsed"), coordinates=pl.col("bottom_coordinates"),
        weights=pl.col("bottom_weights"),
    )  # fmt: skip
    return _directions(found, "stream", 2 * (pl.col("sigma_median") / pl.col("sigma_min")).log10())


def _without_zero_scales(found: pl.DataFrame) -> pl.DataFrame:
    """Less the output directions that lie on the final norm's zero scales: these are listed already, one by one."""
    found = found.with_row_index("place")
    zeros = found.filter(kind="zero scale").select("model", "revision", "site", "coordinates").explode("coordinates")
    pieces = found.filter(kind="output").explode("coordinates", "weights")
    on = ["model", "revision", "site", "coordinates"]
    twice = pieces.join(zeros.unique(), on=on, how="semi", nulls_equal=True)
    known = twice.filter(pl.col("weights").sum().over("place") > _TOLD).filter(pl.col("read") == "trained")
    return found.join(known, on="place", how="anti").drop("place")
