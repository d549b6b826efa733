"""The noise of a difference where both sides read the same sequences: paired by sequence, from the table `samples`.

What makes a sequence deep on one side makes it deep on the other, so a difference scatters less than two independent
samples would. Each sequence's influence on log10 lambda_v and on the depth follows from its sums (the delta method;
Efron, Tibshirani 1993, 21.3). S sequences.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float
from numpy.typing import NDArray

from deadbench.analysis.results import collected_all
from deadbench.analysis.student import widening
from deadbench.suite.schema import KEY

LEAST_SEQUENCES = 8  # fewer say nothing of their spread
ROW = ["run_id", *KEY]  # what a row of `samples` is found by


class Samples(NamedTuple):
    """The table `samples` of either side of a comparison."""

    baseline: pl.LazyFrame
    candidate: pl.LazyFrame


class Influences(NamedTuple):
    """What each sequence of a read moves: its rows, and by how many decades its presence moves lambda_v and depth."""

    num_tokens_S: Float[NDArray[np.float64], " S"]
    lambda_v_S: Float[NDArray[np.float64], " S"]
    depth_S: Float[NDArray[np.float64], " S"]


def paired_noises(pairs: pl.DataFrame, samples: Samples) -> pl.DataFrame:
    """`paired_lambda_v` and `paired_depth` of each row of `pairs`: the noise of the difference, in decades.

    A pair has the `ROW` of either side, as `own_…` and `candidate_…`. Null where a side has no samples, where they are
    of other sequences, or where there are fewer than `LEAST_SEQUENCES`.
    """
    before, after = (dict(_read(frame)) for frame in collected_all(list(samples)))
    noises: list[tuple[float | None, float | None]] = []
    keys = (pairs.select([f"{side}_{name}" for name in ROW]).iter_rows() for side in ("own", "candidate"))
    for left, right in zip(*keys, strict=True):
        own, other = before.get(left), after.get(right)
        noises.append((None, None) if own is None or other is None else difference_noise(own, other))
    schema = {"paired_lambda_v": pl.Float64, "paired_depth": pl.Float64}
    return pl.DataFrame(noises, schema=schema, orient="row")


def difference_noise(baseline: Influences, candidate: Influences) -> tuple[float | None, float | None]:
    """Standard deviations, widened for few sequences, of the differences of log10 lambda_v and of depth; in decades."""
    count = len(baseline.num_tokens_S)
    if count < LEAST_SEQUENCES or not np.array_equal(baseline.num_tokens_S, candidate.num_tokens_S):
        return None, None
    scale = widening(count - 1) * math.sqrt(count / (count - 1))
    lambda_v, depth = (np.linalg.norm(candidate[place] - baseline[place]) for place in (1, 2))
    return scale * float(lambda_v), scale * float(depth)


def influences(sample: Mapping[str, Any]) -> Influences | None:
    """The influences of a row of `samples`; None where nothing varies along v, or something is not known."""
    names = ("num_tokens", "sum_along", "squares_along", "squares_total")
    if any(sample[name] is None for name in ("total_variance", *names)):
        return None
    n_S, sum_S, squares_S, total_S = (np.array(sample[name], dtype=np.float64) for name in names)
    rows = n_S.sum()
    if not ((n_S >= 0).all() and rows > 0):
        return None
    mean, second = sum_S.sum() / rows, squares_S.sum() / rows
    lambda_v, trace = second - mean**2, sample["total_variance"]
    if not (lambda_v > 0 and trace > 0):
        return None
    lambda_S = (squares_S - second * n_S - 2 * mean * (sum_S - mean * n_S)) / (rows * lambda_v * math.log(10))
    trace_S = (total_S - total_S.sum() / rows * n_S) / (rows * trace * math.log(10))
    return Influences(n_S, lambda_S, trace_S - lambda_S)


def _read(samples: pl.DataFrame) -> Iterator[tuple[tuple[Any, ...], Influences]]:
    for row in samples.iter_rows(named=True):
        each = influences(row)
        if each is not None:
            yield tuple(row[name] for name in ROW), each
