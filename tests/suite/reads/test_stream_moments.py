"""A planted massive coordinate and a planted centred stream are found, and no others."""

import pytest
import torch
from torch import nn

from deadbench.suite.architectures.kernel_test import live_norm, probe
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.reads.stream_moments import StreamMoments

D, N = 48, 400


def moments(x, dtype=torch.float32):
    found = StreamMoments(D)
    for part in x.to(dtype).split(150):
        found.update(part.double(), dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_centred_stream_is_told_from_one_that_is_not(dtype):
    torch.manual_seed(0)
    x = torch.randn(N, D, dtype=torch.float64) * torch.linspace(0.2, 3, D)
    share, centred = moments(x, dtype).mean_share()
    along = x @ torch.full((D,), D**-0.5, dtype=torch.float64)
    assert share == pytest.approx(float(along.var() / x.var(0).mean()), rel=0.02)
    assert centred is False
    share, centred = moments(x - x.mean(-1, keepdim=True), dtype).mean_share()
    assert centred is True
    assert share < 1e-3


def test_a_slightly_uncentred_stream_is_not_centred():
    torch.manual_seed(0)
    x = torch.randn(N, D)
    x -= 0.99 * x.mean(-1, keepdim=True)
    assert moments(x).mean_share() == (pytest.approx(1e-4, rel=0.3), False)


def test_a_constant_stream_has_no_share():
    assert moments(torch.ones(N, D)).mean_share() == (None, None)


def test_massive_coordinates_and_the_weight_of_v_on_them():
    """Two coordinates are massive; of the scales one is a tenth there, so that v leans on it."""
    torch.manual_seed(0)
    x = torch.randn(N, D)
    x[:, 7] += 100
    x[::10, 20] *= 400
    x[:, 30] *= 10  # large, and not massive
    module = nn.RMSNorm(D, eps=1e-6).requires_grad_(False)
    module.weight[7] = 0.1
    read = FinalNormRead(module, live_norm(module, probe(module, D), D))
    read.update(x, module(x))
    row, _ = read.finish()
    assert row["massive_coordinates"] == [20, 7]
    assert row["massive_weight"] == pytest.approx((100 + 1) / (100 + D - 1), rel=1e-6)


def test_parts_merge_and_are_packed_exactly():
    torch.manual_seed(0)
    x = torch.randn(N, D)
    whole, first, second = moments(x), moments(x[:150]), moments(x[150:])
    first.merge(second)
    assert torch.allclose(first.sums, whole.sums, rtol=1e-12)
    again = StreamMoments(D)
    again.restore(first.to_arrow().to_struct_array()[0])
    assert torch.equal(again.sums, first.sums)
    assert again.roundoff == 2.0**-24
