"""Every module that a pass calls is asked whether it normalises: rightly, and on few positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deadbench.suite.architectures import any_norm
from deadbench.suite.architectures.any_norm import may_be_a_norm, normalises

D = 6


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over channels ahead of their positions."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Unit(nn.Module):
    """Every position, or every channel, at length one: without parameters, on any shape."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        return x / x.norm(dim=self.axis, keepdim=True)


class Snake(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, D, 1))

    def forward(self, x):
        return x + torch.sin(self.alpha * x) ** 2 / self.alpha


class Strided(nn.Module):
    """One position of 64 is left, of which nothing can be told."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x):
        return self.last(x[..., ::64].mean(1, keepdim=True))


class Watched(nn.Module):
    """Remembers how many numbers it was given at most."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.seen.append(x.numel())
        return self.inner(x)


KINDS = {
    "channel norm": (lambda: ChannelNorm(D), True),
    "batch norm": (lambda: nn.BatchNorm1d(D), True),
    "unit channels": (lambda: Unit(1), True),
    "unit positions": (lambda: Unit(-1), True),
    "convolution": (lambda: nn.Conv1d(D, D, 3, padding=1), False),
    "snake": (Snake, False),
    "tanh": (nn.Tanh, False),
    "gelu": (nn.GELU, False),
    "strided": (lambda: Strided(nn.Identity()), False),
    "strided norm": (lambda: Strided(Unit(-1)), True),
}


@pytest.mark.parametrize(
    ("module", "shape", "is_norm"),
    [
        (nn.BatchNorm2d(D), (2, D, 3, 3), True),  # at inference an affine map, by what it is
        (nn.GroupNorm(3, D), (2, D, 3, 3), True),
        (nn.LayerNorm(D), (2, D), True),
        (Unit(-1), (2, 5, D), True),
        (nn.Linear(D, D), (2, D), False),
        (nn.ReLU6(), (2, D), False),
        (nn.Tanh(), (2, D), False),
    ],
)
def test_a_normalisation_of_any_kind_keeps_its_output_when_its_input_doubles(module, shape, is_norm):
    assert normalises(module, torch.empty(shape)) is is_norm


def test_what_takes_indices_does_not_normalise():
    assert not normalises(nn.Embedding(5, D), torch.zeros(2, dtype=torch.long))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(positions=st.integers(4, 400))
@pytest.mark.parametrize("kind", KINDS)
def test_however_many_positions_there_are_the_answer_is_the_same(kind, positions):
    make, is_norm = KINDS[kind]
    torch.manual_seed(0)
    expected = is_norm and (not kind.startswith("strided") or positions > 64)  # of one number nothing can be told
    assert normalises(make(), torch.empty(1, D, positions)) is expected


@pytest.mark.parametrize("shape", [(1, D, 5000), (1, D, 500, 700)])
@pytest.mark.parametrize(("inner", "most"), [(nn.Tanh(), 64 * D), (nn.ELU(), 64 * D)])
def test_what_is_no_norm_is_given_few_positions(inner, most, shape):
    watched = Watched(inner)
    assert not normalises(watched, torch.empty(shape))
    assert len(watched.seen) == 2
    assert max(watched.seen) <= most


def test_a_norm_on_the_meta_device_is_given_few_positions_of_many():
    """Its weights are zeros, of which nothing is told, neither on few positions nor on all."""
    watched = Watched(nn.LayerNorm(D))
    nn.init.zeros_(watched.inner.weight)
    assert not normalises(watched, torch.empty(2, 50_000, D))
    assert max(watched.seen) <= 2 * 64 * D


def test_what_takes_no_tensor_or_several_is_not_copied(monkeypatch):
    """Tables of positions take none, attention several."""
    monkeypatch.setattr(any_norm, "bare_copy", lambda _: pytest.fail("copied"))
    for forward in (lambda: None, lambda x, mask: x, lambda x, *, mask: x):
        module = nn.Module()
        module.forward = forward
        assert not normalises(module, torch.empty(2, D))


def test_a_linear_map_is_neither_copied_nor_run():
    """The head of a language model: its copy in float64 is as large as the rest of the model."""

    class Refusing(nn.Parameter):
        def __deepcopy__(self, memo):
            pytest.fail("copied")

    head = nn.Linear(D, 9)
    head.weight = Refusing(head.weight.detach())
    assert not may_be_a_norm(head)
    assert not normalises(head, torch.empty(2, D))


def test_a_class_made_of_a_linear_map_may_be_a_norm():
    class Normed(nn.Linear):
        def forward(self, x):
            return super().forward(nn.functional.layer_norm(x, (D,)))

    assert may_be_a_norm(Normed(D, D))
    assert normalises(Normed(D, D), torch.empty(2, D))
