"""Student's t: how much wider an interval is where the standard deviation is known from few degrees of freedom."""

import math
from functools import lru_cache

import polars as pl

_LEVEL = 0.9772498680518208  # of two known standard deviations, one-sided: the normal distribution at 2
_MANY = 300  # degrees from which a half percent is left


@lru_cache
def widening(degrees: int) -> float:
    """t at the level of two standard deviations, over 2: what a standard deviation of so many degrees counts for.

    Two of a noise that is widened so are exceeded by chance in 2.3 % of cases on one side, as of a known one.

    Raises:
        ValueError: no degree of freedom; nothing is known of the spread.
    """
    if degrees < 1:
        raise ValueError(f"a spread needs a degree of freedom or more; got {degrees}")
    if degrees >= _MANY:
        return 1.0
    low, high = 2.0, 16.0  # at one degree t is 13.97
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if cumulative(middle, degrees) < _LEVEL else (low, middle)
    return high / 2


def widened(degrees: pl.Expr) -> pl.Expr:
    """`widening` of a column of degrees; null where there is none."""
    return degrees.map_elements(lambda number: widening(number) if number > 0 else None, return_dtype=pl.Float64)


def cumulative(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0: the finite series for whole degrees of freedom (Abramowitz, Stegun 1964, 26.7.3 and 4)."""
    angle = math.atan(t / math.sqrt(degrees))
    square = math.cos(angle) ** 2
    term = math.cos(angle) if degrees % 2 else 1.0
    total = term if degrees > 1 else 0.0
    for number in range(3 if degrees % 2 else 2, degrees - 1, 2):
        term *= square * (number - 1) / number
        total += term
    between = 2 / math.pi * (angle + math.sin(angle) * total) if degrees % 2 else math.sin(angle) * total
    return 0.5 + between / 2
