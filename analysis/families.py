"""The comparison across normalisation families: each claim of `analysis/claims.py` as a row.

The reads offered to a claim are one row each of

- random: the newest read at random initialisation of each (model, protocol, dtype, seed),
- trained: its read at the last checkpoint, with the random reads' means beside it,
- parameters: every checkpoint's,
- functional: every checkpoint's, with the worst of its maps.

A model, here (model, protocol), holds a claim when all its tested reads do.
"""

import polars as pl

from deadbench.analysis.claims import CLAIMS, LOG_LAMBDA_V, LOG_LAMBDA_V_AS_EXECUTED, RANDOM_COLUMNS, TWIN, Claim
from deadbench.analysis.lines import LINE, forward_lines, last, ok_reads, parameter_reads
from deadbench.analysis.results import collected, collected_all, finite
from deadbench.suite.schema import KEY, arrow_schema

_DIGITS = 13
LEAST_STEP = 0.01  # of a functional read: below, a change of the outputs nears what rounding makes
SCHEMA = {
    "claim": pl.String,
    "statement": pl.String,
    "family": pl.String,
    "num_models": pl.Int64,
    "num_hold": pl.Int64,
    "holds": pl.Boolean,
    "value_median": pl.Float64,
    "value_low": pl.Float64,
    "value_high": pl.Float64,
    "value_min": pl.Float64,
    "value_max": pl.Float64,
    "value_margin": pl.Float64,
    "value_seed_spread": pl.Float64,
    "num_seeds": pl.Int64,
    "value_token_error": pl.Float64,
    "unit": pl.String,
    "threshold": pl.String,
    "failing": pl.List(pl.String),
}


def families(reads: pl.LazyFrame, functional: pl.LazyFrame | None = None) -> pl.DataFrame:
    """Each claim of `CLAIMS` as a row; those about moved parameters are tested where the table `functional` is given.

    `num_models` models (one per model and protocol) can be tested and `num_hold` of them hold; `holds` is true when
    all do, null when there is none; `failing` names those that do not. In `unit`:

    - `value_median` over the models, each with its mean over reads, and its 95 % interval `value_low` to `value_high`
      from the order statistics (no assumption on the distribution; null below six models, which cannot give one),
    - `value_min` and `value_max` over the reads; `value_margin`, the smallest distance of a read to the threshold,
      negative on the wrong side,
    - `value_seed_spread`, the standard deviation over seeds within a model, pooled over the models that were read with
      several; `num_seeds` is the largest number of seeds of a model. One seed has no spread: null.
    - `value_token_error`, the standard error of a value from the sample of tokens, by the reads' own bootstraps over
      sequences, pooled over the reads; null for values that have none.
    """
    if functional is None:
        functional = pl.LazyFrame(schema=pl.Schema(arrow_schema("functional")))
    offered = pl.concat(collected_all([_offered(reads), _moved(reads, functional)]), how="diagonal").lazy()
    return pl.concat(collected_all([_judged(claim_id, claim, offered) for claim_id, claim in CLAIMS.items()]))


def confusion(reads: pl.LazyFrame) -> pl.DataFrame:
    """Classification from parameters: a row for each family that the registry expects, a column for each found.

    Counts are of models; a model whose checkpoints are told differently counts once in each column.
    """
    told = parameter_reads(reads).filter(pl.col("family_expected").is_not_null())
    pairs = collected(told.select("model", "family_expected", "family").unique())
    if pairs.is_empty():
        return pl.DataFrame(schema={"expected": pl.String})
    table = pairs.pivot("family", index="family_expected", values="model", aggregate_function="len", sort_columns=True)
    return table.rename({"family_expected": "expected"}).sort("expected").fill_null(0)


