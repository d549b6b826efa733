"""Planted dead units of small networks: second order, third where a gate multiplies, and weights put back."""

import pytest
import torch
from torch import nn

from deadbench.suite.architectures.kernel_test import live_norm, probe
from deadbench.suite.reads.dead_units import CHAIN, UNIT, HiddenLayer, InFloat64, read_units
from deadbench.suite.reads.kl_order import with_orders

U, D, H, V = 2.0**-53, 6, 10, 7


class Network(nn.Module):
    """A stream, one hidden layer that a norm feeds, and a head."""

    def __init__(self, activation, *, gated, upcast=False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)
        self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.activation, self.gated, self.upcast = activation, gated, upcast
        self.double().requires_grad_(False)
        self.x = torch.randn(40, D, dtype=torch.float64)

    def forward(self):
        y = self.norm(self.x)
        hidden = self.activation(self.gate(y)) * self.up(y) if self.gated else self.activation(self.up(y))
        stream = self.x + self.down(hidden)
        return self.head(stream.to(torch.float32).double() if self.upcast else stream)


def orders(network):
    norm = live_norm(network.norm, probe(network.norm, D), D)
    into = (network.gate, network.up) if network.gated else (network.up,)
    layer = HiddenLayer("up", "norm", norm, into, network.down)
    rows = list(read_units(layer, network, [0, 1], U, has_logits=True))
    return {row["direction"]: (row["verdict"], row["kl_order"]) for row in with_orders(rows, U)}


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Tanh()])
def test_a_unit_whose_weights_in_and_out_are_zero_is_of_second_order(activation):
    network = Network(activation, gated=False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert orders(network) == {UNIT: ("singular", pytest.approx(2, abs=0.05))}
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()), "put back"


def test_a_gated_chain_of_three_zeros_is_of_third_order():
    found = orders(Network(nn.SiLU(), gated=True))
    assert found == {
        UNIT: ("singular", pytest.approx(2, abs=0.05)),
        CHAIN: ("singular", pytest.approx(3, abs=0.05)),
    }


def test_a_unit_that_is_alive_at_zero_is_no_dead_unit():
    assert orders(Network(nn.Sigmoid(), gated=False)) == {}


def test_a_stream_that_is_cast_to_float32_blurs_the_third_order_and_is_kept_in_float64():
    network = Network(nn.SiLU(), gated=True, upcast=True)
    blurred = orders(network)[CHAIN][1]
    with InFloat64():
        verdict, order = orders(network)[CHAIN]
    assert verdict == "singular"
    assert abs(order - 3) < 0.05
    assert abs(order - 3) < abs(blurred - 3)
