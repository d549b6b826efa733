"""Double-double against exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deadbench.suite.spectra.projections import (
    DoubleDouble,
    ExactProjection,
    VarianceAlong,
    inverse_direction,
    two_product,
    two_sum,
)

FINITE = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)


def exact(pair: DoubleDouble) -> Fraction:
    return Fraction(float(pair.hi)) + Fraction(float(pair.lo))


@given(FINITE, FINITE)
def test_sum_and_product_are_exact(a, b):
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert exact(two_sum(x, y)) == Fraction(a) + Fraction(b)
    assert exact(two_product(x, y)) == Fraction(a) * Fraction(b)


@given(st.integers(1, 33), st.integers(0, 1000), st.booleans())
def test_projection_is_exact_beyond_float64(D, seed, shifted):
    """Against rational arithmetic, on outputs of a norm: terms of one size that cancel to float64 rounding."""
    rng = np.random.default_rng(seed)
    scale_D = rng.uniform(0.5, 2, D) * 10.0 ** rng.uniform(-9, 3, D) * rng.choice([-1, 1], D)
    direction = inverse_direction(scale_D)
    shift_D = rng.standard_normal(D) if shifted else np.zeros(D)
    z = rng.standard_normal((3, D))
    acts_ND = scale_D * (z - z.mean(1, keepdims=True)) + shift_D
    found_N = ExactProjection(direction, torch.from_numpy(shift_D))(torch.from_numpy(acts_ND))
    for found, row in zip(found_N.tolist(), acts_ND.tolist(), strict=True):
        terms = [
            (Fraction(h) + Fraction(l)) * (Fraction(y) - Fraction(b))
            for h, l, y, b in zip(direction.hi.tolist(), direction.lo.tolist(), row, shift_D.tolist(), strict=True)
        ]
        truth, largest = sum(terms), max(abs(t) for t in terms)
        assert abs(Fraction(found) - truth) <= Fraction(2) ** -52 * abs(truth) + Fraction(2) ** -72 * largest


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
    whole, left, right = (VarianceAlong(direction, shift, ExactProjection) for _ in range(3))
    whole.update(rows)
    left.update(rows[:30])
    right.update(rows[30:])
    left.merge(right)
    assert left.finish() == pytest.approx(whole.finish(), rel=1e-12)
    assert 0 < whole.finish() < 1e-29
