"""The parameters-only numbers, on scales small enough to check by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deadbench.suite.spectra.directions import (
    dead_subspace,
    depth_limit,
    harmonic_scale,
    inverse_scale_direction,
    leading_coordinates,
    predicted_depth,
    zero_scales,
)

SCALES = hnp.arrays(np.float64, st.integers(2, 40), elements=st.floats(0.01, 100) | st.floats(-100, -0.01))


def test_direction_of_a_four_wide_norm():
    v = inverse_scale_direction(np.array([1.0, 2.0, -4.0, 4.0]))
    assert v == pytest.approx(np.array([4.0, 2.0, -1.0, 1.0]) / math.sqrt(22), abs=1e-15)


@given(SCALES)
def test_direction_is_unit_and_orthogonal_to_every_output(scale_D):
    v = inverse_scale_direction(scale_D)
    z = np.random.default_rng(0).standard_normal(len(scale_D))
    z -= z.mean()
    assert np.linalg.norm(v) == pytest.approx(1, abs=1e-12)
    assert abs(v @ (scale_D * z)) <= 1e-12 * np.abs(scale_D * z).max() * len(scale_D)


def test_direction_survives_scales_whose_inverse_overflows():
    v = inverse_scale_direction(np.array([1.0, 5e-324, 1.0]))
    assert v == pytest.approx([0, 1, 0])


def test_exact_zeros_own_the_direction():
    assert inverse_scale_direction(np.array([0.0, 2.0, 0.0, 1.0])) == pytest.approx(
        [math.sqrt(0.5), 0, math.sqrt(0.5), 0]
    )


@pytest.mark.parametrize("zeros", [0, 1, 2, 3])
def test_dead_subspace_is_the_kernel_of_the_covariance(zeros):
    rng = np.random.default_rng(zeros)
    D = 12
    scale_D = rng.uniform(0.5, 2, D)
    scale_D[rng.choice(D, zeros, replace=False)] = 0
    centring = np.eye(D) - 1 / D
    covariance = np.diag(scale_D) @ centring @ np.diag(scale_D)
    K = dead_subspace(scale_D, "layernorm")
    assert K.shape[1] == max(1, zeros) == np.sum(np.linalg.eigvalsh(covariance) < 1e-12)
    assert np.abs(covariance @ K).max() < 1e-12
    assert pytest.approx(np.eye(K.shape[1]), abs=1e-12) == K.T @ K


def test_rmsnorm_has_a_dead_subspace_only_from_zero_scales():
    assert dead_subspace(np.ones(5), "rmsnorm").shape == (5, 0)
    assert dead_subspace(np.array([1.0, 0.0, 1.0]), "rmsnorm").shape == (3, 1)


def test_zero_scales_are_relative_to_the_median():
    assert zero_scales(np.array([1.0, -1e-5, 2e-5, 1.0, 1.0])).tolist() == [1]
    assert zero_scales(1e-8 * np.ones(4)).tolist() == []


def test_harmonic_scale():
    assert harmonic_scale(np.array([1.0, -2.0])) == pytest.approx(2 / (1 + 0.25))
    assert harmonic_scale(np.array([2.0, 4.0])) == pytest.approx(2 / (1 / 4 + 1 / 16))
    assert harmonic_scale(np.array([0.0, 1.0])) == 0
    assert harmonic_scale(np.array([1e-200, 1.0])) == pytest.approx(0, abs=1e-300)


def test_predicted_depth_of_unit_scales():
    """u^2 (0.36 + 0.02 D + 0.7) against a mean eigenvalue of 1."""
    D = 768
    expected = -math.log10(2**-48 * (0.36 + 0.02 * D + 0.7))
    assert predicted_depth(np.ones(D), None, "layernorm") == pytest.approx(expected)
    assert predicted_depth(np.ones(D), np.zeros(D), "layernorm") == pytest.approx(expected)
    assert predicted_depth(np.ones(D), None, "layernorm", "bfloat16") == pytest.approx(-math.log10(2**-16 * 0.18))


def test_predicted_depth_without_a_kernel_is_none_and_with_zero_scales_is_capped():
    assert predicted_depth(np.ones(8), None, "rmsnorm") is None
    assert predicted_depth(np.array([0.0, 1.0, 1.0]), None, "layernorm") == pytest.approx(depth_limit(3))
    assert predicted_depth(np.zeros(4), None, "layernorm") is None


def test_the_depth_limit_is_a_variance_of_eps_squared_of_the_trace():
    assert depth_limit(768) == pytest.approx(104 * math.log10(2) - math.log10(768))


def test_predicted_depth_of_scales_and_a_shift_by_hand():
    scale_D, shift_D = np.array([1.0, 2.0, 4.0]), np.array([0.5, -1.0, 2.0])
    harmonic, mean_square, t = 3 / (1 + 1 / 4 + 1 / 16), 7.0, 1.25

    def depth(u, bracket):
        return pytest.approx(-math.log10(u**2 * harmonic * bracket / mean_square), rel=1e-12)

    of_D = 0.02 * 3 + 0.7
    assert predicted_depth(scale_D, shift_D, "layernorm") == depth(2**-24, 0.18 * (2 + t) + of_D)
    assert predicted_depth(scale_D, 0 * shift_D, "layernorm") == depth(2**-24, 0.18 * 2 + of_D)
    # One coordinate that is shifted is enough: its rounding is in every sum.
    one_D = np.array([0.0, 0.0, 2.0])
    assert predicted_depth(scale_D, one_D, "layernorm") == depth(2**-24, 0.18 * (2 + 1 + 0.25 / 3) + of_D)
    for dtype, u in (("bfloat16", 2**-8), ("float16", 2**-11)):
        assert predicted_depth(scale_D, shift_D, "layernorm", dtype) == depth(u, 0.18 * t)
        assert predicted_depth(scale_D, None, "layernorm", dtype) == depth(u, 0.18)
    assert predicted_depth(scale_D, shift_D, "layernorm", "float64") == pytest.approx(depth_limit(3))


@pytest.mark.parametrize("family", ["layernorm", "rmsnorm"])
def test_predicted_depth_of_a_scale_that_is_all_but_zero_is_that_of_the_scale(family):
    """v is that coordinate, and every coordinate of v gamma is its scale: 4 x 1e-14 against a mean of 6 / 4."""
    scale_D = np.array([1e-7, 1.0, -1.0, 2.0])
    assert predicted_depth(scale_D, None, family) == pytest.approx(-math.log10(4e-14 / 1.5), rel=1e-9)


def test_leading_coordinates_have_nine_tenths_of_the_mass_and_are_sixteen_at_most():
    assert leading_coordinates(np.array([0.6, 0.0, -0.8])) == ([2, 0], pytest.approx([0.64, 0.36]))
    assert leading_coordinates(np.array([0.0, -1.0, 0.0])) == ([1], [1.0])
    assert leading_coordinates(np.sqrt([0.02, 0.95, 0.03]))[0] == [1]
    coordinates, weights = leading_coordinates(np.full(100, 0.1))
    assert len(set(coordinates)) == len(weights) == 16
    assert sorted(leading_coordinates(np.full(4, 0.5))[0]) == [0, 1, 2, 3], "three have three quarters"
