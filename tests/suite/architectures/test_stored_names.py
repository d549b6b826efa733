"""Stored names become transformers' own names, as transformers itself would have it."""

import pytest
from transformers.core_model_loading import revert_weight_conversion

from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.stored_names import (
    Renaming,
    naming,
    renamed,
    unwrapped,
    unwrapping,
    wrapped,
)
from deadbench.suite.atlas.config_keys import nest
from deadbench.suite.atlas.small_configs import small_config


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type", ["llava", "segformer", "clip", "mllama", "vit", "qwen2_audio", "internvl", "gpt2"]
)
def test_what_transformers_saves_is_found_again(model_type):
    """Every vector of the model: saved under transformers' choice of name, renamed back to its own."""
    model = build_model(build_config(nest(small_config(model_type)) | {"model_type": model_type}), "meta")
    rules = naming(model).rules
    own = model.state_dict()
    stored = revert_weight_conversion(model, dict(own))
    vectors = {name: tensor for name, tensor in own.items() if tensor.ndim == 1}
    found = {renamed(name, rules) for name in stored}
    assert set(vectors) <= found | {name for name in vectors if "qkv" in name or "_proj.bias" in name}
    if model_type in ("llava", "segformer", "mllama", "qwen2_audio", "internvl"):
        assert not set(own) <= set(stored)  # there is something to rename


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
