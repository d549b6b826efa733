"""Projections in double-double: what is left along the kernel when float64 itself rounds.

A double-double is an unevaluated sum hi + lo of two float64, about 106 bits (Dekker 1971; Ogita, Rump, Oishi 2005).
Shapes: N tokens, D hidden size.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

_SPLITTER = 2.0**27 + 1  # Dekker's constant for 53-bit significands


class DoubleDouble(NamedTuple):
    """hi + lo, with |lo| at most half a unit in the last place of hi."""

    hi: Tensor
    lo: Tensor


def two_sum(a: Tensor, b: Tensor) -> DoubleDouble:
    """a + b without error (Knuth)."""
    total = a + b
    part = total - a
    return DoubleDouble(total, (a - (total - part)) + (b - part))


def two_product(a: Tensor, b: Tensor) -> DoubleDouble:
    """a * b without error (Dekker), for magnitudes below 1e300."""
    product = a * b
    a_top = _SPLITTER * a
    a_top = a_top - (a_top - a)
    b_top = _SPLITTER * b
    b_top = b_top - (b_top - b)
    a_low, b_low = a - a_top, b - b_top
    error = a_low * b_low - (((product - a_top * b_top) - a_low * b_top) - a_top * b_low)
    return DoubleDouble(product, error)


def sum_last(terms: DoubleDouble) -> DoubleDouble:
    """Sum over the last dimension, pairwise, in double-double."""
    hi, lo = terms
    while hi.shape[-1] > 1:
        if hi.shape[-1] % 2:
            hi, lo = torch.nn.functional.pad(hi, (0, 1)), torch.nn.functional.pad(lo, (0, 1))
        half = hi.shape[-1] // 2
        hi, error = two_sum(hi[..., :half], hi[..., half:])
        lo = lo[..., :half] + lo[..., half:] + error
    return two_sum(hi[..., 0], lo[..., 0])


def inverse_direction(scale_D: NDArray[np.float64]) -> DoubleDouble:
    """`min|gamma| / gamma_i` in double-double, not normalised; exact zeros as in `inverse_scale_direction`."""
    scale = torch.from_numpy(np.ascontiguousarray(scale_D))
    smallest = scale.abs().min()
    if smallest == 0:
        return DoubleDouble((scale == 0).double(), torch.zeros_like(scale))
    hi = smallest / scale
    back = two_product(hi, scale)
    return DoubleDouble(hi, ((smallest - back.hi) - back.lo) / scale)


def project(acts_ND: Float[Tensor, "N D"], direction_D: DoubleDouble) -> DoubleDouble:
    """`acts . direction` for every token, in double-double; `acts_ND` is float64."""
    products = two_product(acts_ND, direction_D.hi)
    return sum_last(DoubleDouble(products.hi, products.lo + acts_ND * direction_D.lo))


class VarianceAlong:
    """Mergeable variance of `acts . w`, w a double-double direction that need not be a unit vector.

    The offset (the projection of the norm's shift) is taken off in double-double before anything is squared, so that
    1e-32 is seen beside projections of size one. State: n, sum d, sum d^2 with d = acts . w - offset; parts add.
    """

    def __init__(self, direction_D: DoubleDouble, offset_D: Float[Tensor, " D"]):
        self.direction = direction_D
        self.offset = project(offset_D[None], direction_D)
        self.count, self.total, self.total_of_squares = 0, 0.0, 0.0

    def update(self, acts_ND: Float[Tensor, "N D"]) -> None:
        """Add rows; any float dtype."""
        projected = project(acts_ND.double().cpu(), self.direction)
        deviation_N = (projected.hi - self.offset.hi) + (projected.lo - self.offset.lo)
        self.count += len(deviation_N)
        self.total += float(deviation_N.sum())
        self.total_of_squares += float(deviation_N.square().sum())

    def merge(self, other: "VarianceAlong") -> None:
        """Add what another accumulator of the same direction saw."""
        self.count += other.count
        self.total += other.total
        self.total_of_squares += other.total_of_squares

    def finish(self) -> float:
        """Variance along the *unit* direction."""
        mean = self.total / self.count
        squared_norm = float(self.direction.hi.square().sum())
        return max(self.total_of_squares / self.count - mean**2, 0.0) / squared_norm
