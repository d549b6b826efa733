"""The final norm is found by what other libraries call it, and a block's norm is never taken for it."""

import argparse
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from deadbench.suite.reads.classify import classify

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}
LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NEOX = {"model_type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "scale", "shift", "beside"),
    [
        (GPT2, "ln_final.w", "ln_final.b", "blocks.0.ln1.w"),
        (LLAMA, "ln_final.w", None, "blocks.1.ln1.w"),
        (LLAMA, "transformer.ln_f.weight", None, "transformer.h.0.norm_1.weight"),
        (NEOX, "encoder.final_layernorm.weight", "encoder.final_layernorm.bias", "layers.0.final_layernorm.weight"),
        (LLAMA, "module.decoder.final_norm.weight", None, "decoder.layers.0.input_layernorm.weight"),
        (GPT2, "decoder.layer_norm.weight", "decoder.layer_norm.bias", "decoder.layers.0.final_layer_norm.weight"),
    ],
)
def test_each_librarys_name(config, scale, shift, beside, tmp_path):
    gamma = np.random.default_rng(0).uniform(0.5, 1.5, 16).astype("f4")
    tensors = {scale: gamma, beside: np.ones(16, "f4")} | ({shift: gamma} if shift else {})
    save_file(tensors, tmp_path / "weights.safetensors")
    result, _ = classify(str(tmp_path / "weights.safetensors"), config=config)
    assert result["error"] is None
    assert result["final_norm_tensor"] == scale
    assert result["scale_harmonic"] == pytest.approx(16 / (1 / gamma.astype(float) ** 2).sum(), rel=1e-12)


def test_weights_whose_norms_are_folded_away_are_undetermined(tmp_path):
    save_file({"unembed.W_U": np.ones((16, 5), "f4"), "blocks.0.ln1.w": np.ones(16, "f4")}, tmp_path / "w.safetensors")
    result, _ = classify(str(tmp_path / "w.safetensors"), config=GPT2)
    assert result["family"] == "undetermined"
    assert "no tensor for ln_f.weight" in result["evidence"][-1]


@pytest.mark.parametrize(("normalization", "family"), [("LayerNorm", "layernorm"), ("RMSNorm", "rmsnorm")])
@pytest.mark.parametrize("one_more", [False, True])
def test_megatrons_arguments_tell_the_norm(normalization, family, one_more, tmp_path):
    gamma = torch.rand(16) + 0.5
    args = argparse.Namespace(
        num_layers=2, hidden_size=16, normalization=normalization, norm_epsilon=1e-6, apply_layernorm_1p=one_more,
        params_dtype=torch.bfloat16, rng=np.random.default_rng(0).normal(size=3),
    )  # fmt: skip
    norm = {"final_layernorm.weight": gamma - 1 if one_more else gamma}
    norm |= {"final_layernorm.bias": torch.zeros(16)} if family == "layernorm" else {}
    layers = {"layers.0.input_layernorm.weight": torch.ones(16)}
    model = {"language_model": {"encoder": layers | norm}}
    torch.save({"model": model, "args": args, "iteration": 300, "optimizer": {}}, tmp_path / "model_optim_rng.pt")
    result, _ = classify(str(tmp_path / "model_optim_rng.pt"))
    assert result["error"] is None
    assert (result["family"], result["source_step"], result["eps"]) == (family, 300, 1e-6)
    assert result["final_norm_tensor"] == "language_model.encoder.final_layernorm.weight"
    assert result["scale"] == ("1+weight" if one_more else "weight")
    expected = 16 / float((1 / gamma.double() ** 2).sum())
    assert result["scale_harmonic"] == pytest.approx(expected, rel=1e-6 if one_more else 1e-12)
    json.dumps(result)
