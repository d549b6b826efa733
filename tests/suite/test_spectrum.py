"""The streaming QR against a direct float64 SVD, however the rows are cut, masked and merged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from suite.spectrum import CovarianceFactor


def planted(N: int, D: int, condition: float, offset: float, seed: int) -> torch.Tensor:
    """Rows whose covariance has singular values log-spaced over `condition`, around a mean of size `offset`."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(N, D, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    sigma = torch.logspace(0, -np.log10(condition), D, dtype=torch.float64)
    return (left * sigma) @ right.T * N**0.5 + offset * torch.randn(D, generator=generator, dtype=torch.float64)


def direct(rows: torch.Tensor) -> np.ndarray:
    centred = rows.double() - rows.double().mean(0)
    return torch.linalg.svdvals(centred).square().numpy() / len(rows)


@settings(deadline=None, max_examples=30)
@given(
    D=st.integers(2, 24),
    factor=st.integers(2, 6),
    batch=st.integers(1, 50),
    log_condition=st.floats(3, 7),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_agrees_with_direct_svd(D, factor, batch, log_condition, offset, seed):
    rows = planted(factor * D + 1, D, 10**log_condition, offset, seed).float()
    accumulator = CovarianceFactor(D)
    for part in rows.split(batch):
        accumulator.update(part)
    spectrum = accumulator.finish()
    reference = direct(rows)
    certified = reference > 10 * spectrum.floor
    assert spectrum.eigenvalues_D[certified] == pytest.approx(reference[certified], rel=1e-6)
    assert spectrum.num_tokens == len(rows)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_merge_in_any_order_gives_the_same_spectrum(order):
    rows = planted(400, 16, 1e6, 100.0, 0)
    whole = CovarianceFactor(16)
    whole.update(rows)
    parts = []
    for part in rows.split([50, 300, 50]):
        accumulator = CovarianceFactor(16)
        accumulator.update(part)
        parts.append(accumulator)
    merged = CovarianceFactor(16)
    for index in order:
        merged.merge(parts[index])
    assert merged.finish().eigenvalues_D == pytest.approx(whole.finish().eigenvalues_D, rel=1e-9)


def test_mask_leaves_padding_out():
    rows = planted(200, 8, 1e3, 5.0, 1)
    mask = torch.arange(200) % 3 != 0
    masked, chosen = CovarianceFactor(8), CovarianceFactor(8)
    masked.update(torch.where(mask[:, None], rows, torch.nan), mask)
    chosen.update(rows[mask])
    assert masked.finish().eigenvalues_D == pytest.approx(chosen.finish().eigenvalues_D, rel=1e-12)


def test_bottom_direction_is_the_planted_one():
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows[:, 4] *= 1e-6
    accumulator = CovarianceFactor(6)
    accumulator.update(rows)
    assert abs(accumulator.finish().eigenvectors_DD[-1][4]) == pytest.approx(1, abs=1e-9)


def test_counts_use_the_mean_eigenvalue():
    rows = torch.eye(4, dtype=torch.float64).repeat(50, 1) * torch.tensor([1.0, 1.0, 1e-3, 1e-6])
    rows = torch.cat([rows, -rows])
    accumulator = CovarianceFactor(4)
    accumulator.update(rows)
    spectrum = accumulator.finish()
    assert [spectrum.num_dead(t) for t in (1e-4, 1e-8, 1e-14)] == [2, 1, 0]


def test_too_few_rows_wrong_width_and_nan_are_refused():
    accumulator = CovarianceFactor(4)
    with pytest.raises(ValueError, match=r"expected \(N, 4\)"):
        accumulator.update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="not finite in 1 of 2 rows"):
        accumulator.update(torch.tensor([[0.0, 0, 0, 0], [torch.nan, 0, 0, 0]]))
    accumulator.update(torch.randn(4, 4))
    with pytest.raises(ValueError, match="give at least 16 tokens"):
        accumulator.finish()


def test_nothing_of_size_tokens_is_kept():
    D = 8
    accumulator = CovarianceFactor(D)
    for _ in range(1000):
        accumulator.update(torch.randn(5, D))
        held = accumulator.factor_KD.numel() + sum(p.numel() for p in accumulator._pending)
        assert held <= 3 * D * D + 5 * D
