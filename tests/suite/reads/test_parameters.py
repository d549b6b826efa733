"""The parameters-only read on real and hostile checkpoints."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.reads.classify import classify
from deadbench.suite.reads.norms_table import list_norms
from deadbench.suite.reads.parameters import read_parameters
from tests.conftest import TINY_NEOX, TWINS, save_tiny, write_checkpoint


def test_minilm_is_read_right_and_cheaply(minilm):
    result, direction_D = classify(str(minilm))
    assert result["error"] is None
    assert (result["family"], result["placement"], result["has_bias"]) == ("layernorm", "post", True)
    assert result["final_norm"] == result["final_norm_tensor"].removesuffix(".weight")
    assert result["final_norm"] == "encoder.layer.5.output.LayerNorm"
    assert (result["hidden_size"], result["eps"], result["scale"]) == (384, 1e-12, "weight")
    assert (result["num_zero_scales"], result["predicted_dim"]) == (3, 3)
    assert 0 < result["bytes_read"] < 100_000
    assert result["bytes_total"] > 90_000_000
    stored = load_file(minilm / "model.safetensors")["encoder.layer.5.output.LayerNorm.weight"].double()
    assert sorted(np.argsort(stored.abs().numpy())[:3]) == [127, 223, 319]
    inverse = stored.abs().min() / stored
    assert direction_D == pytest.approx((inverse / inverse.norm()).numpy(), rel=1e-12)


@pytest.mark.parametrize(("twin", "family"), [("layernorm", "layernorm"), ("rmsnorm", "rmsnorm")])
def test_twins_are_told_apart(twin, family):
    result, _ = classify(str(TWINS / twin / "step4096"))
    assert (result["family"], result["error"]) == (family, None)
    assert result["predicted_dim"] == (1 if family == "layernorm" else 0)
    assert (result["depth_predicted"] is None) == (family == "rmsnorm")


def test_tensor_names_with_a_prefix_and_shards(tmp_path):
    folder = save_tiny(tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in chosen}, folder / f"part{part}.safetensors")
    weight_map = {n: f"part{part}.safetensors" for part, chosen in enumerate((names[::2], names[1::2])) for n in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole, v_whole = classify(str(folder))
    (folder / "model.safetensors").unlink()
    sharded, v_sharded = classify(str(folder))
    assert sharded["final_norm_tensor"] == whole["final_norm_tensor"] == "gpt_neox.final_layer_norm.weight"
    assert np.array_equal(v_whole, v_sharded)


def test_a_url_reads_the_same_as_a_folder(tmp_path):
    import fsspec

    folder = save_tiny(tmp_path / "model")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/deadbench-test", recursive=True)
    local, v_local = classify(str(folder))
    remote, v_remote = classify("memory://deadbench-test")
    assert remote["error"] is None
    assert np.array_equal(v_local, v_remote)
    assert remote["bytes_read"] == local["bytes_read"] < remote["bytes_total"]
    memory.rm("/deadbench-test", recursive=True)


def bad_checkpoint(kind, folder):
    """A checkpoint with one thing wrong."""
    save_tiny(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "missing":
        shutil.rmtree(folder)
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "absurd header":
        weights.write_bytes(b"\xff" * 7 + b"\x00" + weights.read_bytes()[8:])
    elif kind == "wrong dtype":
        tensors = load_file(weights)
        tensors["gpt_neox.final_layer_norm.weight"] = torch.ones(16, dtype=torch.int64)
        save_file(tensors, weights)
    elif kind == "wrong width":
        tensors = load_file(weights)
        tensors["gpt_neox.final_layer_norm.weight"] = torch.ones(8)
        save_file(tensors, weights)
    elif kind == "nan":
        tensors = load_file(weights)
        tensors["gpt_neox.final_layer_norm.weight"][3] = torch.nan
        save_file(tensors, weights)
    elif kind == "pickled":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "remote code":
        config.write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}))
    elif kind == "no config":
        config.unlink()
    elif kind == "broken config":
        config.write_text("{")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such directory"),
        ("truncated", "beyond the end of the file"),
        ("absurd header", "header claims"),
        ("wrong dtype", "is I64"),
        ("wrong width", "has 8 values"),
        ("nan", "not finite"),
        ("pickled", "not written by torch.save"),
        ("remote code", "never run"),
        ("no config", "no config.json"),
        ("broken config", "not JSON"),
    ],
)
def test_bad_checkpoints_are_one_line_and_null_fields(kind, message, tmp_path):
    result, direction_D = classify(bad_checkpoint(kind, tmp_path / "bad"))
    assert message in result["error"]
    assert "\n" not in result["error"]
    assert (result["final_norm"], result["scale_harmonic"], direction_D) == (None, None, None)


def test_an_unknown_architecture_is_undetermined_not_guessed(tmp_path):
    tensors = {"model.norm.weight": np.ones(8, np.float32)}
    folder = write_checkpoint(tmp_path / "x", {"model_type": "nonesuch", "hidden_size": 8}, tensors)
    result, direction_D = classify(str(folder))
    assert (result["family"], result["hidden_size"], direction_D) == ("undetermined", 8, None)
    assert "unknown to transformers" in result["evidence"][0]


def test_a_checkpoint_that_lacks_the_final_norm_is_undetermined(tmp_path):
    folder = save_tiny(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["gpt_neox.final_layer_norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    result, _ = classify(str(folder))
    assert result["family"] == "undetermined"
    assert "no tensor for final_layer_norm.weight" in result["evidence"][-1]


@pytest.mark.parametrize("verify", [False, True])
def test_a_post_norm_checkpoint_of_more_blocks_than_its_configuration_is_undetermined(tmp_path, verify):
    """The norm of the last block that the configuration has is in the middle of the model that was trained."""
    folder = save_tiny(tmp_path / "m", TINY_NEOX | {"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    config = json.loads((folder / "config.json").read_text())
    assert classify(str(folder), verify)[0]["final_norm_tensor"] == "bert.encoder.layer.1.output.LayerNorm.weight"
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    result, _ = classify(str(folder), verify)
    assert result["family"] == "undetermined"
    assert "stores bert.encoder.layer.1.output.LayerNorm.weight, which the arch" in result["evidence"][-1]


def test_norms_are_listed_with_roles(minilm):
    checkpoint = Checkpoint(str(minilm))
    rows = {row["norm"]: row for row in list_norms(checkpoint, read_parameters(checkpoint))}
    assert len(rows) == 13
    roles = [row["role"] for row in rows.values()]
    assert (roles.count("final"), roles.count("block"), roles.count("embedding")) == (1, 11, 1)
    final = rows["encoder.layer.5.output.LayerNorm"]
    assert (final["role"], final["num_zero_scales"], final["family"]) == ("final", 3, "layernorm")
    assert checkpoint.bytes_read < 100_000


def test_scales_come_from_the_file_and_not_from_the_initialiser(tmp_path):
    scales = np.linspace(0.5, 2, TINY_NEOX["hidden_size"])
    result, direction_D = classify(str(save_tiny(tmp_path / "m", scales=scales)))
    stored = scales.astype(np.float32).astype(np.float64)
    assert direction_D == pytest.approx((1 / stored) / np.linalg.norm(1 / stored), rel=1e-12)
    assert result["scale_harmonic"] == pytest.approx(len(stored) / np.sum(stored**-2), rel=1e-12)


def test_dead_parameters_of_minilm_and_the_twins_by_hand(minilm):
    """BERT, D 384, MLP 1536: 3 maps read a block's output, 1 its attention's; each linear map out has one a column."""
    checkpoint = Checkpoint(str(minilm))
    rows = {row["norm"]: row for row in list_norms(checkpoint, read_parameters(checkpoint))}
    embedded = 30522 + 512 + 2
    assert rows["embeddings.LayerNorm"]["dead_parameters"] == 3 * 384 + embedded
    assert rows["encoder.layer.0.attention.output.LayerNorm"]["dead_parameters"] == 1536 + 384 + 1
    assert rows["encoder.layer.5.output.LayerNorm"]["dead_parameters"] == 384 + 1536 + 1  # the pooler reads the last
    assert rows["encoder.layer.5.output.LayerNorm"]["dead_parameters_written"] == 1536 + 1
    checkpoint = Checkpoint(str(TWINS / "rmsnorm/step4096"))
    assert {row["dead_parameters"] for row in list_norms(checkpoint, read_parameters(checkpoint))} == {0}
    # A GPT-NeoX block reads both its norms with biases (3 D and the MLP's 160); the head has none, and counts nothing.
    checkpoint = Checkpoint(str(TWINS / "layernorm/step4096"))
    rows = {row["norm"]: row for row in list_norms(checkpoint, read_parameters(checkpoint))}
    assert sum(row["dead_parameters"] for row in rows.values()) == 512 + 4 * (3 * 64 + 160 + 64 + 1 + 160 + 1)
    assert rows["final_layer_norm"]["dead_parameters"] == 64 + 1 + 160 + 1
