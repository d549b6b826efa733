"""Stored names become transformers' own names, as transformers itself would have it."""

import pytest
from transformers.core_model_loading import revert_weight_conversion

from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.stored_names import (
    Renaming,
    renamed,
    renamings,
    stored_tensor,
    unwrapped,
    unwrapping,
    wrapped,
)
from deadbench.suite.atlas.config_keys import nest
from deadbench.suite.atlas.small_configs import small_config
from deadbench.suite.checkpoints.tensors import TensorEntry


@pytest.mark.parametrize(
    ("rule", "name", "own"),
    [
        (Renaming("^language.model", "language"), "language.model.norm.weight", "language.norm.weight"),
        (Renaming(r"encoder.norm.(\d+)", r"stages.\1.norm"), "encoder.norm.3.bias", "stages.3.norm.bias"),
        (Renaming("a", "b"), "x.y", "x.y"),
        (Renaming("norm", "ln", scope="vision"), "text.norm", "text.norm"),
        (Renaming("norm", "ln", scope="vision"), "vision.norm", "vision.ln"),
        (Renaming("norm", "ln", scope="vision", base="model"), "model.vision.norm", "model.vision.ln"),
        (Renaming("^norm", "ln", base="model"), "model.norm", "model.ln"),
        (Renaming("^norm", "ln"), "model.norm", "model.norm"),
        (Renaming("blocks.*.norm", "norm"), "blocks.7.norm.weight", "norm.weight"),
    ],
)  # fmt: skip
def test_a_rule(rule, name, own):
    assert renamed(name, [rule]) == own


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type", ["llava", "segformer", "clip", "mllama", "vit", "qwen2_audio", "internvl", "gpt2"]
)
def test_what_transformers_saves_is_found_again(model_type):
    """Every vector of the model: saved under transformers' choice of name, renamed back to its own."""
    model = build_model(build_config(nest(small_config(model_type)) | {"model_type": model_type}), "meta")
    rules = renamings(model)
    own = model.state_dict()
    stored = revert_weight_conversion(model, dict(own))
    vectors = {name: tensor for name, tensor in own.items() if tensor.ndim == 1}
    found = {renamed(name, rules) for name in stored}
    assert set(vectors) <= found | {name for name in vectors if "qkv" in name or "_proj.bias" in name}
    if model_type in ("llava", "segformer", "mllama", "qwen2_audio", "internvl"):
        assert not set(own) <= set(stored)  # there is something to rename


def entry(name, shape=(4,)):
    return TensorEntry(name, "f", "F32", shape, 0, 16)


def test_a_tensor_is_found_by_rule_by_prefix_and_never_by_guess():
    rules = (Renaming("^language_model.model", "language_model"),)
    stored = {name: entry(name) for name in ("language_model.model.norm.weight", "vision.norm.weight")}
    assert stored_tensor(stored, "language_model.norm", "weight", rules).name == "language_model.model.norm.weight"
    assert stored_tensor(stored, "language_model.norm", "weight") is None
    assert stored_tensor({"a.norm.weight": entry("a.norm.weight")}, "norm", "weight").name == "a.norm.weight"
    assert stored_tensor(stored, "norm", "weight") is None  # two could be it
    assert stored_tensor({"norm.gamma": entry("norm.gamma")}, "norm", "weight").name == "norm.gamma"
    assert stored_tensor(stored, "norm", None) is None


@pytest.mark.parametrize(
    ("stored", "plain"),
    [
        ("transformer.h.0._orig_mod.ln_1.weight", "transformer.h.0.ln_1.weight"),
        ("_orig_mod.transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
        ("module._orig_mod.h.0.ln_1.weight", "h.0.ln_1.weight"),
        ("_orig_mod.module.h.0.ln_1.weight", "h.0.ln_1.weight"),
        ("h.0._checkpoint_wrapped_module.attn._orig_mod.c_attn.bias", "h.0.attn.c_attn.bias"),
        ("_fsdp_wrapped_module.h.0._fsdp_wrapped_module._checkpoint_wrapped_module.ln_1.bias", "h.0.ln_1.bias"),
        ("h.0.module.ln_1.weight", "h.0.module.ln_1.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("h.0.ln_1.weight", "h.0.ln_1.weight"),
    ],
)
def test_what_wrappers_leave_in_names_is_taken_out(stored, plain):
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    assert unwrapped(stored) == plain
    assert wrapped([plain, stored]) == (stored if stored != plain else None)
    rules = [WeightRenaming(source_patterns=k, target_patterns=v) for k, v in unwrapping().items()]
    assert rename_source_key(stored, rules, [])[0] == plain
    assert stored_tensor({stored: entry(stored)}, plain.rpartition(".")[0], plain.rpartition(".")[2]).name == stored
