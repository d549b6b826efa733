"""How a model's dead directions move and open in training: v from checkpoint to checkpoint, and what died when."""

import numpy as np
import polars as pl
from jaxtyping import Float

from deadbench.analysis.lines import last, ok_reads
from deadbench.analysis.replicates import in_series
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
        model: its name, or that of a series of models that differ in a training seed.
        reads: the table; of it, and of `norms`, the reads of parameters.
        norms: the table.
        dead: `analysis/dead.py`'s dead directions of every checkpoint.

    `angle` is in degrees from the checkpoint before to this one, `angle_from_first` from the first, the mean over the
    training seeds; null where the parameters of either were not read. `opened` are the learned and collapsed directions
    that were found here first, by site and largest coordinates; at the first checkpoint, all that it has.
    """
    is_ours = (pl.col("model") == model) | (pl.col("series") == model)
    ours = in_series(ok_reads(reads)).filter(is_ours)
    parameters = last(ours.filter(pl.col("read") == "parameters"), ["member", "revision"])
    final = norms.filter(pl.col("direction").is_not_null()).join(
        parameters.select(*KEY, "run_id", "member", "series_revision"), on=[*KEY, "run_id"], nulls_equal=True
    )
    found = collected(final.select("member", "series_revision", "direction"))
    directions: dict[str, dict[str | None, Float[np.ndarray, " D"]]] = {}
    for member, revision, direction_D in found.iter_rows():
        directions.setdefault(member, {})[revision] = np.array(direction_D, np.float64)
    angles = []
    for _, line in series.group_by(_LINE, maintain_order=True):
        alongs = [[of_member.get(revision) for revision in line["revision"]] for of_member in directions.values()]
        for place in range(len(line)):
            steps = [between(along[place - 1] if place else None, along[place]) for along in alongs]
            angles.append((_mean(steps), _mean([between(along[0], along[place]) for along in alongs])))
    turned = pl.DataFrame(angles, schema={"angle": pl.Float64, "angle_from_first": pl.Float64}, orient="row")
    ordered = pl.concat([line for _, line in series.group_by(_LINE, maintain_order=True)])
    table = pl.concat([ordered, turned], how="horizontal").join(
        _openings(dead, collected(ours.select("model", "revision", "series_revision").unique())),
        on="revision",
        how="left",
        maintain_order="left",
    )
    return table.select(
        "checkpoint_step", "revision", "angle", "angle_from_first", *_SHOWN, "opened", "protocol", "dtype"
    )


def between(a_D: Float[np.ndarray, " D"] | None, b_D: Float[np.ndarray, " D"] | None) -> float | None:
    """Degrees between two directions; None where one is not known, or a stranger's that is of another width."""
    if a_D is None or b_D is None or a_D.shape != b_D.shape:
        return None
    turned = angle(a_D, b_D)
    return turned if np.isfinite(turned) else None


def _mean(angles: list[float | None]) -> float | None:
    known = [angle for angle in angles if angle is not None]
    return sum(known) / len(known) if known else None


def _openings(dead: pl.DataFrame, ours: pl.DataFrame) -> pl.DataFrame:
    """`opened` by revision, of the checkpoints `ours`: `site: coordinates`, each once."""
    here = pl.col("opened_revision") == pl.col("revision")
    ours = (
        dead.filter(here, pl.col("read") != "random", pl.col("verdict").is_in(["learned", "collapsed"]))
        .join(ours, on=["model", "revision"], nulls_equal=True)
        .with_columns(revision="series_revision")
    )
    places = pl.format("{}: {}", "site", pl.col("coordinates").list.eval(pl.element().cast(pl.String)).list.join(", "))
    return ours.group_by("revision").agg(opened=places.unique().sort())
