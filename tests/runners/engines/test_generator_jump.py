"""torch's generator moved on at once is where drawing would have brought it, to the last byte of its state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.runners.engines import deferred_init, generator_jump
from deadbench.runners.engines.deferred_init import DeferredInit
from deadbench.runners.engines.generator_jump import FILLS, moved_on, words_drawn

BLOCK = 624
SIZES = st.one_of(st.integers(1, 3 * BLOCK), st.integers(1, 200_000))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(seed=st.integers(0, 2**64 - 1), before=st.integers(0, 2 * BLOCK + 1), draws=SIZES)
def test_it_is_where_drawing_brings_it(seed, before, draws):
    generator = torch.Generator().manual_seed(seed)
    torch.empty(before).uniform_(generator=generator)
    state = generator.get_state()
    torch.empty(draws).uniform_(generator=generator)
    assert torch.equal(moved_on(state, draws), generator.get_state())


@pytest.mark.parametrize("draws", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 1_000_003])
def test_at_the_edges_of_a_block(draws):
    torch.manual_seed(4)
    state = torch.get_rng_state()
    torch.rand(draws)
    assert torch.equal(moved_on(state, draws), torch.get_rng_state())


def test_many_steps_at_once_are_as_many_one_after_another():
    """As many as the largest weights have; drawing them would take a minute."""
    state, step = torch.Generator().manual_seed(1).get_state(), 58_720_256
    several = state
    for _ in range(40):
        several = moved_on(several, step)
    assert torch.equal(several, moved_on(state, 40 * step))
    assert not torch.equal(several, moved_on(state, 40 * step + 1))


def test_a_number_that_was_kept_stays():
    """randn of few draws two numbers and keeps one; what is moved on is the words."""
    torch.manual_seed(6)
    torch.randn(1, dtype=torch.float64)
    state = torch.get_rng_state()
    torch.rand(5000)
    expected = torch.randn(1, dtype=torch.float64)
    torch.set_rng_state(moved_on(state, 5000))
    assert torch.equal(torch.randn(1, dtype=torch.float64), expected), "the one that was kept"


@pytest.mark.parametrize("fill", sorted(FILLS, key=str), ids=str)
@pytest.mark.parametrize("size", [16, 17, 31, 32, 1000, 1001])
def test_the_words_of_a_fill(fill, size):
    torch.manual_seed(2)
    state = torch.get_rng_state()
    fill(torch.empty(size))
    assert torch.equal(moved_on(state, words_drawn(fill, size)), torch.get_rng_state())


@pytest.mark.parametrize(("what", "otherwise"), [("_GROUP", 8), ("_STATE_BYTES", 2504), ("_NEXT", slice(24, 32))])
def test_a_torch_that_draws_otherwise_is_found_out_and_drawn_by(monkeypatch, what, otherwise):
    monkeypatch.setattr(generator_jump, what, otherwise)
    monkeypatch.setattr(deferred_init, "_FEWEST_JUMPED", 64)
    generator_jump._are_as_known.cache_clear()
    try:
        assert words_drawn(torch.ops.aten.uniform_.default, 1000) is None
        torch.manual_seed(1)
        first, second = torch.nn.init.normal_(torch.empty(20_001)), torch.randn(3)
        torch.manual_seed(1)
        with DeferredInit() as values:
            deferred, following = torch.nn.init.normal_(torch.empty(20_001)), torch.randn(3)
        assert torch.equal(values.value(deferred), first)
        assert torch.equal(following, second)
    finally:
        generator_jump._are_as_known.cache_clear()
