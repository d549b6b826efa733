"""The final norm's tensor among others of its name: what transformers would load, or all that could be it."""

import pytest

from deadbench.suite.architectures.stored_names import Naming, Renaming
from deadbench.suite.architectures.stored_tensors import StoredTensors
from deadbench.suite.checkpoints.tensors import TensorEntry

LLAMA = [
    "embed_tokens.weight", "layers.0.input_layernorm.weight", "layers.0.mlp.norm.weight", "layers.1.mlp.norm.weight",
    "layers.1.linear_attn.norm.weight", "layers.2.shared_head.norm.weight", "norm.weight",
]  # fmt: skip
FINAL = "norm.weight"


def entries(*names):
    return {name: TensorEntry(name, "f", "F32", (4,), 0, 16) for name in names}


LLAMAS = Naming(base="model")


def found(names, path="norm", parameter="weight", naming=LLAMAS):
    return [entry.name for entry in StoredTensors(entries(*names), naming).find(path, parameter)]


def below(*prefixes, without=()):
    return [f"{prefix}{name}" for prefix in prefixes for name in LLAMA if name not in without]


@pytest.mark.parametrize(
    ("prefixes", "read"),
    [
        ([""], [""]),
        (["model."], ["model."]),
        (["_orig_mod.model."], ["_orig_mod.model."]),
        (["module._orig_mod.model."], ["module._orig_mod.model."]),
        (["base_model.model.model."], ["base_model.model.model."]),
        (["base_model.model."], ["base_model.model."]),
        (["model.model."], ["model.model."]),
        (["0.auto_model."], ["0.auto_model."]),
        (["student."], ["student."]),
        (["model.", "ema."], ["model."]),
        (["model.", "model_ema.module.model."], ["model."]),
        (["ema.model.", "model."], ["model."]),
        (["", "ema."], [""]),
        (["model.model.", "ema_model.model."], ["model.model."]),
        (["model.", "module.model."], ["model."]),
        (["policy.model.", "reference.model."], ["policy.model.", "reference.model."]),
        (["policy.", "reference.", "reward."], ["policy.", "reference.", "reward."]),
        (["module.model.", "_orig_mod.model."], ["module.model.", "_orig_mod.model."]),
    ],
)
def test_of_several_models_that_is_read_which_transformers_would_load(prefixes, read):
    assert found(below(*prefixes)) == [f"{prefix}{FINAL}" for prefix in read]


@pytest.mark.parametrize("prefix", ["", "model.", "policy."])
def test_no_other_norm_of_the_name_stands_for_a_missing_one(prefix):
    assert found(below(prefix, without=[FINAL])) == []
    assert found([*below(prefix, without=[FINAL]), "mtp.norm.weight"]) == []
    assert found([*below(prefix, without=[FINAL]), f"{prefix}mtp.norm.weight"]) == []


def test_a_copy_that_an_adapter_trained_and_what_it_replaces_are_both_named():
    copies = [f"base_model.model.model.norm.{copy}.weight" for copy in ("original_module", "modules_to_save.default")]
    assert found([*below("base_model.model.model.", without=[FINAL]), *copies]) == copies
    assert found([*below("model."), *copies]) == ["model.norm.weight"]
    tuned = ["model.norm.base_layer.weight", "model.norm.ln_tuning_layers.default.weight"]
    assert found([*below("model.", without=[FINAL]), *tuned]) == tuned


def test_a_head_with_a_norm_of_the_name_is_not_the_body():
    names = ["beit.embeddings.norm.bias", "beit.layernorm.weight", "layernorm.weight"]
    assert found(names, "layernorm", naming=Naming(base="beit")) == ["beit.layernorm.weight"]
    assert found(names, "layernorm", naming=Naming()) == ["layernorm.weight"]


def test_rules_lead_to_the_bare_model_with_or_without_its_base():
    naming = Naming((Renaming("^language_model.model", "language_model"),), "model")
    for name in ("language_model.model.norm.weight", "model.language_model.norm.weight"):
        assert found([name, "vision.norm.weight"], "language_model.norm", naming=naming) == [name]
    assert found(["language_model.model.norm.weight", "vision.norm.weight"], "language_model.norm") == []
    doubled = ["language_model.model.model.norm.weight", "vision.norm.weight"]
    assert found(doubled, "language_model.norm", naming=naming) == doubled[:1]
    held = ["policy.language_model.model.norm.weight"]
    assert found(held, "language_model.norm", naming=naming) == held
    into = Naming((Renaming(r"^(norm\.)", r"model.language_model.\1"),), "model")
    assert found(["norm.weight"], "language_model.norm", naming=into) == ["norm.weight"]


def test_names_of_before_2019_and_no_name():
    assert found(["norm.gamma", "norm.beta"]) == ["norm.gamma"]
    assert found(["model.norm.gamma", "ema.norm.weight"]) == ["model.norm.gamma"]
    assert found(["norm.gamma", "norm.beta"], parameter="bias") == ["norm.beta"]
    assert found(LLAMA, parameter=None) == []
