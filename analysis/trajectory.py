"""How a model's dead directions move and open in training: v from checkpoint to checkpoint, and what died when."""

import numpy as np
import polars as pl
from jaxtyping import Float

from deadbench.analysis.lines import last, ok_reads
from deadbench.analysis.results import collected
from deadbench.suite.schema import KEY

_LINE = ["protocol", "dtype", "seed"]
_SHOWN = ["depth_predicted", "depth", "num_zero_scales", "num_dead_1e6", "num_learned"]


def angle(a_D: Float[np.ndarray, " D"], b_D: Float[np.ndarray, " D"]) -> float:
    """Degrees between the lines of two unit vectors, 0 to 90; accurate for small angles, where the cosine is not.

    Example:
        >>> f"{angle(np.array([1.0, 0.0]), np.array([-1.0, 1e-9])):.3e}"
        '5.730e-08'
    """
    nearer_D = b_D if a_D @ b_D >= 0 else -b_D
    return float(np.degrees(2 * np.arctan2(np.linalg.norm(a_D - nearer_D), np.linalg.norm(a_D + nearer_D))))


def trajectory(
    series: pl.DataFrame, model: str, reads: pl.LazyFrame, norms: pl.LazyFrame, dead: pl.DataFrame
) -> pl.DataFrame:
    """The checkpoints of `model` in training order: where v points, how deep it is, what is dead, what opened.

    Args:
        series: its checkpoints, as `analysis/trend.py` gives them.
        model: its name.
        reads: the table; of it, and of `norms`, the reads of parameters.
        norms: the table.
        dead: `analysis/dead.py`'s dead directions of every checkpoint.

    `angle` is in degrees from the checkpoint before to this one, `angle_from_first` from the first; null where the
    parameters of either were not read. `opened` are the learned and collapsed directions that were found here first,
    by site and largest coordinates; at the first checkpoint, all that it has.
    """
    is_ours = (pl.col("read") == "parameters") & (pl.col("model") == model)
    parameters = last(ok_reads(reads).filter(is_ours), ["revision"]).select(*KEY, "run_id")
    final = norms.filter(pl.col("direction").is_not_null()).join(parameters, on=[*KEY, "run_id"], nulls_equal=True)
    found = collected(final.select("revision", "direction"))
    directions = {revision: np.array(direction_D) for revision, direction_D in found.iter_rows()}
    angles = []
    for _, line in series.group_by(_LINE, maintain_order=True):
        along = [directions.get(revision) for revision in line["revision"]]
        for place, v_D in enumerate(along):
            before = along[place - 1] if place else None
            angles.append((_between(before, v_D), _between(along[0], v_D)))
    turned = pl.DataFrame(angles, schema={"angle": pl.Float64, "angle_from_first": pl.Float64}, orient="row")
    ordered = pl.concat([line for _, line in series.group_by(_LINE, maintain_order=True)])
    table = pl.concat([ordered, turned], how="horizontal").join(
        _openings(dead, model), on="revision", how="left", maintain_order="left"
    )
    return table.select(
        "checkpoint_step", "revision", "angle", "angle_from_first", *_SHOWN, "opened", "protocol", "dtype"
    )


def _between(a_D: Float[np.ndarray, " D"] | None, b_D: Float[np.ndarray, " D"] | None) -> float | None:
    return None if a_D is None or b_D is None else angle(a_D, b_D)


def _openings(dead: pl.DataFrame, model: str) -> pl.DataFrame:
    """`opened` by revision: `site: coordinates`, each once."""
    here = pl.col("opened_revision") == pl.col("revision")
    ours = dead.filter(
        here, pl.col("model") == model, pl.col("read") != "random", pl.col("verdict").is_in(["learned", "collapsed"])
    )
    places = pl.format("{}: {}", "site", pl.col("coordinates").list.eval(pl.element().cast(pl.String)).list.join(", "))
    return ours.group_by("revision").agg(opened=places.unique().sort())
