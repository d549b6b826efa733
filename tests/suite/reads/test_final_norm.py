"""The final norm's row against a plain float64 computation on the same inputs and outputs."""

import numpy as np
import pytest
import torch
from torch import nn

from deadbench.suite.architectures.kernel_test import live_norm, probe
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.reads.verdicts import precision_slope
from deadbench.suite.spectra.directions import dead_subspace, depth_limit, inverse_scale_direction

D, N = 24, 400


def random_layernorm(seed=0, zeros=()):
    torch.manual_seed(seed)
    module = nn.LayerNorm(D)
    nn.init.uniform_(module.weight, 0.3, 2.0)
    nn.init.normal_(module.bias)
    with torch.no_grad():
        module.weight[list(zeros)] = 0
    return module.requires_grad_(False)


def read(module, x, batches=3, dtype=None):
    module = module.to(dtype) if dtype else module
    measured = FinalNormRead(module, live_norm(module, probe(module, D), D))
    for part in (x.to(dtype) if dtype else x).chunk(batches):
        measured.update(part, module(part))
    return measured.finish()


def test_float32_row_agrees_with_a_direct_svd():
    module = random_layernorm()
    x = torch.randn(4, N // 4, D) * torch.linspace(0.2, 3, D) + 1
    row, spectrum = read(module, x)
    eigenvalues_D = np.array(spectrum["eigenvalues"])
    y = module(x).reshape(-1, D).double().numpy()
    centred = y - y.mean(0)
    _, sigma, right = np.linalg.svd(centred, full_matrices=False)
    v = inverse_scale_direction(module.weight.double().numpy())
    assert eigenvalues_D[:-1] == pytest.approx(sigma[:-1] ** 2 / N, rel=1e-6)
    assert row["lambda_v"] == pytest.approx(np.mean((centred @ v) ** 2), rel=0.01)
    assert row["alignment"] == pytest.approx(abs(right[-1] @ v), abs=1e-6)
    assert row["alignment"] == pytest.approx(1, abs=1e-6)
    assert row["lambda_mean"] == pytest.approx(np.mean(sigma**2 / N), rel=1e-9)
    assert row["depth"] == pytest.approx(np.log10(row["lambda_mean"] / row["lambda_v"]))
    assert (row["num_tokens"], row["num_dead_1e10"], row["containment"]) == (N, 1, pytest.approx(1))


def test_an_algebraic_kernel_falls_with_the_square_of_the_roundoff():
    row, spectrum = read(random_layernorm(), torch.randn(2, N // 2, D))
    assert spectrum["verdicts"] == ["algebraic"]
    assert (row["num_algebraic"], row["num_learned"], row["num_rounding"]) == (1, 0, 0)
    assert row["kernel_exact"] is True
    assert 0.95 < row["precision_slope"] < 1.2
    assert row["depth_exact"] > 29


def test_rmsnorm_has_no_kernel():
    row, _ = read(nn.RMSNorm(D, eps=1e-6).requires_grad_(False), torch.randn(2, N // 2, D))
    assert row["kernel_exact"] is False
    assert abs(row["precision_slope"]) < 0.01
    assert row["depth"] < 1
    assert row["alignment"] < 0.999
    assert (row["num_dead_1e4"], row["containment"]) == (0, None)


def test_a_learned_dead_direction_is_not_algebraic():
    """A scale of 1e-6 among ones in an RMSNorm: dead at 1e-10, and just as dead in float64."""
    module = nn.RMSNorm(D, eps=1e-6).requires_grad_(False)
    module.weight[5] = 1e-6
    row, _ = read(module, torch.randn(2, N // 2, D))
    assert row["kernel_exact"] is False
    assert row["containment"] == pytest.approx(1, abs=1e-9)
    assert row["num_dead_1e10"] == 1


def test_a_nearly_zero_scale_leaves_the_layernorm_kernel_exact():
    """v leans on that coordinate, but `sum(z) = 0` still holds: algebraic, and e_5 is dead besides."""
    module = random_layernorm()
    module.weight[5] = 1e-6
    row, _ = read(module, torch.randn(2, N // 2, D))
    assert row["kernel_exact"] is True


@pytest.mark.parametrize("zeros", [(3,), (3, 7), (0, 5, 9)])
def test_zero_scales_are_dead_and_contained(zeros):
    row, spectrum = read(random_layernorm(zeros=zeros), torch.randn(2, N // 2, D))
    eigenvalues_D = np.array(spectrum["eigenvalues"])
    assert spectrum["verdicts"] == ["learned"] * len(zeros)
    assert row["num_dead_1e10"] == len(zeros)
    assert row["containment"] == pytest.approx(1, abs=1e-9)
    assert (eigenvalues_D[-len(zeros) :] < 1e-25).all()
    assert row["depth"] == pytest.approx(depth_limit(D)), "zero variance is reported as the limit, never as infinity"
    assert row["precision_slope"] is None


def test_bfloat16_model_is_replayed_in_float32():
    module = random_layernorm()
    x = torch.randn(2, N // 2, D)
    row, _ = read(module, x, dtype=torch.bfloat16)
    assert row["depth"] > 12
    assert 3 < row["depth_as_executed"] < 7
    assert row["kernel_exact"] is True


def test_padding_is_masked_out_once_and_for_all():
    module = random_layernorm()
    x = torch.randn(4, 100, D)
    mask = torch.ones(4, 100, dtype=torch.bool)
    mask[3, 40:] = False
    padded = torch.where(mask[..., None], x, torch.full_like(x, 1e4))
    norm = live_norm(module, probe(module, D), D)
    masked, chosen = FinalNormRead(module, norm), FinalNormRead(module, norm)
    masked.update(padded, module(padded), mask)
    chosen.update(x[mask], module(x[mask]))
    assert masked.num_tokens == 340
    eigenvalues, expected = (np.array(each.finish()[1]["eigenvalues"]) for each in (masked, chosen))
    assert eigenvalues == pytest.approx(expected, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_on_several_workers_merge_to_the_same_row(dtype):
    module = random_layernorm().to(dtype)
    norm = live_norm(module, probe(module, D), D)
    x = torch.randn(4 * N, D).to(dtype)
    whole, *parts = (FinalNormRead(module, norm) for _ in range(4))
    whole.update(x, module(x))
    for part, rows in zip(parts, x.split([100, 700, 4 * N - 800]), strict=True):
        part.update(rows, module(rows))
    parts[0].merge(parts[2])
    parts[0].merge(parts[1])
    row, expected = parts[0].finish()[0], whole.finish()[0]
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float) and name not in ("lambda_min", "spectrum_floor", "depth_bottom"):
            assert row[name] == pytest.approx(value, rel=1e-6), name
        elif not isinstance(value, float) and name not in ("spectrum_method",):
            assert row[name] == value, name


def test_values_that_are_not_finite_and_wrong_formulas_are_refused():
    module = random_layernorm()
    norm = live_norm(module, probe(module, D), D)
    x = torch.randn(50, D)
    x[3, 2] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        FinalNormRead(module, norm).update(x, module(x))
    with pytest.raises(ValueError, match="differs from its formula"):
        FinalNormRead(module, norm).update(torch.randn(50, D), torch.randn(50, D))


@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, torch.nn.RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("size", "told"), [(1e17, None), (1e21, "reach"), (3e37, "reach")])
def test_a_stream_whose_squares_float32_has_not_is_told_as_that(kind, dtype, size, told):
    module = kind(D).to(dtype)
    norm = live_norm(module, probe(module, D), D)
    x = torch.randn(50, D, dtype=dtype)
    x[7] *= size
    measured = FinalNormRead(module, norm)
    if told is None:
        measured.update(x, module(x))
        assert measured.num_tokens == 50
        return
    with pytest.raises(ValueError, match=r"replayed in float32, overflows in 1 of 50 rows: values before it reach \d"):
        measured.update(x, module(x))


def test_a_gain_that_float32_has_not_is_told_as_that():
    module = torch.nn.LayerNorm(D).double()
    norm = live_norm(module, probe(module, D), D)
    with torch.no_grad():
        module.weight.fill_(1e39)
    with pytest.raises(ValueError, match="replayed in float32, overflows in 50 of 50 rows"):
        FinalNormRead(module, norm).update(x := torch.randn(50, D, dtype=torch.float64), module(x))


def test_control_direction_is_alive():
    row, spectrum = read(random_layernorm(), torch.randn(2, N // 2, D))
    eigenvalues_D = spectrum["eigenvalues"]
    assert eigenvalues_D[-2] < row["lambda_control"] < eigenvalues_D[0]


def test_slope_is_undefined_without_two_values():
    assert precision_slope(0.0, 1e-30) is None
    assert precision_slope(2.0**-48, 2.0**-106) == pytest.approx(1)


def test_predicted_subspace_matches_isotropic_input():
    module = random_layernorm(zeros=(2,))
    K = dead_subspace(module.weight.double().numpy(), "layernorm")
    assert K[:, 0] == pytest.approx(np.eye(D)[2])
