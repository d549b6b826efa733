"""The share of the variance along v that the other directions explain, against direct inverses and planted noise."""

import numpy as np
import pytest
import torch
from torch import nn

from deadbench.suite.architectures.kernel_test import live_norm, probe
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.spectra.directions import inverse_scale_direction

D, N = 24, 24 * 16
NAMES = ("schur_ratio", "schur_ratio_exact", "schur_ratio_as_executed")


def measured(module, x, output=None):
    read = FinalNormRead(module, live_norm(module, probe(module, D), D))
    read.update(x, module(x) if output is None else output)
    return read.finish()[0]


def layernorm(seed=0):
    torch.manual_seed(seed)
    module = nn.LayerNorm(D).requires_grad_(False)
    nn.init.uniform_(module.weight, 0.3, 2.0)
    nn.init.normal_(module.bias)
    return module


def test_an_rmsnorm_agrees_with_the_inverse_of_its_covariance():
    module = nn.RMSNorm(D, eps=1e-6).requires_grad_(False)
    torch.manual_seed(0)
    nn.init.uniform_(module.weight, 0.3, 2.0)
    x = torch.randn(N, D) @ torch.randn(D, D)
    row = measured(module, x)
    C_DD = np.cov(module(x).double().numpy().T, bias=True)
    v_D = inverse_scale_direction(module.weight.double().numpy())
    expected = 1 - 1 / (v_D @ np.linalg.solve(C_DD, v_D)) / (v_D @ C_DD @ v_D)
    assert expected > 0.5, "the directions of this input are anything but independent"
    for name in NAMES:
        assert row[name] == pytest.approx(expected, rel=1e-5), name
    assert row["schur_baseline"] == (D - 1) / N


def test_rounding_of_a_layernorm_is_explained_no_more_than_by_chance():
    rows = [
        measured(layernorm(seed), torch.randn(N, D, generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 2, 3)
    ]
    for name in NAMES:
        mean = np.mean([row[name] for row in rows])
        assert 0.4 * rows[0]["schur_baseline"] < mean < 2.5 * rows[0]["schur_baseline"], name


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_planted_dependence_is_found_with_its_share(share):
    """In bfloat16 nothing of this could be seen: the model here runs in float64, and its output is moved along v."""
    module, x = layernorm().double(), torch.randn(64 * D, D, dtype=torch.float64)
    y, v_D = module(x), torch.from_numpy(inverse_scale_direction(module.weight.numpy()))
    signal = nn.functional.normalize(y[:, 3] - y[:, 3].mean(), dim=0)
    noise = nn.functional.normalize(torch.randn(len(x), dtype=torch.float64), dim=0)
    along = 1e-6 * (share**0.5 * signal + (1 - share) ** 0.5 * noise)
    row = measured(module, x, y + along[:, None] * v_D)
    chance = (1 - share) * row["schur_baseline"]
    assert row["schur_ratio_as_executed"] == pytest.approx(share + chance, abs=0.04)
    assert row["schur_ratio_exact"] < 5 * row["schur_baseline"], "the norm itself depends on nothing"


def test_zero_scales_leave_it_undefined():
    module = layernorm()
    module.weight[3] = 0
    row = measured(module, torch.randn(N, D))
    assert {row[name] for name in (*NAMES, "schur_baseline")} == {None}


def test_a_second_dead_direction_leaves_it_undefined():
    x = torch.randn(N, D)
    x[:, 5] = x[:, 4]  # equal inputs and scales: one difference of outputs is zero
    module = nn.LayerNorm(D).requires_grad_(False)
    assert measured(module, x)["schur_ratio"] is None


def test_a_layernorms_rounding_agrees_with_a_factor_of_its_covariance():
    """`S = n / |R^-T v|^2` by a QR in float64 of what float32 left: eight digits of 1e-7 are there."""
    module, x = layernorm(), torch.randn(N, D)
    y = module(x).double().numpy()
    R_DD = np.linalg.qr(y - y.mean(0), mode="r")
    v_D = inverse_scale_direction(module.weight.double().numpy())
    S = 1 / (N * np.sum(np.linalg.solve(R_DD.T, v_D) ** 2))
    lambda_v = np.sum((R_DD @ v_D) ** 2) / N
    assert measured(module, x)["schur_ratio"] == pytest.approx(1 - S / lambda_v, rel=1e-3)