def collapsed_blocks(reads: pl.LazyFrame, blocks: pl.LazyFrame) -> pl.DataFrame:
    """The exceptions to "preserved block to block": each collapsed block of the reads that speak for a model.

    With the bottom direction's largest coordinates and their squared weights, and over how many coordinates it is
    spread (`participation`).
    """
    speaking = forward_lines(reads, each_seed=True).select(*KEY, "run_id", "protocol", "dtype", "num_blocks")
    columns = [
        "block",
        "state",
        "ratio",
        "collapse_below",
        "sigma_min",
        "bottom_coordinates",
        "bottom_weights",
        "participation",
    ]
    found = blocks.filter(pl.col("state") == "collapsed").join(speaking, on=[*KEY, "run_id"], nulls_equal=True)
    return collected(found.select("model", "read", "revision", "num_blocks", *columns).sort("model", "read", "block"))


def _offered(reads: pl.LazyFrame) -> pl.LazyFrame:
    forward = forward_lines(reads, each_seed=True).with_columns(
        log_lambda_v=LOG_LAMBDA_V, log_lambda_v_as_executed=LOG_LAMBDA_V_AS_EXECUTED
    )
    random = forward.filter(pl.col("read") == "random")
    beside = random.group_by(LINE).agg(pl.col(RANDOM_COLUMNS).mean().name.prefix("random_"))
    # The twin's depth at the same place, the mean over its seeds.
    place = ["twin", "protocol", "dtype", "read", "checkpoint_step"]
    named = forward.with_columns(twin=TWIN).with_columns(
        is_twin=(pl.col("twin") != pl.col("model")) & (pl.col("family") == "rmsnorm")
    )
    twins = (
        named.filter("is_twin").group_by(place).agg(pl.col("depth", "depth_standard_error").mean().name.prefix("twin_"))
    )
    joined = named.join(beside, on=LINE, how="left", nulls_equal=True).join(
        twins, on=place, how="left", nulls_equal=True
    )
    return pl.concat([joined, parameter_reads(reads)], how="diagonal")


def _moved(reads: pl.LazyFrame, functional: pl.LazyFrame) -> pl.LazyFrame:
    """Functional reads with the worst map's factors, `kept_still` and `moved`; see `analysis/claims.py`."""
    told = functional.unique([*KEY, "run_id", "site", "direction"]).group_by(*KEY, "run_id").agg(
        not_gauge=_counted(pl.col("verdict") != "gauge", pl.col("direction") == "compensated"),
        off_regular=(pl.col("kl_order") - 1).abs().filter(pl.col("direction") == "random").max(),
        unit_order=pl.col("kl_order").filter(pl.col("direction").str.starts_with("planted-")).min(),
    )  # fmt: skip
    functional = functional.filter(pl.col("step") >= LEAST_STEP)
    change = pl.coalesce("kl", pl.col("output_change").pow(2))
    place = [*KEY, "run_id", "site", "step"]
    control = functional.filter(pl.col("direction") == "random").select(*place, control=change)
    beside = functional.with_columns(change=change).join(control, on=place, nulls_equal=True)
    # Nothing at all moved: the factor is beyond float64, taken as the ratio to its smallest normal number.
    factor = (pl.col("control") / pl.max_horizontal("change", 1e-300)).log10()
    worst = beside.group_by(*KEY, "run_id").agg(
        kept_still=factor.filter(pl.col("direction") == "compensated").min(),
        moved=factor.filter(pl.col("direction") == "inverse-scale-rms").max(),
    )
    ok = last(ok_reads(reads).filter(pl.col("read") == "functional"), ["model", "protocol", "revision"])
    beside = worst.join(told, on=[*KEY, "run_id"], how="left", nulls_equal=True)
    return ok.join(beside, on=[*KEY, "run_id"], how="left", nulls_equal=True)


def _counted(condition: pl.Expr, among: pl.Expr) -> pl.Expr:
    """How many of those `among` hold; null where of none it is known."""
    known = condition.filter(among).drop_nulls()
    return pl.when(known.len() > 0).then(known.sum().cast(pl.Int64))


