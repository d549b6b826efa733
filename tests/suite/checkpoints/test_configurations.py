"""Of what architecture a SOURCE is: by its config.json, by --config and --model-type, by what a file records."""

import json

import pytest
import torch

import deadbench
from deadbench.runners.engines.resident import TorchEngine
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.configurations import checked
from deadbench.suite.errors import CheckpointError
from deadbench.suite.reads.classify import classify
from tests.conftest import TINY_NEOX, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("BertForMaskedLM", "bert"),
        ("BertModel", "bert"),
        ("AlbertForMaskedLM", "albert"),
        ("GPT2LMHeadModel", "gpt2"),  # which gpt-sw3 borrows
        ("GPTNeoXForCausalLM", "gpt_neox"),
        ("OPTForCausalLM", "opt"),
        ("LlamaForCausalLM", "llama"),
        ("Qwen2MoeForCausalLM", "qwen2_moe"),
        ("ViTForImageClassification", "vit"),
        ("MyOwnModel", None),
    ],
)
def test_a_configuration_without_model_type_is_of_its_architecture(architecture, model_type):
    assert checked({"architectures": [architecture]}, "c").get("model_type") == model_type


@pytest.mark.parametrize("architectures", [None, [], "GPT2Model", [3], {"a": 1}])
def test_what_names_no_architecture_stays_without(architectures):
    assert "model_type" not in checked({"architectures": architectures}, "c")
    assert checked({"architectures": architectures}, "c", "opt")["model_type"] == "opt"
    assert checked({"model_type": "bert"}, "c", "opt")["model_type"] == "bert"


@pytest.mark.parametrize(
    "told",
    [
        {"attn_implementation": "nobody/kernel"},
        {"text_config": {"_attn_implementation": {"": "nobody/kernel@main:f"}}},
        {"layers": [{"experts_implementation": "nobody/kernel"}]},
        {"backbone": "hf_hub:nobody/nothing"},
        {"architecture": "local-dir:/etc"},
        {"model_args": {"checkpoint_path": "other.pth"}},
        {"backbone_config": {"model_args": {"pretrained_cfg_overlay": {"file": "other.pth"}}}},
    ],
)
def test_code_and_values_from_elsewhere_are_refused_in_one_line(told):
    with pytest.raises(CheckpointError, match="^c: .*(take the key out|timm's architecture|take it out)$"):
        checked({"model_type": "bert"} | told, "c")


def test_what_only_looks_as_if_it_named_another_place_stays():
    timms = {"architecture": "vit_base", "pretrained_cfg": {"url": "http://a/b"}, "model_args": {"img_size": 64}}
    told = {"attn_implementation": "sdpa", "_attn_implementation_autoset": True, "_name_or_path": "org/name"}
    assert checked({"model_type": "bert"} | timms | told, "c") == {"model_type": "bert"} | timms | told


def test_a_configuration_from_elsewhere_and_a_model_type(tiny, tmp_path):
    expected, _ = classify(str(tiny))
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes((tiny / "model.safetensors").read_bytes())
    result, _ = classify(str(alone))
    assert "no config.json" in result["error"]
    result, _ = classify(str(alone), config=json.loads((tiny / "config.json").read_text()))
    assert (result["error"], result["scale_harmonic"]) == (None, expected["scale_harmonic"])
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in TINY_NEOX.items() if k not in ("model_type", "architectures")})
    )
    result, _ = classify(str(alone))  # by the names of its tensors
    assert (result["family"], result["scale_harmonic"]) == ("layernorm", expected["scale_harmonic"])
    result, _ = classify(str(alone), model_type="gpt_neox")
    assert (result["family"], result["scale_harmonic"]) == ("layernorm", expected["scale_harmonic"])
    before = Checkpoint(str(alone), model_type="gpt_neox").fingerprint()
    assert Checkpoint(str(alone), config={"model_type": "gpt_neox"}).fingerprint() != before


def test_from_python_a_configuration_is_its_contents_or_its_path(tiny, tmp_path):
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes((tiny / "model.safetensors").read_bytes())
    contents = json.loads((tiny / "config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(contents))
    found = [
        deadbench.classify(alone, config=c) for c in (contents, tiny / "config.json", tiny, tmp_path / "other.json")
    ]
    assert [each["error"] for each in found] == [None] * 4
    assert len({each["scale_harmonic"] for each in found}) == 1


@pytest.mark.parametrize("told", [{"architectures": ["GPTNeoXForCausalLM"]}, {}])
def test_what_loads_the_weights_is_told_the_model_type_too(told, tiny, tmp_path):
    content = {k: v for k, v in TINY_NEOX.items() if k not in ("model_type", "architectures")}
    (tmp_path / "config.json").write_text(json.dumps(content | told))
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    checkpoint = Checkpoint(str(tmp_path), model_type=None if told else "gpt_neox")
    with checkpoint.local_copy() as local:
        model = TorchEngine(torch.device("cpu")).load_trained(local, torch.float32)
    assert model.config.model_type == "gpt_neox"


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_records_its_own_configuration(bias, tmp_path):
    D, args = (
        8,
        {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": bias, "vocab_size": 11, "dropout": 0.0},
    )
    state = {"transformer.wte.weight": torch.randn(11, D), "transformer.ln_f.weight": torch.rand(D) + 0.5}
    state |= {"transformer.ln_f.bias": torch.randn(D)} if bias else {}
    for layer in range(2):
        for norm in ("ln_1", "ln_2"):
            state[f"transformer.h.{layer}.{norm}.weight"] = torch.ones(D)
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    torch.save(
        {"model": wrapped, "model_args": args, "iter_num": 250, "config": {"init_from": "scratch"}},
        tmp_path / "ckpt.pt",
    )
    result, _ = classify(str(tmp_path / "ckpt.pt"))
    assert result["error"] is None
    assert (result["family"], result["final_norm"], result["source_step"]) == ("layernorm", "ln_f", 250)
    assert result["final_norm_tensor"] == "_orig_mod.transformer.ln_f.weight"
    gamma = state["transformer.ln_f.weight"].double()
    assert result["scale_harmonic"] == pytest.approx(D / float((1 / gamma**2).sum()), rel=1e-12)


def test_recorded_counts_are_checked(tmp_path):
    args = {"n_layer": 10**9, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 11}
    torch.save({"model": {"a": torch.ones(1)}, "model_args": args}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="no model has more"):
        Checkpoint(str(tmp_path / "ckpt.pt")).config()


@pytest.mark.parametrize(("classes", "published"), [(0, "TimmWrapperModel"), (7, "TimmWrapperForImageClassification")])
def test_timms_models_without_classes_have_no_head(classes, published):
    told = {"architecture": "vit_small_patch14_dinov2", "num_classes": classes, "num_features": 8}
    assert checked(told, "c")["architectures"] == [published]


def test_timms_number_of_classes_is_given_once():
    """timm writes it among the arguments of the model too, where transformers' wrapper gives its own."""
    told = {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "num_features": 192}
    told["model_args"] = {"num_classes": 7, "img_size": [224, 224]}
    found = checked(told, "config.json")
    assert (found["model_type"], found["num_labels"], found["num_classes"]) == ("timm_wrapper", 7, 7)
    assert found["model_args"] == {"img_size": [224, 224]}
    assert found["architectures"] == ["TimmWrapperForImageClassification"]
    assert checked(told, "config.json", "vit")["model_type"] == "vit"
