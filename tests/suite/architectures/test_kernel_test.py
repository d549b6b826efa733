"""The kernel test on modules whose behaviour one can write down, whatever they are called."""

import numpy as np
import pytest
import torch
from torch import nn

from deadbench.suite.architectures.kernel_test import OnRows, live_norm, probe
from deadbench.suite.architectures.norms import effective_norm

D = 12


class RMS(nn.Module):
    def __init__(self, eps=1e-6, offset=0.0, upcast=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.variance_epsilon, self.offset, self.upcast = eps, offset, upcast

    def forward(self, x):
        y = x.to(self.upcast) if self.upcast else x
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return ((self.weight + self.offset) * y).to(x.dtype)


class FinalLayerNorm(RMS):
    """A name that lies."""


class OffsetLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.beta, self.epsilon = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D)), 1e-5

    def forward(self, x):
        return nn.functional.layer_norm(x, (D,), self.gain + 1, self.beta, self.epsilon)


class UntoldShift(nn.Module):
    """Two vectors, and no name that says which is added."""

    def __init__(self):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x):
        return nn.functional.layer_norm(x, (D,), self.g, self.b)


class AffineOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x):
        return x * self.weight + self.bias


class NeedsTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x, gate):
        return x * gate


@pytest.mark.parametrize(
    ("module", "family", "scale", "shift", "eps"),
    [
        (nn.LayerNorm(D), "layernorm", "weight", "bias", 1e-5),
        (nn.LayerNorm(D, eps=1e-12, bias=False), "layernorm", "weight", None, 1e-12),
        (nn.LayerNorm(D, eps=1e12), "layernorm", "weight", "bias", 1e12),
        (nn.LayerNorm(D, elementwise_affine=False), "layernorm", "implicit-one", None, 1e-5),
        (OffsetLayerNorm(), "layernorm", "1+weight", "beta", 1e-5),
        (UntoldShift(), "layernorm", "weight", "b", 1e-5),
        (nn.RMSNorm(D, eps=1e-6), "rmsnorm", "weight", None, 1e-6),
        (nn.RMSNorm(D), "rmsnorm", "weight", None, 2.0**-23),
        (RMS(), "rmsnorm", "weight", None, 1e-6),
        (RMS(upcast=torch.float32), "rmsnorm", "weight", None, 1e-6),
        (RMS(offset=1.0), "rmsnorm", "1+weight", None, 1e-6),
        (RMS(eps=0.0), "rmsnorm", "weight", None, 0.0),
        (FinalLayerNorm(), "rmsnorm", "weight", None, 1e-6),
        (AffineOnly(), "other", None, None, None),
        (nn.Linear(D, D), "other", None, None, None),
        (nn.Identity(), "other", None, None, None),
        (NeedsTwo(), "other", None, None, None),
    ],
)
def test_behaviour_decides(module, family, scale, shift, eps):
    found = probe(module, D)
    assert (found.family, found.scale, found.shift_parameter) == (family, scale, shift)
    assert found.eps == eps if eps is None else found.eps == pytest.approx(eps, rel=1e-12)
    assert found.evidence


def test_the_module_is_left_alone():
    module = nn.LayerNorm(D)
    nn.init.uniform_(module.weight)
    before = module.weight.clone()
    probe(module, D)
    assert torch.equal(module.weight, before)
    assert module.weight.requires_grad


def test_meta_modules_can_be_probed():
    with torch.device("meta"):
        module = nn.LayerNorm(D)
    assert probe(module, D).family == "layernorm"
    assert module.weight.is_meta


@pytest.mark.parametrize("module", [nn.LayerNorm(D), RMS(offset=1.0), OffsetLayerNorm()])
def test_formula_is_the_module(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module = module.double()
    x = torch.randn(5, D, dtype=torch.float64)
    formula = live_norm(module, probe(module, D), D)
    assert torch.allclose(formula(x), module(x), rtol=1e-12, atol=1e-12)


def test_effective_scale_keeps_signs_and_adds_one():
    stored = np.array([-0.5] * D)
    assert effective_norm(probe(RMS(offset=1.0), D), stored, None, D).scale_D == pytest.approx(0.5)
    assert effective_norm(probe(RMS(), D), stored, None, D).scale_D == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="family other has no formula"):
        effective_norm(probe(nn.Identity(), D), None, None, D)


class PositionNorm(nn.LayerNorm):
    """LayerNorm of every position of a map (B, D, H, W) or sequence (B, D, T): SAM's necks, SqueezeBERT's blocks."""

    def forward(self, maps):
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("axes_after", [1, 2])
def test_a_norm_over_channels_before_positions_is_told_and_runs_on_rows(axes_after):
    found = probe(PositionNorm(D), D, axes_after)
    assert (found.family, found.scale, found.axes_after) == ("layernorm", "weight", axes_after)
    rows = torch.randn(2, 5, D)
    assert torch.allclose(OnRows(PositionNorm(D), axes_after)(rows), nn.LayerNorm(D)(rows), atol=1e-6)
    # One group of channels: the mean is over the whole map, and no position has the kernel of its own.
    assert probe(nn.GroupNorm(1, D), D, axes_after).family == "other"


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("before", [0.0, 1.0, float("nan")])
def test_a_linear_map_is_no_norm_whatever_lay_in_its_memory(device, before, monkeypatch):
    """A map of zeros returns the same for x and x + c; on the meta device there are no values, and memory is given."""

    def lain(module, **given):
        moved = to_empty(module, **given)
        for tensor in moved.parameters():
            tensor.detach().fill_(before)
        return moved

    to_empty = nn.Module.to_empty
    monkeypatch.setattr(nn.Module, "to_empty", lain)
    module = nn.Linear(16, 16)
    with torch.no_grad():
        module.weight.fill_(before)
    assert probe(module.to(device), 16).family == "other"
    assert probe(nn.LayerNorm(16).to(device), 16).family == "layernorm"
