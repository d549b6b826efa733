"""Double-double against exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from suite.precision import DoubleDouble, VarianceAlong, inverse_direction, project, two_product, two_sum

FINITE = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)


def exact(pair: DoubleDouble) -> Fraction:
    return Fraction(float(pair.hi)) + Fraction(float(pair.lo))


@given(FINITE, FINITE)
def test_sum_and_product_are_exact(a, b):
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert exact(two_sum(x, y)) == Fraction(a) + Fraction(b)
    assert exact(two_product(x, y)) == Fraction(a) * Fraction(b)


@given(st.integers(1, 33), st.integers(0, 1000))
def test_projection_keeps_twice_the_digits(D, seed):
    rng = np.random.default_rng(seed)
    scale_D = rng.uniform(0.3, 2, D)
    direction = inverse_direction(scale_D)
    y = rng.standard_normal(D)
    truth = sum(
        (Fraction(v) * (Fraction(h) + Fraction(l)))
        for v, h, l in zip(y.tolist(), direction.hi.tolist(), direction.lo.tolist(), strict=True)
    )
    found = exact(DoubleDouble(*(part[0] for part in project(torch.from_numpy(y)[None], direction))))
    assert abs(found - truth) <= Fraction(2) ** -98 * D


def test_inverse_direction_is_the_inverse_to_106_bits():
    scale_D = np.random.default_rng(0).uniform(0.3, 2, 50)
    direction = inverse_direction(scale_D)
    smallest = Fraction(float(np.abs(scale_D).min()))
    for g, h, l in zip(scale_D.tolist(), direction.hi.tolist(), direction.lo.tolist(), strict=True):
        assert abs((Fraction(h) + Fraction(l)) * Fraction(g) / smallest - 1) < Fraction(2) ** -100


def test_variance_merges_and_sees_below_float64_rounding():
    """Outputs that lie in the kernel to 1e-20, beside a shift of order one."""
    D = 8
    shift = torch.ones(D, dtype=torch.float64)
    direction = inverse_direction(np.ones(D))
    rows = shift + torch.randn(100, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = rows - (rows - shift).mean(1, keepdim=True)
    whole, left, right = (VarianceAlong(direction, shift) for _ in range(3))
    whole.update(rows)
    left.update(rows[:30])
    right.update(rows[30:])
    left.merge(right)
    assert left.finish() == whole.finish()
    assert 0 < whole.finish() < 1e-29
