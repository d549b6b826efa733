"""Every route of the covariance: it takes, refuses, merges, joins and travels, and the eigenvalues stay."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.suite.spectra.covariance import CovarianceFactor
from deadbench.suite.spectra.qr import Qr
from deadbench.suite.spectra.routes import Lifted, Plain, Whitened, cheapest

METHODS = ["gram", "lifted-gram", "whitened-gram", "qr"]
ROUTES = {"gram": Plain, "lifted-gram": Lifted, "whitened-gram": Whitened, "qr": type(None)}
EPS = np.finfo(float).eps


def rows_for(method: str, D: int, seed: int, N: int = 0) -> torch.Tensor:
    """Rows that are taken by `method`: well conditioned, with one direction all but dead, with ten, or too few."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N or (2 * D - 1 if method == "qr" else 8 * D), D, generator=generator, dtype=torch.float64)
    rows *= torch.linspace(1, 3, D, dtype=torch.float64)
    if method == "lifted-gram":
        rows[:, 0] *= 1e-6
    elif method == "whitened-gram":
        rows[:, :10] *= torch.logspace(-5, -7, 10, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    return rows @ turn + torch.randn(D, generator=generator, dtype=torch.float64)


def near_zero(method: str, seed: int = 0) -> torch.Tensor:
    """Such rows of width 16 with an offset taken off, as routes are given them; not their mean to the last digit."""
    rows = rows_for(method, 16, seed)
    return rows - rows[:50].mean(0)


def accumulated(rows: torch.Tensor, batch: int = 50) -> CovarianceFactor:
    accumulator = CovarianceFactor(rows.shape[1])
    for part in rows.split(batch):
        accumulator.update(part)
    return accumulator


def copied(accumulator: CovarianceFactor) -> CovarianceFactor:
    return CovarianceFactor.from_arrow(accumulator.to_arrow())


def merged(*parts: CovarianceFactor) -> CovarianceFactor:
    first, *others = map(copied, parts)
    for other in others:
        first.merge(other)
    return first


def assert_same(found: CovarianceFactor, expected: CovarianceFactor) -> None:
    """Of the same rows: eigenvalues to 1e-6 above the floor, and below it in both where they are in one."""
    a, b = found.finish(), expected.finish()
    assert a.num_tokens == b.num_tokens
    assert a.mean_square_D == pytest.approx(b.mean_square_D, rel=1e-9)
    floor = max(a.floor, b.floor, 1e4 * (4 * EPS) ** 2 / 1e-6)  # the rows' own rounding is what no route can know
    certified = b.eigenvalues_D > floor
    assert a.eigenvalues_D[certified] == pytest.approx(b.eigenvalues_D[certified], rel=2e-6, abs=0)
    assert (a.eigenvalues_D[~certified] <= 2 * floor).all()


@settings(deadline=None, max_examples=30)
@given(
    methods=st.tuples(*[st.sampled_from(METHODS)] * 3),
    D=st.integers(12, 24),
    seed=st.integers(0, 1000),
)
@pytest.mark.slow
def test_merging_is_associative_and_commutative_on_all_routes(methods, D, seed):
    parts = [accumulated(rows_for(method, D, seed + number)) for number, method in enumerate(methods)]
    a, b, c = parts
    expected = merged(merged(a, b), c)
    assert_same(merged(a, merged(b, c)), expected)
    for order in itertools.permutations(parts):
        assert_same(merged(*order), expected)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=10)
@given(D=st.integers(12, 24), seed=st.integers(0, 1000), refused=st.booleans())
def test_a_state_is_exact_on_every_route(method, D, seed, refused):
    """Also with rows that wait beside a Gram matrix that refused them."""
    rows = rows_for(method, D, seed)
    kept = accumulated(rows)
    if refused and method != "qr":
        kept.update(1e6 * rows[:1])
        assert kept._by_qr.num_waiting == 1
    assert (kept.method, type(kept._by_gram)) == (method, ROUTES[method])
    received = copied(kept)
    assert (received.method, type(received._by_gram)) == (method, ROUTES[method])
    assert received.num_rows == kept.num_rows == len(rows) + (refused and method != "qr")
    assert received.to_arrow().equals(kept.to_arrow())
    again = copied(received)
    found, expected = again.finish(), received.finish()
    assert found.eigenvalues_D.tobytes() == expected.eigenvalues_D.tobytes()
    assert found.eigenvectors_DD.tobytes() == expected.eigenvectors_DD.tobytes()
    assert (found.resolution, found.floor) == (expected.resolution, expected.floor)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=15)
@given(D=st.integers(12, 24), batches=st.tuples(*[st.integers(1, 200)] * 2), seed=st.integers(0, 1000))
def test_the_same_rows_in_other_batches_have_the_same_eigenvalues(method, D, batches, seed):
    rows = rows_for(method, D, seed)
    assert_same(*(accumulated(rows, batch) for batch in batches))


@pytest.mark.parametrize("method", ["gram", "lifted-gram"])
def test_rows_too_long_to_be_squared_are_refused_whole(method):
    rows = near_zero(method)
    route = cheapest(rows)
    assert isinstance(route, ROUTES[method])
    before = route.to_arrow()
    assert not route.take(torch.cat([rows[:3], 1e6 * rows[:1]]))
    assert route.to_arrow().equals(before)
    assert route.take(rows[:3])
    assert route.count == len(rows) + 3


def test_only_rows_in_the_same_coordinates_are_added():
    plain, other_plain = (cheapest(near_zero("gram", seed)) for seed in (0, 1))
    lifted, other_lifted = (cheapest(near_zero("lifted-gram", seed)) for seed in (0, 1))
    assert plain.adds_to(other_plain)
    assert lifted.adds_to(lifted.empty())
    assert not plain.adds_to(lifted)
    assert not lifted.adds_to(plain)
    assert not lifted.adds_to(other_lifted), "lifted along another direction"


@pytest.mark.parametrize("method", ["gram", "lifted-gram"])
def test_what_is_joined_is_the_scatter_of_the_rows(method):
    rows = near_zero(method)
    qr, route = Qr(16, torch.device("cpu")), cheapest(rows)
    assert route is not None
    after = route.join(qr)
    assert (qr.count, after.count, type(after)) == (len(rows), 0, ROUTES[method])
    assert torch.equal(after.gram.upper_DD, torch.zeros(16, 16, dtype=torch.float64))
    reference = torch.linalg.svdvals(rows - rows.mean(0))
    assert torch.linalg.svdvals(qr.factor_KD).numpy() == pytest.approx(reference.numpy(), rel=1e-7)
    assert qr.mean_D.numpy() == pytest.approx(rows.mean(0).numpy(), rel=1e-9)


@pytest.mark.parametrize("dead", [False, True], ids=["R as it is", "R regularised"])
def test_whitened_rows_join_the_factor_that_whitened_them(dead):
    """R can only be joined in its own coordinates where it is the whitener; else it is whitened on by the same one."""
    rows = near_zero("whitened-gram")
    if dead:
        rows[:, 3] = 0
    first, later = rows[:64], rows[64:]
    qr = Qr(16, torch.device("cpu"))
    qr.add(first - first.mean(0), len(first), first.mean(0))
    route = Whitened.by(qr)
    assert route.take(later)
    after = route.join(qr)
    assert (after is None) == (not dead)
    assert qr.count == len(rows)
    reference = torch.linalg.svdvals(rows - rows.mean(0))
    assert torch.linalg.svdvals(qr.factor_KD).numpy() == pytest.approx(reference.numpy(), rel=1e-9, abs=1e-12)
