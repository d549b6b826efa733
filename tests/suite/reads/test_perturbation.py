"""The output's change along a direction, against what can be computed by hand or in higher precision."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from deadbench.suite.architectures.norms import EffectiveNorm
from deadbench.suite.reads.kl_order import with_orders
from deadbench.suite.reads.perturbation import (
    STEPS,
    Site,
    directional_fisher,
    finest_roundoff,
    kl_divergence,
    moves,
    read_head,
    read_inner,
)


@pytest.mark.parametrize("size", [1e-17, 1e-12, 1e-8, 1e-4, 0.009, 0.011, 1.0, 30.0])
def test_kl_is_right_from_the_smallest_to_the_largest(size):
    """Two classes at p = 1/2 and a difference of logits s: KL = log cosh(s/2)."""
    s = Fraction(size)
    half = s / 2
    series = half**2 / 2 - half**4 / 12 + half**6 / 45 - 17 * half**8 / 2520
    expected = float(series) if size < 0.1 else float(np.log(np.cosh(size / 2)))
    found = kl_divergence(torch.zeros(3, 2).double(), torch.tensor([[size, 0.0]]).double().expand(3, 2))
    assert found == pytest.approx(expected, rel=1e-12)


def test_kl_is_unmoved_by_a_constant_and_never_negative():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(5, 11)))
    delta = torch.from_numpy(rng.normal(size=(5, 11)))
    assert kl_divergence(logits, delta + 3.0) == pytest.approx(kl_divergence(logits, delta), rel=1e-12)
    assert 0 <= kl_divergence(logits, torch.full((5, 11), 0.7).double()) < 1e-30
    exact = (logits.softmax(-1) * (logits.log_softmax(-1) - (logits + delta).log_softmax(-1))).sum(-1).mean()
    assert kl_divergence(logits, delta) == pytest.approx(float(exact), rel=1e-12)


def a_site(*, bias=True, family="layernorm", shift=True):
    torch.manual_seed(0)
    gamma = np.linspace(0.5, 2.0, 6) * np.array([1, -1, 1, 1, -1, 1])
    norm = EffectiveNorm(family, gamma, np.linspace(-1, 1, 6) if shift else None, 1e-5)
    return Site("head", "norm", nn.Linear(6, 9, bias=bias).double(), norm, False)


def test_the_closed_form_fisher_is_twice_the_kl_over_the_step_squared():
    site = a_site()
    y = site.norm(torch.randn(40, 6))
    logits = site.module(y).detach()
    u, w = torch.randn(9).double(), torch.randn(6).double()
    fisher = directional_fisher(logits, y @ w, u)
    step = 1e-5
    assert 2 * kl_divergence(logits, step * torch.outer(y @ w, u)) / step**2 == pytest.approx(fisher, rel=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_is_dead_along_v_and_alive_along_every_control(bias):
    site = a_site(bias=bias)
    acts = torch.randn(30, 6)
    rows = read_head(site, acts, site.module(site.norm(acts)).detach(), [0, 0])
    by = {(row["direction"], row["step"]): row for row in rows}
    assert by["compensated", 1.0]["compensation"] == ("bias" if bias else "added")
    assert by["compensated", 1.0]["kl"] < 1e-28
    assert by["compensated", 1.0]["fisher"] < 1e-28
    for control in ("uncompensated", "random"):
        row = by[control, 0.01]
        assert row["kl"] > 1e-6
        assert row["kl"] == pytest.approx(row["fisher"] * 0.01**2 / 2, rel=0.05)


def test_an_rmsnorms_inverse_scale_is_alive_and_without_a_shift_nothing_is_compensated():
    site = a_site(family="rmsnorm", shift=False)
    names = {move.name: move.compensation for move in moves(site, [0, 0])}
    assert names == {"inverse-scale-rms": "none", "random": "none"}
    acts = torch.randn(30, 6)
    rows = read_head(site, acts, site.module(site.norm(acts)).detach(), [0, 0])
    assert min(row["kl"] / row["step"] ** 2 for row in rows) > 1e-2


def test_a_map_that_does_not_make_the_logits_is_not_replayed_as_a_head():
    site = a_site()
    acts = torch.randn(30, 6)
    assert read_head(site, acts, 3 * site.module(site.norm(acts)).detach(), [0, 0]) is None


@pytest.mark.parametrize("bias", [True, False])
def test_a_map_inside_gives_the_heads_rows_and_is_put_back(bias):
    site = a_site(bias=bias)
    acts = torch.randn(30, 6)
    kept = {name: p.detach().clone() for name, p in site.module.named_parameters()}

    def run():
        with torch.no_grad():
            return site.module(site.norm(acts))

    rows = list(read_inner(site, run(), run, [0, 0], has_logits=True))
    for row, head in zip(rows, read_head(site, acts, run(), [0, 0]), strict=True):
        assert row["kl"] == pytest.approx(head["kl"], rel=1e-6, abs=1e-27)
        assert row["output_change"] == pytest.approx(head["output_change"], rel=1e-6, abs=1e-13)
    assert all(torch.equal(p, kept[name]) for name, p in site.module.named_parameters())
    assert not site.module._forward_hooks

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        list(read_inner(site, run(), fail, [0, 0], has_logits=True))
    assert all(torch.equal(p, kept[name]) for name, p in site.module.named_parameters())


def test_known_directions_of_a_head_have_their_verdicts():
    site = a_site()
    site.norm.scale_D[2] = 1e-40  # as good as an exact zero: v lies on it
    acts = torch.randn(30, 6)
    rows = with_orders(read_head(site, acts, site.module(site.norm(acts)).detach(), [0, 0]), 2.0**-24)
    found = {row["direction"]: row["verdict"] for row in rows}
    assert found == {
        "compensated": "gauge", "uncompensated": "regular", "random": "regular", "zero-scale": "gauge"
    }  # fmt: skip
    assert len(rows) == 4 * len(STEPS)


def test_a_learned_dead_direction_is_moved_where_the_outputs_have_one():
    site = a_site(family="rmsnorm")
    acts = torch.randn(60, 6).double()
    assert "learned" not in {move.name for move in moves(site, [0, 0], acts)}
    acts[:, 3] = acts[:, 1] * site.norm.scale_D[1] / site.norm.scale_D[3]  # equal outputs, but for their shifts
    acts[:, 3] += 1e-6 * torch.randn(60)
    assert "learned" not in {move.name for move in moves(site, [0, 0], acts[:11])}, "too few rows to tell"
    (learned,) = (move for move in moves(site, [0, 0], acts) if move.name == "learned")
    assert learned.w_D.abs().tolist() == pytest.approx([0, 0.5**0.5, 0, 0.5**0.5, 0, 0], abs=1e-4)
    rows = read_head(site, acts, site.module(site.norm(acts)).detach(), [0, 0])
    of = {row["direction"]: row for row in with_orders(rows, 2.0**-53)}
    assert of["learned"]["verdict"] == "regular", "small, and no gauge"
    assert of["learned"]["fisher"] < 1e-9 * of["random"]["fisher"]


@pytest.mark.parametrize("upcast", [False, True])
def test_a_stream_in_float32_is_told_from_one_in_float64(upcast):
    site = a_site()
    y = site.norm(torch.randn(30, 6))

    def run():
        out = site.module(y).detach()
        return out.float().double() if upcast else out

    found = finest_roundoff(site, run(), run, [0, 0], "float64")
    assert found == (2.0**-24 if upcast else 2.0**-53)
