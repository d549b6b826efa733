"""A large model's blocks share their values: drawn once, by the architecture's own laws, with the same answer."""

import math

import pytest
import torch

from deadbench.suite.architectures import locate as locate_module
from deadbench.suite.architectures import shared_values
from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.locate import locate_final_norm as locate
from deadbench.suite.architectures.shared_values import built_shared
from tests.suite.architectures.test_locate import NETS, SEQ2SEQ, T5, TEXT, VISION

NARROW = [
    ("opt", TEXT | {"word_embed_proj_dim": 32, "ffn_dim": 64, "do_layer_norm_before": False}),
    ("bert", TEXT),
    ("t5", T5),
    ("bart", SEQ2SEQ),
    ("fsmt", {"langs": ["en", "ru"], "src_vocab_size": 99, "tgt_vocab_size": 99, **SEQ2SEQ, "encoder_ffn_dim": 64,
              "decoder_ffn_dim": 64, "decoder_attention_heads": 2}),
    ("mixtral", TEXT | {"num_local_experts": 4, "num_key_value_heads": 2}),
    ("clip_vision_model", VISION),
    ("vit", VISION),
    *NETS.items(),
]  # fmt: skip


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(shared_values, "_SHARED", 64)
    monkeypatch.setattr(locate_module, "_LARGE_MODEL", 0)


def bytes_of(model):
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize(("model_type", "config"), NARROW, ids=[case[0] for case in NARROW])
def test_the_answer_is_that_of_values_of_its_own(model_type, config, everything_is_large, monkeypatch):
    config = build_config({"model_type": model_type, **config})
    built = []
    monkeypatch.setattr(locate_module, "built_shared", lambda c: built.append(built_shared(c)) or built[-1])
    shared = locate(config)
    monkeypatch.setattr(locate_module, "_LARGE_MODEL", math.inf)
    assert shared == locate(config)
    assert all(model is not None for model in built)


@pytest.mark.parametrize("blocks", [2, 9])
def test_more_blocks_draw_no_more_matrices(blocks, everything_is_large, monkeypatch):
    drawn, normal = [], torch.Tensor.normal_

    def counted(self, *arguments, **named):
        drawn.append(0 if self.is_meta else self.numel())
        return normal(self, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "normal_", counted)
    config = build_config({"model_type": "llama", **TEXT, "num_hidden_layers": blocks})
    model = built_shared(config)
    block = 4 * 32 * 32 + 3 * 32 * 64
    assert sum(drawn) == 99 * 32 + block
    vectors = (2 * blocks + 1) * 32
    assert bytes_of(model) == 4 * (99 * 32 + block + vectors)
    plain = build_model(config)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in plain.named_parameters()]
    assert all(bool((p == 1).all()) for n, p in model.named_parameters() if "norm" in n)
    assert all(torch.equal(b, dict(model.named_buffers())[n]) for n, b in plain.named_buffers())


def test_values_of_one_place_in_each_block_are_shared_and_no_others(everything_is_large):
    model = built_shared(build_config({"model_type": "llama", **TEXT}))
    first, second = (model.layers[i].self_attn for i in (0, 1))
    assert first.q_proj.weight.data_ptr() == second.q_proj.weight.data_ptr()
    assert first.q_proj.weight.data_ptr() != first.k_proj.weight.data_ptr()
    assert torch.isclose(first.q_proj.weight.std(), torch.tensor(0.02), rtol=0.1)


@pytest.mark.parametrize("left", ["undrawn", "raises"])
def test_where_a_value_would_be_left_undrawn_the_model_is_built_with_its_own(left, everything_is_large, monkeypatch):
    from transformers import LlamaModel

    def initialize(self):
        if left == "raises":
            raise AttributeError("no such law")

    config = build_config({"model_type": "llama", **TEXT})
    monkeypatch.setattr(LlamaModel, "initialize_weights", initialize)
    assert built_shared(config) is None