def dead_parameters(reads: pl.LazyFrame) -> pl.DataFrame:
    """A row for each family: how many parameter directions are dead by construction, as a share of all parameters.

    Of each model the last checkpoint's parameters; a model that was only read at random initialisation counts there.
    """
    counted = ok_reads(reads).filter(
        pl.col("read").is_in(["parameters", "random"]) & pl.col("dead_parameters").is_not_null()
    )
    trained_first = last(counted, ["model", "read"]).sort("read", maintain_order=True)
    share = pl.col("dead_parameters_share")
    table = trained_first.unique("model", keep="first").group_by("family").agg(
        num_models=pl.len().cast(pl.Int64), dead_parameters=pl.col("dead_parameters").sum(),
        num_parameters=pl.col("num_parameters").sum(), dead_parameters_share_min=share.min(),
        dead_parameters_share_median=share.median(), dead_parameters_share_max=share.max(),
    )  # fmt: skip
    return collected(table.sort("family"))


def _judged(claim_id: str, claim: Claim, offered: pl.LazyFrame) -> pl.LazyFrame:
    asked = offered.filter(pl.col("read").is_in(claim.reads))
    if claim.family != "any":
        asked = asked.filter(pl.col("family") == claim.family)
    numbers = {name: getattr(claim, name).cast(pl.Float64) for name in ("value", "margin", "error")}
    which = [*LINE, "read", "revision", "seed"]
    tested = finite(asked.select(*which, holds=claim.holds, **numbers)).drop_nulls("holds")
    by_seed = tested.with_columns(variance=pl.col("value").var().over(*LINE, "read", "revision"))
    by_model = by_seed.group_by("model", "protocol").agg(
        pl.col("holds").all(),
        pl.col("value").mean(),
        pl.col("variance").mean(),
        (pl.col("error") ** 2).mean(),
        low=pl.col("value").min(),
        high=pl.col("value").max(),
        margin=pl.col("margin").min(),
        seeds=pl.col("seed").n_unique(),
    )
    known = pl.col("value").drop_nulls().sort()
    place = _interval_place(known.len())
    summary = by_model.select(
        num_models=pl.len().cast(pl.Int64),
        num_hold=pl.col("holds").sum().cast(pl.Int64),
        holds=pl.when(pl.len() > 0).then(pl.col("holds").all()),
        value_median=known.median(),
        value_low=known.get(place, null_on_oob=True),
        value_high=known.get(known.len().cast(pl.Int64) - 1 - place, null_on_oob=True),
        value_min=pl.col("low").min(),
        value_max=pl.col("high").max(),
        value_margin=pl.col("margin").min(),
        value_seed_spread=pl.col("variance").mean().sqrt(),
        num_seeds=pl.col("seeds").max().cast(pl.Int64),
        value_token_error=pl.col("error").mean().sqrt(),
        failing=pl.col("model").filter(~pl.col("holds")).unique().sort().implode(),
    )
    facts = {"claim": claim_id, **claim._asdict(), "unit": claim.unit or None}
    texts = [pl.lit(facts[name], dtype=pl.String).alias(name) for name in SCHEMA if name in facts and name != "holds"]
    # The order of a sum decides the last digits, and threads the order.
    digits = pl.selectors.float().round_sig_figs(_DIGITS)
    return summary.with_columns(texts).with_columns(digits).select(list(SCHEMA))


def _interval_place(count: pl.Expr) -> pl.Expr:
    """Index, from either end of `count` sorted values, of the median's 95 % interval; null where there is none.

    The place of the binomial(count, 1/2)'s 2.5 % point by the normal approximation, checked against the exact one in
    the tests. Conover, Practical Nonparametric Statistics, 3.2.
    """
    number = count.cast(pl.Float64)
    rank = (number / 2 - 0.98 * number.sqrt() + 0.5).floor().cast(pl.Int64)
    return pl.when(rank >= 1).then(rank - 1)
