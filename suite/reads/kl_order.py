"""The order in which outputs move along a direction of parameter space, and what that makes of the direction.

Along a direction the KL divergence of the outputs goes like `t^(2k)`. A regular direction has k = 1, the Fisher
information being its coefficient; where that vanishes k is larger, and where nothing ever moves there is no k. A hidden
unit whose weights in and out are zero, moved jointly, has k = 2, a chain of L zero factors k = L.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deadbench.suite.schema import Row
from deadbench.suite.spectra.directions import UNIT_ROUNDOFF

LEAST_STEPS = 6  # above rounding and below saturation, for an order to be told
# Relative change of the outputs that rounding alone may make, in units of u: up to 90 were seen along kernels.
ROUNDINGS = 512
SATURATION = 0.01  # nats, or squared relative change: from here on the next order counts
_REGULAR, _SINGULAR, _MOST_ERROR = (0.9, 1.1), 1.9, 0.05
_STRAIGHT = 0.01  # an error of k below which the steps are a power law to the last


class Order(NamedTuple):
    """`order` is k, with the standard error of its fit; both None where too few steps tell."""

    order: float | None
    error: float | None
    verdict: str


def order_of(steps: Sequence[float], divergences: Sequence[float], changes: Sequence[float], roundoff: float) -> Order:
    """k of one direction, half the slope of log divergence on log step by least squares, and the verdict.

    gauge: at every step the outputs move by rounding alone. regular: k is 1 to a tenth. singular: k is 1.9 at least.
    unresolved: fewer than six steps lie between rounding and saturation, they are no power law, or k is another.

    Saturation comes sooner where outputs are nearly uniform, of which no divergence is large: while the steps bend, the
    largest is left out, as long as six are left.

    Args:
        steps: t, eight or more.
        divergences: KL in nats, or where there are no logits the squared relative change of the outputs.
        changes: relative change of the outputs, which rounding is told by.
        roundoff: u of the dtype that they were computed in.

    Example:
        >>> t = [10 ** (-n / 2) for n in range(8)]
        >>> order_of(t, [1e-3 * e**4 for e in t], [0.1 * e**2 for e in t], 2.0**-53)
        Order(order=2.0, error=0.0, verdict='singular')
    """
    floor = ROUNDINGS * roundoff
    if all(change <= floor for change in changes):
        return Order(None, None, "gauge")
    told = [
        (math.log(step), math.log(divergence))
        for step, divergence, change in zip(steps, divergences, changes, strict=True)
        if change > floor and 0 < divergence < SATURATION
    ]
    if len(told) < LEAST_STEPS:
        return Order(None, None, "unresolved")
    told.sort()
    order, error = _fit(told)
    while error > _STRAIGHT and len(told) > LEAST_STEPS:
        told.pop()
        order, error = _fit(told)
    verdict = "unresolved"
    if error <= _MOST_ERROR and _REGULAR[0] <= order <= _REGULAR[1]:
        verdict = "regular"
    elif error <= _MOST_ERROR and order >= _SINGULAR:
        verdict = "singular"
    return Order(order, error, verdict)


def _fit(told: list[tuple[float, float]]) -> tuple[float, float]:
    """Half the slope of log divergence on log step, and its standard error."""
    x, y = np.array(told).T
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    residual = y - y.mean() - slope * centred
    error = math.sqrt(float(residual @ residual) / (len(x) - 2) / float(centred @ centred)) / 2
    return round(slope / 2, 12), round(error, 12)


def with_orders(rows: list[Row], roundoff: float) -> list[Row]:
    """The rows of one site, those of each direction with its order; a replayed head is in float64, whatever ran."""
    judged = {}
    for direction in dict.fromkeys(row["direction"] for row in rows):
        of = [row for row in rows if row["direction"] == direction]
        divergences = [row["output_change"] ** 2 if row["kl"] is None else row["kl"] for row in of]
        u = roundoff if of[0].get("fisher") is None else UNIT_ROUNDOFF["float64"]
        told = order_of([row["step"] for row in of], divergences, [row["output_change"] for row in of], u)
        judged[direction] = {"kl_order": told.order, "kl_order_error": told.error, "verdict": told.verdict}
    return [row | judged[row["direction"]] for row in rows]
