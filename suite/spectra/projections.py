"""Projections that float64 alone would drown: what is left along the kernel of a norm evaluated in float64.

`v . (y - beta)` cancels to 1e-16 of its terms, so the sum must be formed as if in twice the precision. Numbers are cut
into slices so short that products and sums of slices are exact, and matrix products do the work (Ozaki, Ogita, Oishi,
Rump 2012). Double-doubles are unevaluated sums hi + lo of two float64 (Dekker 1971). Shapes: N tokens, D hidden size.
"""

import math
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from deadbench.suite.spectra.arrow_state import fields, struct

ALONG_STATE = pa.schema({"count": pa.int64(), "total": pa.float64(), "total_of_squares": pa.float64()})
_SPLITTER = 2.0**27 + 1  # Dekker's constant for 53-bit significands
_CHUNK_ELEMENTS = 2**18  # 1 MB of float64: stays in the cache through all the slicing


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


def inverse_direction(scale_D: NDArray[np.float64]) -> DoubleDouble:
    """`min|gamma| / gamma_i` in double-double, not normalised; exact zeros as in `inverse_scale_direction`."""
    scale = torch.from_numpy(np.ascontiguousarray(scale_D))
    smallest = scale.abs().min()
    if smallest == 0:
        return DoubleDouble((scale == 0).double(), torch.zeros_like(scale))
    hi = smallest / scale
    back = two_product(hi, scale)
    return DoubleDouble(hi, ((smallest - back.hi) - back.lo) / scale)


class ExactProjection:
    """`w . (acts - shift)` of float64 rows, to 2^-75 of the largest `|w_i (acts_i - shift_i)|`.

    Coordinates are first scaled by powers of two so that every w_i lies in [1/2, 1): `w_i (y_i - beta_i)` is then of
    one size for all i in a norm with scale 1/w. Slices of b bits with 2b + log2 D <= 53 make `slice . slice` exact.
    """

    def __init__(
        self,
        direction_D: DoubleDouble,
        shift_D: Float[Tensor, " D"] | None,
        device: torch.device | str = "cpu",
    ):
        self.shift_D = shift_D.to(device) if shift_D is not None and bool(torch.any(shift_D != 0)) else None
        D = len(direction_D.hi)
        _, exponent_D = torch.frexp(direction_D.hi)
        power_D = torch.ldexp(torch.ones(D, dtype=torch.float64), exponent_D)
        self._bits = (53 - max(1, math.ceil(math.log2(D)))) // 2
        hi, lo = direction_D.hi / power_D, direction_D.lo / power_D
        self._power_D, self._whole_D = power_D.to(device), hi.to(device)
        first = _round_to(hi, 2.0**-self._bits)
        second = _round_to(hi - first, 2.0 ** (-2 * self._bits))
        rest = (hi - first - second) + lo
        third = _round_to(rest, 2.0 ** (-3 * self._bits))
        self._slices_D4 = torch.stack([first, second, third, rest - third], dim=1).to(device)

    def __call__(self, acts_ND: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """The projection of every row, rounded to float64 once."""
        rows = max(1, _CHUNK_ELEMENTS // acts_ND.shape[1]) if acts_ND.device.type == "cpu" else len(acts_ND)
        return torch.cat([self._project(chunk) for chunk in acts_ND.split(rows)])

    def _project(self, acts_ND: Tensor) -> Tensor:
        lost_N: Tensor | float = 0.0
        if self.shift_D is None:
            scaled = acts_ND * self._power_D
        else:
            difference = two_sum(acts_ND, -self.shift_D)
            scaled = difference.hi * self._power_D
            lost_N = (difference.lo * self._power_D) @ self._whole_D
        largest = scaled.abs().max()
        # The power of two above it, that a device tells nobody; dividing by the significand is exact.
        unit = torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0) * 2.0**-self._bits
        first = _round_to(scaled, unit)
        rest = scaled.sub_(first)
        second = _round_to(rest, unit * 2.0**-self._bits)
        third = rest.sub_(second)
        a, b, c = first @ self._slices_D4, second @ self._slices_D4, third @ self._slices_D4
        # Largest first: each partial sum cancels exactly, or is already below what comes after.
        size_0, size_1 = a[:, 0], a[:, 1] + b[:, 0]
        size_2 = a[:, 2] + b[:, 1] + c[:, 0]
        size_3 = a[:, 3] + b[:, 2] + c[:, 1]
        return ((size_0 + size_1) + size_2) + (size_3 + lost_N)


class PlainProjection:
    """`w . (acts - shift)` in plain float64: enough for activations that carry float32 rounding or more."""

    def __init__(
        self,
        direction_D: DoubleDouble,
        shift_D: Float[Tensor, " D"] | None,
        device: torch.device | str = "cpu",
    ):
        self._direction_D, self._shift_D = direction_D.hi.to(device), None if shift_D is None else shift_D.to(device)

    def __call__(self, acts_ND: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """The projection of every row."""
        acts = acts_ND.detach().double()
        return (acts if self._shift_D is None else acts - self._shift_D) @ self._direction_D


class VarianceAlong:
    """Mergeable variance of `w . (acts - shift)`, w a direction that need not be a unit vector.

    The shift is taken off before anything is squared, so that 1e-32 is seen beside activations of size one. State: n,
    sum d, sum d^2; parts add.
    """

    def __init__(
        self,
        direction_D: DoubleDouble,
        shift_D: Float[Tensor, " D"] | None,
        projection: type = PlainProjection,
        device: torch.device | str = "cpu",
    ):
        """Of rows on `device`; direction and shift are given on the CPU."""
        self.direction_D, self.shift_D, self._device = direction_D, shift_D, device
        self._project = projection(direction_D, shift_D, device)
        self._squared_norm = float(direction_D.hi.square().sum())
        self.count = 0
        self._sums_2 = torch.zeros(2, dtype=torch.float64, device=device)  # of d and of d^2

    @property
    def total(self) -> float:
        """Sum of the deviations."""
        return float(self._sums_2[0])

    @property
    def total_of_squares(self) -> float:
        """Sum of their squares."""
        return float(self._sums_2[1])

    def update(self, acts_ND: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Add rows; returns their deviations, `w . (acts - shift)`."""
        deviation_N: Tensor = self._project(acts_ND)
        self.count += len(deviation_N)
        self._sums_2 += torch.stack([deviation_N.sum(), deviation_N.square().sum()])
        return deviation_N

    def merge(self, other: "VarianceAlong") -> None:
        """Add what another accumulator of the same direction saw."""
        self.count += other.count
        self._sums_2 += other._sums_2

    def to_arrow(self) -> pa.RecordBatch:
        """The sums as one Arrow row; the direction is not among them."""
        return struct({name: getattr(self, name) for name in ALONG_STATE.names}, ALONG_STATE)

    def restore(self, state: pa.StructScalar) -> None:
        """Take the sums that `to_arrow` packed in the place of one's own."""
        self.count, *sums = (value.as_py() for value in fields(state, ALONG_STATE).values())
        self._sums_2 = torch.tensor(sums, dtype=torch.float64).to(self._device)

    def finish(self) -> float:
        """Variance along the *unit* direction."""
        mean = self.total / self.count
        return max(self.total_of_squares / self.count - mean**2, 0.0) / self._squared_norm


def _round_to(values: Tensor, unit: Tensor | float) -> Tensor:
    """The nearest multiple of `unit`, a power of two, for |values| < 2^51 unit."""
    magic = 1.5 * 2.0**52 * unit
    return (values + magic) - magic
