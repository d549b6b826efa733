"""What an adapter does to its base's maps is what PEFT merges, to the bit; its configuration decides no more."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from deadbench.runners.engines.merged_adapter import MergedSlice, why_not_merged
from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.engines.stored_state import stored_state
from deadbench.suite.checkpoints.adapters import open_checkpoint
from deadbench.suite.errors import CheckpointError
from tests.conftest import TINY_NEOX, save_tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
NEOX = {"target_modules": ["query_key_value", "dense_h_to_4h"]}
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 97, "n_embd": 16, "n_layer": 2,
    "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CASES = {
    "lora": (TINY_NEOX, peft.LoraConfig(r=4, rank_pattern={"layers.0.attention.query_key_value": 2}, **NEOX)),
    "rslora": (
        TINY_NEOX,
        peft.LoraConfig(r=4, lora_alpha=7, use_rslora=True, alpha_pattern={r"layers\.1\..*": 3}, **NEOX),
    ),
    "dora": (TINY_NEOX, peft.LoraConfig(r=4, use_dora=True, **NEOX)),
    "shifts": (TINY_NEOX, peft.LoraConfig(r=4, bias="lora_only", **NEOX)),
    "lora_bias": (TINY_NEOX, peft.LoraConfig(r=4, lora_bias=True, **NEOX)),
    "embedding": (TINY_NEOX, peft.LoraConfig(r=4, target_modules=["embed_in"])),
    "conv1d": (GPT2, peft.LoraConfig(r=4, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"])),
    "ia3": (
        TINY_NEOX,
        peft.IA3Config(feedforward_modules=["dense_4h_to_h"], target_modules=["query_key_value", "dense_4h_to_h"]),
    ),
    "renamed": (TINY_NEOX, peft.LoraConfig(r=4, target_modules=["lm_head", "dense"])),  # stored as embed_out
    "loha": (TINY_NEOX, peft.LoHaConfig(r=4, alpha=3, **NEOX)),
    "lokr": (TINY_NEOX, peft.LoKrConfig(r=4, alpha=3, **NEOX)),
    "oft": (TINY_NEOX, peft.OFTConfig(r=0, oft_block_size=4, **NEOX)),
    "hra": (TINY_NEOX, peft.HRAConfig(r=4, **NEOX)),
    "norms": (TINY_NEOX, peft.LNTuningConfig(target_modules=["final_layer_norm", "input_layernorm"])),
    "whole": (TINY_NEOX, peft.LoraConfig(r=4, modules_to_save=["final_layer_norm", "lm_head"], **NEOX)),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {config["model_type"]: save_tiny(root / config["model_type"], config) for config in (TINY_NEOX, GPT2)}


def save_adapter(folder, base, settings, dtype=torch.float32, loader=AutoModelForCausalLM):
    """An adapter with random values, and its merged model's state."""
    torch.manual_seed(1)
    model = peft.get_peft_model(loader.from_pretrained(base, dtype=dtype), copy.deepcopy(settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    fresh = loader.from_pretrained(base, dtype=dtype)
    merged = peft.PeftModel.from_pretrained(fresh, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return folder / "adapter", load_file(folder / "merged" / "model.safetensors")


def state_of(adapter):
    with open_checkpoint(str(adapter)).local_copy() as folder:
        state = stored_state(folder)
        merged = [name for name, each in state.items() if isinstance(each, MergedSlice)]
        return {name: each[...] for name, each in state.items()}, merged


@pytest.mark.parametrize("case", CASES)
def test_each_kind_is_what_peft_merges(case, bases, tmp_path):
    config, settings = CASES[case]
    adapter, expected = save_adapter(tmp_path, bases[config["model_type"]], settings)
    state, merged = state_of(adapter)
    base = load_file(bases[config["model_type"]] / "model.safetensors")
    assert why_not_merged(open_checkpoint(str(adapter))) is None
    assert bool(merged) == (case != "norms")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert any(not torch.equal(state[name], base[name]) for name in base)


def test_halves_of_lower_precision_are_merged_as_peft_does(bases, tmp_path):
    save_tiny(tmp_path / "f32")
    AutoModelForCausalLM.from_pretrained(tmp_path / "f32", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter, expected = save_adapter(tmp_path, tmp_path / "base", CASES["lora"][1], torch.bfloat16)
    held = {name: tensor.bfloat16() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(held, adapter / "adapter_model.bin")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    expected |= peft.PeftModel.from_pretrained(fresh, adapter).merge_and_unload().state_dict()
    state, _ = state_of(adapter)
    assert {name for name, t in state.items() if t.dtype != torch.bfloat16} == set()
    assert {name for name, t in state.items() if not torch.equal(t, expected[name])} == set()


def test_an_adapter_of_the_bare_model_fits_what_the_published_one_stores(bases, tmp_path):
    adapter, expected = save_adapter(tmp_path, bases["gpt_neox"], CASES["lora"][1], loader=AutoModel)
    state, merged = state_of(adapter)
    assert len(merged) == 4
    assert all(torch.equal(tensor, state[f"gpt_neox.{name}"]) for name, tensor in expected.items())


def test_an_embedding_of_more_words_is_of_a_model_with_as_many(bases, tmp_path):
    """As after `resize_token_embeddings`, which is what training with new tokens does."""
    base = AutoModelForCausalLM.from_pretrained(bases["gpt_neox"])
    base.resize_token_embeddings(101)
    settings = peft.LoraConfig(r=2, modules_to_save=["embed_in", "lm_head"], **NEOX)
    model = peft.get_peft_model(base, settings)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": str(bases["gpt_neox"])
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    assert open_checkpoint(str(tmp_path)).config()["vocab_size"] == 101
    with open_checkpoint(str(tmp_path)).local_copy() as folder:
        loaded = TorchEngine(torch.device("cpu")).load_trained(folder, torch.float32, type(base))
    words = torch.arange(8)[None]
    assert torch.equal(loaded(words).logits, model(words).logits)


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("trained"), bases["gpt_neox"], CASES["lora"][1])[0]


def changed(trained, folder, **settings):
    told = json.loads((trained / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | settings))
    if not (folder / "adapter_model.safetensors").exists():
        save_file(load_file(trained / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"peft_type": "XLORA"}, "an adapter of XLORA; run are LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base itself"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication in adapter_config.json is not followed"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices in adapter_config.json is not followed"),
        ({"rank_pattern": {"(a+)+b": 2}}, "adapter_config.json: rank_pattern is .*; hostile or corrupt"),
        ({"rank_pattern": {".*.*.*.*.*x": 2}}, "hostile or corrupt"),
        ({"alpha_pattern": ["x", {"y": 1}]}, "hostile or corrupt"),
        ({"lora_alpha": "8"}, "cannot be merged|hostile or corrupt"),
        ({"r": 3}, "cannot be merged"),
        ({"use_dora": True}, "the adapter's tensors are not those of its adapter_config.json"),
    ],
    ids=str,
)
def test_what_a_configuration_may_not_say(settings, told, trained, tmp_path):
    adapter = changed(trained, tmp_path, **settings)
    try:
        reason = why_not_merged(open_checkpoint(str(adapter))) or state_of(adapter)
    except CheckpointError as error:
        reason = str(error)
    assert re.search(told, reason)
    assert "\n" not in reason


def test_a_map_that_the_base_does_not_have_is_named(trained, tmp_path):
    save_file(
        {"base_model.model.gpt_neox.other.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"it changes gpt_neox\.other, of which its base .* stores no weight"):
        state_of(changed(trained, tmp_path))


def test_prompts_change_no_map_and_are_refused_before_anything_is_loaded(trained, tmp_path):
    save_file({"prompt_embeddings": torch.zeros(4, 16)}, tmp_path / "adapter_model.safetensors")
    adapter = changed(trained, tmp_path, peft_type="PROMPT_TUNING")
    checkpoint = open_checkpoint(str(adapter))
    assert len(checkpoint.headers()) == 28
    assert "an adapter of PROMPT_TUNING; run are LORA, IA3" in why_not_merged(checkpoint)


def test_a_rank_that_a_stranger_claims_takes_no_memory(trained, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be merged"):
        state_of(changed(trained, tmp_path, r=2**40, rank_pattern={}))


def test_without_peft_its_pip_line_is_told(trained, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    assert "pip install 'deadbench[peft]'" in why_not_merged(open_checkpoint(str(trained)))
