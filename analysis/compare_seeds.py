"""A comparison over seeds: what several replicates of a read changed by in the mean, and how far they scatter."""

import polars as pl

from deadbench.analysis.compare import verdict_of
from deadbench.analysis.replicates import general_name
from deadbench.analysis.student import widened
from deadbench.suite.schema import READS

_IN_DECADES = [column.name for column in READS if column.unit == "decades"]


def compared_over_seeds(table: pl.DataFrame) -> pl.DataFrame:
    """A table of `compare` with one row for all the seeds, of a protocol or of a model's training, that were compared.

    `baseline` and `candidate` are means, geometric where magnitudes are compared by decades; `baseline_error` and
    `candidate_error` then the standard deviations over the seeds, null for geometric means. The change is the mean of
    the pairs', and its noise the standard error of that. Reads without a value on either side stay as they are.
    """
    is_magnitude = (pl.col("scale") == "decades") & ~pl.col("metric").is_in(_IN_DECADES)
    words = [name for name, dtype in table.schema.items() if dtype == pl.Categorical]
    place = ["series", "series_revision", "read", "engine", "metric", "scale", "protocol", "dtype"]
    told = pl.col("baseline").is_finite() & pl.col("candidate").is_finite() & pl.col("change").is_finite()
    rows = table.with_columns(pl.col(words).cast(pl.String)).with_columns(
        series=general_name("model"), series_revision=general_name("revision")
    )
    many = rows.filter(told).filter(pl.len().over(place) > 1)
    if many.is_empty():
        return table
    rest = rows.join(many, on=[*place, "model", "revision", "seed"], how="anti", nulls_equal=True)
    change, pairs = pl.col("change"), pl.len()
    means = many.group_by(place, maintain_order=True).agg(
        *(pl.when(is_magnitude.first()).then(pl.lit(10.0).pow(pl.col(side).log10().mean())).otherwise(pl.col(side).mean()).alias(side)
          for side in ("baseline", "candidate")),
        *(pl.when(~is_magnitude.first()).then(pl.col(side).std()).alias(f"{side}_error")
          for side in ("baseline", "candidate")),
        change=change.mean(), noise=change.std() / pairs.sqrt() * widened(pairs - 1), noise_from=pl.lit("seeds"),
        num_tokens=pl.col("num_tokens").sum(), num_noise_seeds=pairs.cast(pl.Int64), num_seeds=pairs,
        **{name: _in_common(name) for name in ("detail", "candidate_model", "candidate_revision")},
    ).rename({"series": "model", "series_revision": "revision"})  # fmt: skip
    means = means.with_columns(verdict=verdict_of("change", "noise").cast(pl.String)).cast({"num_seeds": pl.Int64})
    order = ["model", "read", "revision", "metric"]
    both = pl.concat([means, rest.drop("series", "series_revision")], how="diagonal")
    return both.select(*table.columns, "num_seeds").sort(order, nulls_last=True, maintain_order=True)


def _in_common(name: str) -> pl.Expr:
    known = pl.col(name).drop_nulls()
    return pl.when(known.n_unique() <= 1).then(known.first())
