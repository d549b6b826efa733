"""A configuration that names no architecture is of the one whose tensors have such names, where that is one alone."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.tensor_kinds import model_types_of
from deadbench.suite.reads.classify import classify
from tests.conftest import TINY_NEOX, save_tiny
from tests.suite.checkpoints.dialects import writers


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("neox"))


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_names_of_one_architecture_alone(wrapper, neox, tmp_path):
    """Without model_type and architectures; as the published class saves it, and the bare model."""
    state = load_file(neox / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in TINY_NEOX.items() if key not in ("model_type", "architectures")})
    )
    save_file({f"{wrapper}{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    result, expected = classify(str(tmp_path))[0], classify(str(neox))[0]
    assert result["error"] is None
    assert [result[key] for key in ("family", "final_norm", "scale_harmonic")] == [
        expected[key] for key in ("family", "final_norm", "scale_harmonic")
    ]
    bare = [name.removeprefix("gpt_neox.") for name in state if name.startswith("gpt_neox.")]
    assert model_types_of(bare) == ["gpt_neox"]


def test_what_loads_the_weights_is_told_too(neox, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in TINY_NEOX.items() if key not in ("model_type", "architectures")})
    )
    save_file(load_file(neox / "model.safetensors"), tmp_path / "model.safetensors")
    with Checkpoint(str(tmp_path)).local_copy() as local:
        assert json.loads((local / "config.json").read_text())["model_type"] == "gpt_neox"


def test_names_of_several_are_undetermined_and_said(tmp_path):
    folder = save_tiny(tmp_path / "llama", writers.LLAMA)
    told = {key: value for key, value in writers.LLAMA.items() if key not in ("model_type", "architectures")}
    (folder / "config.json").write_text(json.dumps(told))
    result, _ = classify(str(folder))
    assert (result["family"], result["error"]) == ("undetermined", None)
    assert "--model-type" in result["evidence"][0]
    assert "could be of" in result["evidence"][1]
    assert {"llama", "mistral"} <= set(result["evidence"][1].replace(",", "").replace(":", "").split())
    assert classify(str(folder), model_type="llama")[0]["family"] == "rmsnorm"


def test_a_bias_in_a_block_is_another_architecture():
    names = ["embed_tokens.weight", "norm.weight"]
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
    names += [f"layers.{block}.{part}.weight" for block in range(2) for part in parts]
    assert "llama" in model_types_of(names)
    assert "qwen2" in model_types_of([*names, *(f"layers.0.self_attn.{kind}_proj.bias" for kind in "qkv")])
    assert "llama" not in model_types_of([*names, "layers.0.self_attn.q_proj.bias"])
    assert model_types_of(["a", "b.0.c"]) == []
    assert model_types_of([]) == []


@pytest.mark.subprocess
def test_classify_by_names_stays_free_of_torch(neox, tmp_path):
    told = {key: value for key, value in TINY_NEOX.items() if key not in ("model_type", "architectures")}
    (tmp_path / "config.json").write_text(json.dumps(told))
    save_file(load_file(neox / "model.safetensors"), tmp_path / "model.safetensors")
    program = (
        "import sys, deadbench; found = deadbench.classify(sys.argv[1]); "
        "assert found['family'] == 'layernorm', found; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)


def timm_folder(folder, norm, architecture="vit_tiny_patch16_224"):
    gamma = torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.5
    state = {f"{norm}.weight": gamma, f"{norm}.bias": torch.zeros(16), "cls_token": torch.zeros(1, 1, 16)}
    state |= {f"blocks.{n}.norm1.weight": torch.ones(16) for n in range(2)}
    save_file(state, folder / "model.safetensors")
    told = {"architecture": architecture, "num_classes": 10, "num_features": 16, "pretrained_cfg": {"tag": "a"}}
    (folder / "config.json").write_text(json.dumps(told))
    return gamma.double()


@pytest.mark.parametrize(
    ("norm", "architecture", "eps"),
    [
        ("norm", "vit_tiny_patch16_224", 1e-6), ("fc_norm", "vit_small_patch16_224", 1e-6),
        ("norm", "vit_base_patch32_clip_224", 1e-5), ("norm", "swin_tiny_patch4_window7_224", 1e-5),
    ],
)  # fmt: skip
def test_timms_final_norm(norm, architecture, eps, tmp_path):
    gamma = timm_folder(tmp_path, norm, architecture)
    result, _ = classify(str(tmp_path))
    assert (result["error"], result["family"], result["placement"]) == (None, "layernorm", "pre")
    assert (result["final_norm"], result["final_norm_tensor"]) == (f"timm_model.{norm}", f"{norm}.weight")
    assert (result["eps"], result["hidden_size"], result["has_bias"]) == (eps, 16, True)
    assert result["scale_harmonic"] == pytest.approx(16 / float((1 / gamma**2).sum()), rel=1e-12)


def test_a_timm_architecture_that_no_table_has(tmp_path):
    timm_folder(tmp_path, "norm", "some_new_net")
    result, _ = classify(str(tmp_path))
    assert (result["family"], result["error"]) == ("undetermined", None)
    assert "pip install timm" in result["evidence"][0]
