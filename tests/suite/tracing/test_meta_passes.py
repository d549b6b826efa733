"""Passes on the meta device: all experts of a block at once, however many there are."""

import pytest
from torch import nn

from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.locate import locate_final_norm as locate
from deadbench.suite.architectures.locate import search
from deadbench.suite.tracing.meta_passes import attempts, quick_attempts

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "num_key_value_heads": 2}  # fmt: skip
MIXTURES = {
    "mixtral": lambda experts: {"num_local_experts": experts},
    "qwen3_moe": lambda experts: {"num_experts": experts, "moe_intermediate_size": 16, "head_dim": 8},
    "gpt_oss": lambda experts: {"num_local_experts": experts, "head_dim": 8},
}


@pytest.mark.parametrize("experts", [8, 40])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_search_makes_no_more_products_for_more_experts(model_type, experts, monkeypatch):
    products, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a, **k: products.append(1) or linear(*a, **k))
    model = build_model(build_config({"model_type": model_type, **TEXT, **MIXTURES[model_type](experts)}), "meta")
    before = {id(m): m.config._experts_implementation for m in model.modules() if hasattr(m, "is_concatenated")}
    assert search(model)[0].path == "norm"
    assert 0 < len(products) < 40
    after = {id(m): m.config._experts_implementation for m in model.modules() if hasattr(m, "is_concatenated")}
    assert before == after
    assert set(before.values()) == {"eager"}


def test_where_experts_cannot_be_taken_at_once_they_are_taken_one_by_one(monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def refuse(*arguments):
        raise NotImplementedError

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "batched_mm", refuse)
    found = locate(build_config({"model_type": "mixtral", **TEXT, "num_local_experts": 3}))
    assert (found.path, found.family) == ("norm", "rmsnorm")


def test_other_models_are_tried_no_more_often():
    dense = build_model(build_config({"model_type": "llama", **TEXT}), "meta")
    assert len(quick_attempts(dense)) == len(attempts(dense)) == 3
    mixture = build_model(build_config({"model_type": "mixtral", **TEXT, "num_local_experts": 3}), "cpu")
    assert len(quick_attempts(mixture)) == 1
