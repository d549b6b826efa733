"""Weights drawn one by one are those of the whole model drawn at once, bit for bit."""

import pytest
import torch

from deadbench.runners.engines import deferred_init
from deadbench.runners.engines.deferred_init import DeferredInit, deferred_model
from deadbench.suite.architectures.build import build_config, build_model
from tests.runners.engines.test_streaming import ARCHITECTURES

MORE = {  # laws that look at what they have drawn, copy tables, or touch a child from its parent
    "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 4},
    "modernbert": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 99,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    },
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48, "vocab_size": 99},
}  # fmt: skip


@pytest.fixture
def everything_deferred(monkeypatch):
    monkeypatch.setattr(deferred_init, "_DEFERRED_ELEMENTS", 64)
    monkeypatch.setattr(deferred_init, "_CHUNK_ELEMENTS", 64)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *MORE])
def test_each_weight_is_that_of_the_whole_model(model_type, everything_deferred):
    import transformers

    settings = {"model_type": model_type} | (ARCHITECTURES | MORE)[model_type]
    transformers.set_seed(5)
    whole = build_model(build_config(settings)).state_dict()
    after = torch.get_rng_state()
    model, values = deferred_model(build_config(settings), 5)
    assert torch.equal(torch.get_rng_state(), after), "whatever is drawn next must be the same too"
    state = model.state_dict()
    assert sum(tensor.is_meta for tensor in state.values()) >= 6
    for name in reversed(whole):  # in an order of our own
        drawn = values.value(state[name]) if state[name].is_meta else state[name]
        assert torch.equal(drawn, whole[name]), name
    assert torch.equal(torch.get_rng_state(), after), "a value asked for draws nothing from the generator in use"


@pytest.mark.parametrize("size", [64, 127, 128, 129, 250, 1000])
def test_the_generator_moves_on_in_pieces_as_by_one_draw(size, everything_deferred):
    """normal_ works in groups of 16 and draws the last group anew: pieces must not change where it stands."""
    for draw in (torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.trunc_normal_):
        torch.manual_seed(1)
        first, second = draw(torch.empty(size)), torch.randn(3)
        torch.manual_seed(1)
        with DeferredInit() as values:
            deferred = draw(torch.empty(size))
            following = torch.randn(3)
        assert deferred.is_meta
        assert torch.equal(values.value(deferred), first)
        assert torch.equal(following, second)


def test_operations_beyond_a_draw_are_replayed(everything_deferred):
    def make():
        weight = torch.empty(8, 16)
        torch.nn.init.orthogonal_(weight)
        weight[3].zero_()
        other = torch.empty(8, 16).copy_(weight).mul_(2)
        weight.add_(1)
        return other, weight

    torch.manual_seed(2)
    expected = make()
    torch.manual_seed(2)
    with DeferredInit() as values, torch.no_grad():
        deferred = make()
    for got, want in zip(deferred, expected, strict=True):
        assert torch.equal(values.value(got), want)
