"""A replayed pass computes no block that has ended, and says what a computed one says; else it computes."""

import contextlib

import pytest
import torch
from torch import nn

from deadbench.suite.architectures.parts import streamed_paths
from deadbench.suite.tracing import replay as module
from deadbench.suite.tracing.flow import cuts, other_stream, recorded_calls
from deadbench.suite.tracing.replay import kept_outputs, replay_of

GIVEN = {"hidden": torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.map = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, hidden):
        return (hidden + self.map(self.inner(hidden)), None)


class Deep(nn.Module):
    """Three blocks, a norm, and a head beside which nothing passes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 6)

    def through(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)[0]
        return hidden

    def forward(self, hidden):
        return (self.head(self.norm(self.through(hidden))),)


class Twice(Deep):
    """The norm is called ahead of the blocks, too."""

    def forward(self, hidden):
        return super().forward(self.norm(hidden))


class Writing(Deep):
    """It writes into what its blocks returned."""

    def through(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)[0].mul_(0.5)
        return hidden


class Aside(Deep):
    """Its blocks leave what they made where the end finds it, and what they return is of no use."""

    def through(self, hidden):
        made = []
        handles = [b.map.register_forward_hook(lambda _, args, output: made.append(output)) for b in self.blocks]
        super().through(hidden)
        for handle in handles:
            handle.remove()
        return sum(made)


class Counting(Deep):
    """What comes out depends on how often it has run."""

    runs = 0

    def forward(self, hidden):
        self.runs += 1
        return (super().forward(hidden)[0] + self.runs,)


def replayed(model):
    with torch.no_grad(), recorded_calls(model) as calls, kept_outputs(model, streamed_paths(model)) as kept:
        (stream,) = model(**GIVEN)
    return replay_of(model, calls, GIVEN, kept, stream), stream


@contextlib.contextmanager
def blocks_run(model):
    run = []
    handles = [
        each.map.register_forward_hook(lambda _, args, output, n=n: run.append(n))
        for n, each in enumerate(model.blocks)
    ]
    yield run
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", [Deep, Writing])
@pytest.mark.parametrize(
    ("path", "computed", "alone"),
    [("norm", set(), True), ("head", set(), True), ("blocks.2.inner", {2}, False), ("blocks.1", {1, 2}, True)],
)
def test_what_has_ended_is_not_computed_again(kind, path, computed, alone):
    model = kind()
    replay, stream = replayed(model)
    held = model.get_submodule(path)
    assert cuts(model, held, GIVEN, stream) is alone
    ways = replay.ways(path)  # it has tried them
    with blocks_run(model) as run:
        assert cuts(model, held, GIVEN, stream, ways) is alone
    assert set(run) == computed
    assert all("forward" not in vars(each) for each in model.modules())


@pytest.mark.parametrize(("kind", "path"), [(Aside, "norm"), (Counting, "norm"), (Twice, "norm"), (Deep, "blocks.0")])
def test_what_would_not_be_the_same_is_computed(kind, path):
    """Of modules called ahead of all blocks, too."""
    model = kind()
    replay, stream = replayed(model)
    assert replay.ways(path) == [contextlib.nullcontext, contextlib.nullcontext]
    with blocks_run(model) as run:
        cuts(model, model.get_submodule(path), GIVEN, stream, replay.ways(path))
    assert run == [0, 1, 2, 0, 1, 2]


def test_more_than_is_to_be_kept_is_not(monkeypatch):
    monkeypatch.setattr(module, "_KEPT_BYTES", 2 * 4 * 6 * 4)
    replay, _ = replayed(Deep())
    assert replay.ways("norm") == [contextlib.nullcontext, contextlib.nullcontext]


def test_without_arithmetic_nothing_is_kept():
    model = Deep().to("meta")
    with kept_outputs(model, streamed_paths(model)) as kept:
        model(GIVEN["hidden"].to("meta"))
    assert not kept.outputs


def test_a_model_that_hears_nothing_is_not_replayed():
    model = Deep()
    nn.init.zeros_(model.head.weight)
    assert replayed(model)[0] is None
    assert other_stream(model, GIVEN, model(**GIVEN)[0]) is None


def test_a_block_called_more_often_is_refused_and_put_back():
    model = Deep()
    replay, _ = replayed(model)
    way = replay.ways("norm")[0]
    with way():
        model(**GIVEN)
        with pytest.raises(RuntimeError, match="more often"):
            model(**GIVEN)
    assert all("forward" not in vars(each) for each in model.modules())


def test_a_forward_pass_of_a_blocks_own_is_put_back():
    model = Deep()
    own = model.blocks[0].forward = model.blocks[0].forward  # as libraries wrap it
    replay, _ = replayed(model)
    with replay.ways("norm")[0]():
        assert model.blocks[0].forward is not own
    assert model.blocks[0].forward is own
