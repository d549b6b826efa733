"""The streamed covariance against a direct float64 SVD, however the rows are cut, masked, merged and moved."""

import itertools
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.suite.spectra.covariance import CovarianceFactor
from deadbench.suite.spectra.triangular import smallest_singular_pair


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


@settings(deadline=None, max_examples=30)
@given(
    D=st.integers(2, 24),
    rows_per_D=st.integers(4, 12),
    batch=st.integers(1, 60),
    log_condition=st.floats(3, 9),
    offset=st.sampled_from([0.0, 1e4]),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_float64_rows_resolve_the_bottom_at_any_condition(D, rows_per_D, batch, log_condition, offset, repeats, seed):
    """The bottom eigenvalue to 1e-6, or below the floor that the spectrum states; duplicated tokens change nothing."""
    rows = planted(rows_per_D * D, D, 10**log_condition, offset, seed)
    rows = rows.repeat(repeats, 1)
    accumulator = CovarianceFactor(D)
    for part in rows.split(batch):
        accumulator.update(part)
    spectrum = accumulator.finish()
    # The rows' own rounding, eps * offset, is all that neither way can know.
    known = 1e4 * (np.finfo(float).eps * (1 + offset)) ** 2
    reference = direct(rows)
    resolved = reference > max(spectrum.floor, known / 1e-6)
    assert spectrum.eigenvalues_D[resolved] == pytest.approx(reference[resolved], rel=1e-6)
    assert (spectrum.eigenvalues_D[~resolved] <= 2 * max(spectrum.floor, known / 1e-6)).all()


@settings(deadline=None, max_examples=20)
@given(
    D=st.integers(2, 12),
    first=st.integers(1, 3),
    log_outlier=st.floats(0, 6),
    log_later=st.floats(0, 3),
    batch=st.integers(1, 400),
    seed=st.integers(0, 100),
)
def test_a_first_batch_that_is_like_no_other_costs_nothing_unsaid(D, first, log_outlier, log_later, batch, seed):
    """The offset is then far from the mean, and squares are of that size: the floor says so."""
    rows = torch.randn(1500, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[2 * D :, -1] *= 10**-log_later
    rows[:first, 0] += 10**log_outlier
    accumulator = CovarianceFactor(D)
    accumulator.update(rows[:first])
    for part in rows[first:].split(batch):
        accumulator.update(part)
    spectrum = accumulator.finish()
    reference = direct(rows)
    certified = reference > spectrum.floor
    assert spectrum.eigenvalues_D[certified] == pytest.approx(reference[certified], rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(
    D=st.integers(2, 16),
    cuts=st.lists(st.integers(0, 400), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    log_condition=st.floats(0, 9),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_any_cut_merged_in_any_order_agrees_with_direct_svd(D, cuts, order, log_condition, offset, masked, dtype, seed):
    rows = planted(400, D, 10**log_condition, offset, seed).to(dtype)
    mask = torch.arange(400) % 5 != 0 if masked else torch.ones(400, dtype=torch.bool)
    edges = [0, *sorted(cuts), 400]
    parts = []
    for start, stop in itertools.pairwise(edges):
        part = CovarianceFactor(D)
        part.update(rows[start:stop], mask[start:stop])
        parts.append(part)
    order.shuffle(parts)
    merged = CovarianceFactor(D)
    for part in parts:
        merged.merge(part)
    spectrum = merged.finish()
    known = 1e4 * (np.finfo(float).eps * (1 + offset)) ** 2 / 1e-6
    reference = direct(rows[mask])
    resolved = reference > max(spectrum.floor, known)
    assert spectrum.eigenvalues_D[resolved] == pytest.approx(reference[resolved], rel=1e-6)
    assert (spectrum.eigenvalues_D[~resolved] <= 2 * max(spectrum.floor, known)).all()
    assert spectrum.num_tokens == int(mask.sum())


def test_rows_that_are_all_the_same_have_no_spectrum_and_no_nan():
    rows = torch.full((400, 3), 1e4).to(torch.bfloat16)
    accumulator = CovarianceFactor(3)
    for part in rows.split(50):
        accumulator.update(part)
    other = CovarianceFactor(3)
    other.update(rows)
    accumulator.merge(other)
    assert accumulator.finish().eigenvalues_D.tolist() == [0.0, 0.0, 0.0]


def test_rows_squared_far_from_their_mean_are_not_certified_as_if_they_were_near():
    """Without the distance in it the certificate of this Gram matrix would be wrong."""
    D, generator = 8, torch.Generator().manual_seed(0)
    rows = torch.randn(30_000, D, generator=generator, dtype=torch.float64)
    rows[2 * D :, -1] *= 10**-1.5
    rows[0] += 1e3 * torch.nn.functional.normalize(torch.randn(D, generator=generator, dtype=torch.float64), dim=0)
    accumulator = CovarianceFactor(D)
    accumulator.update(rows[:1])
    for part in rows[1:].split(500):
        accumulator.update(part)
    spectrum = accumulator.finish()
    assert spectrum.method == "gram"
    error = abs(spectrum.eigenvalues_D - direct(rows))[1:]
    assert (error <= 1e-6 * spectrum.floor).all()
    assert error.max() > 32 * np.finfo(float).eps * spectrum.eigenvalues_D[0], "more than the eigenvalues alone explain"


@pytest.mark.parametrize("tolerance", [1e-12, 1e-2, 0.5])
def test_the_smallest_singular_value_is_not_overestimated_beside_a_giant_one(tolerance):
    """A rough bottom direction holds some of the giant; its own length under R would certify what is not resolved."""
    R = torch.linalg.qr(torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).R
    R[0] *= 1e5
    smallest, _ = smallest_singular_pair(R, steps=20, tolerance=tolerance)
    assert smallest == pytest.approx(float(torch.linalg.svdvals(R)[-1]), rel=max(0.5 * tolerance, 1e-9))


def nearly_flat(N: int, D: int, num_dead: int, depth: float, offset: float, seed: int) -> torch.Tensor:
    """Rows that extend 1 to 10 in all directions but `num_dead`, in which they are `depth` times as far."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, D, generator=generator, dtype=torch.float64) * torch.linspace(1, 10, D, dtype=torch.float64)
    rows[:, :num_dead] *= depth
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    return rows @ turn + offset * torch.randn(D, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rows", "method"),
    [
        (planted(2000, 40, 30, 10.0, 0), "gram"),
        (nearly_flat(2000, 40, 1, 1e-7, 10.0, 0), "lifted-gram"),
        (nearly_flat(2000, 40, 6, 1e-6, 10.0, 0), "lifted-gram"),
        (planted(2000, 40, 1e9, 10.0, 0), "whitened-gram"),
        (planted(60, 40, 30, 10.0, 0), "qr"),
    ],
    ids=["well conditioned", "one dead direction", "six", "ill conditioned everywhere", "too short to tell"],
)
def test_the_cheapest_certified_method_is_chosen(rows, method):
    accumulator = CovarianceFactor(40)
    for part in rows.split(100):
        accumulator.update(part)
    spectrum = accumulator.finish()
    assert spectrum.method == method
    known = spectrum.eigenvalues_D > spectrum.floor
    assert spectrum.eigenvalues_D[known] == pytest.approx(direct(rows)[known], rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    D=st.integers(12, 32),
    num_dead=st.integers(1, 3),
    log_depth=st.floats(4, 9),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    cuts=st.lists(st.integers(0, 800), min_size=1, max_size=4),
    travels=st.booleans(),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 100),
)
def test_lifted_directions_are_as_exact_as_by_direct_svd(D, num_dead, log_depth, offset, cuts, travels, order, seed):
    """However the rows are cut and merged, by Arrow or not: parts have their own lifts, offsets and methods."""
    rows = nearly_flat(800, D, num_dead, 10**-log_depth, offset, seed)
    parts = []
    for start, stop in itertools.pairwise([0, *sorted(cuts), 800]):
        parts.append(CovarianceFactor(D))
        parts[-1].update(rows[start:stop])
    order.shuffle(parts)
    merged = CovarianceFactor(D)
    for part in parts:
        merged.merge(CovarianceFactor.from_arrow(part.to_arrow()) if travels else part)
    spectrum = merged.finish()
    known = 1e4 * (np.finfo(float).eps * (10 + offset)) ** 2 / 1e-6
    reference = direct(rows)
    resolved = reference > max(spectrum.floor, known)
    assert resolved.sum() >= D - num_dead
    assert spectrum.eigenvalues_D[resolved] == pytest.approx(reference[resolved], rel=1e-6)


def test_lifted_parts_of_one_kind_are_merged_by_addition():
    """A successor's rows lie elsewhere and its Gram matrix is shifted, also along what is lifted."""
    first, later = nearly_flat(400, 16, 1, 1e-6, 0.0, 0), nearly_flat(400, 16, 1, 1e-6, 0.0, 0).flip(0) * 1.5
    whole = CovarianceFactor(16)
    whole.update(first)
    after = whole.successor()
    after.offset_D = after.offset_D + first[3]
    after.update(later)
    assert whole.method == after.method == "lifted-gram"
    whole.merge(after)
    assert len(whole._by_qr.factor_KD) == 0, "nothing was taken by QR"
    assert whole.finish().eigenvalues_D == pytest.approx(direct(torch.cat([first, later])), rel=1e-7)


def test_a_lifted_direction_that_comes_alive_later_loses_nothing():
    dead, alive = nearly_flat(400, 16, 1, 1e-7, 0.0, 0), torch.randn(400, 16, dtype=torch.float64)
    accumulator = CovarianceFactor(16)
    accumulator.update(dead)
    accumulator.update(1e-6 * alive)  # thirty times as far along it, and next to nothing elsewhere
    accumulator.update(alive)  # too far to be squared there
    assert accumulator.finish().eigenvalues_D == pytest.approx(direct(torch.cat([dead, 1e-6 * alive, alive])), rel=1e-7)


def test_lifted_rows_that_later_ones_made_ill_conditioned_say_so():
    first = nearly_flat(100, 8, 1, 1e-6, 0.0, 0)
    later = first.repeat(50, 1) * torch.logspace(1.9, -4, 5000, dtype=torch.float64)[:, None]
    later[:, 0] *= 100 / 80
    accumulator = CovarianceFactor(8)
    accumulator.update(first)
    for part in later.split(500):
        accumulator.update(part)
    spectrum = accumulator.finish()
    reference = direct(torch.cat([first, later]))
    certified = reference > spectrum.floor
    assert spectrum.eigenvalues_D[certified] == pytest.approx(reference[certified], rel=1e-6)


def test_a_gram_matrix_that_later_rows_made_ill_conditioned_says_so():
    """The first rows are well conditioned, the later ones not: the floor tells which eigenvalues are certified."""
    first = planted(200, 8, 10, 0.0, 0)
    later = 1e3 * planted(5000, 8, 1e7, 0.0, 1)
    accumulator = CovarianceFactor(8)
    accumulator.update(first)
    accumulator.update(later / 100)
    accumulator.update(later)
    spectrum = accumulator.finish()
    reference = direct(torch.cat([first, later / 100, later]))
    certified = reference > spectrum.floor
    assert spectrum.eigenvalues_D[certified] == pytest.approx(reference[certified], rel=1e-6)


def test_rows_that_the_first_ones_did_not_foresee_lose_nothing():
    """A direction exactly dead in the first rows comes alive later: whitening by the first R would blow it up."""
    rows = planted(600, 12, 1e3, 0.0, 0)
    rows[:100, 5] = 0
    accumulator = CovarianceFactor(12)
    for part in rows.split(100):
        accumulator.update(part)
    assert accumulator.finish().eigenvalues_D == pytest.approx(direct(rows), rel=1e-9)


@pytest.mark.parametrize("condition", [30, 1e7])
def test_a_state_travels_as_arrow_and_merges_like_the_original(condition):
    rows = planted(900, 16, condition, 5.0, 0)
    here, there = CovarianceFactor(16), CovarianceFactor(16)
    here.update(rows[:500])
    there.update(rows[500:])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, (state := there.to_arrow()).schema) as writer:
        writer.write_batch(state)
    received = CovarianceFactor.from_arrow(pa.ipc.open_stream(sink.getvalue()).read_next_batch())
    here.merge(received)
    assert here.finish().eigenvalues_D == pytest.approx(direct(rows), rel=1e-9)
    assert here.finish().num_tokens == 900


def test_an_empty_state_travels_and_adds_nothing():
    rows = planted(100, 4, 10, 0.0, 0)
    accumulator = CovarianceFactor(4)
    accumulator.update(rows)
    accumulator.merge(CovarianceFactor.from_arrow(CovarianceFactor(4).to_arrow()))
    assert accumulator.finish().num_tokens == 100


@pytest.mark.parametrize("condition", [30, 1e6, 1e12])
def test_bottom_alone_is_the_bottom_of_the_whole(condition):
    accumulator = CovarianceFactor(40)
    accumulator.update(planted(400, 40, condition, 3.0, 0))
    smallest, bottom_D = accumulator.bottom()
    spectrum = accumulator.finish()
    assert smallest == pytest.approx(spectrum.eigenvalues_D[-1], rel=1e-6)
    assert abs(bottom_D @ spectrum.eigenvectors_DD[-1]) == pytest.approx(1, abs=1e-9)


def test_bottom_alone_of_an_exactly_dead_direction():
    rows = torch.randn(100, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 2] = 0
    accumulator = CovarianceFactor(6)
    accumulator.update(rows)
    smallest, bottom_D = accumulator.bottom()
    assert smallest < 1e-28, "rounding of R, no more"
    assert abs(bottom_D[2]) == pytest.approx(1)


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


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("size", [1e39, 1e100, 1e155, 1e308])
def test_what_float32_has_not_is_told_of_the_rows_and_not_of_the_device(size, batch):
    accumulator = CovarianceFactor(4)
    for _ in range(batch):
        accumulator.update(torch.randn(40, 4, dtype=torch.float64))
    rows = torch.randn(40, 4, dtype=torch.float64)
    rows[5, 1] = -size
    told = re.escape(f"activations reach {size:.1e} in 1 of 40 rows; only what float32 has can be read, up to 3.4e+38")
    with pytest.raises(ValueError, match=told):
        accumulator.update(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_largest_that_float32_has_is_read(dtype):
    rows = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near, plain = CovarianceFactor(4), CovarianceFactor(4)
    scaled = (rows / rows.abs().max() * 0.9 * 2.0**127).to(dtype)
    near.update(scaled)
    plain.update(scaled.double() * 2.0**-127)
    expected = plain.finish().eigenvalues_D * 2.0**254
    np.testing.assert_allclose(near.finish().eigenvalues_D, expected, rtol=1e-12)


def test_nothing_of_size_tokens_is_kept():
    D = 8
    accumulator = CovarianceFactor(D)
    for _ in range(1000):
        accumulator.update(torch.randn(5, D))
        held = sum(part.numel() for part in [accumulator._by_qr.factor_KD, *accumulator._by_qr.waiting])
        assert held <= 3 * D * D + 5 * D
