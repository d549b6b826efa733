"""An adapter as a SOURCE: its base's norms, or those that it trains, by kilobytes; and what is refused, in one line."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deadbench.suite.checkpoints.adapters import AdaptedCheckpoint, open_checkpoint, read_config
from deadbench.suite.checkpoints.series import series_in
from deadbench.suite.errors import CheckpointError
from deadbench.suite.reads.classify import classify
from deadbench.suite.reads.parameters import read_parameters
from tests.conftest import save_tiny
from tests.suite.checkpoints.servers import misbehaving

NORM = "gpt_neox.final_layer_norm"
MAP = "gpt_neox.layers.0.attention.dense"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("adapters") / "base")


def write_adapter(folder, base, tensors=(), **settings):
    """An adapter as PEFT saves it; `tensors` beside the halves of low rank of one map."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["dense"], "task_type": "CAUSAL_LM"}
    told |= {"base_model_name_or_path": str(base), "auto_mapping": {"parent_library": "os", "base_model_class": "x"}}
    (folder / "adapter_config.json").write_text(json.dumps(told | settings))
    generator = np.random.default_rng(0)
    halves = {
        f"base_model.model.{MAP}.lora_A.weight": generator.normal(size=(2, 16)).astype(np.float32),
        f"base_model.model.{MAP}.lora_B.weight": generator.normal(size=(16, 2)).astype(np.float32),
    }
    save_file(halves | dict(tensors), folder / "adapter_model.safetensors")
    return folder


SCALE, SHIFT = np.linspace(0.5, 2, 16).astype(np.float32), np.linspace(-1, 1, 16).astype(np.float32)


@pytest.mark.parametrize(
    "copy",
    ["", ".modules_to_save", ".modules_to_save.default", ".ln_tuning_layers", ".base_layer"],
    ids=lambda copy: copy or "plain",
)
def test_a_norm_that_the_adapter_trains_takes_the_place_of_the_bases(base, tmp_path, copy):
    path = f"base_model.model.{NORM}{copy}"
    adapter = write_adapter(tmp_path / "adapter", base, {f"{path}.weight": SCALE, f"{path}.bias": SHIFT})
    checkpoint = open_checkpoint(str(adapter))
    read = read_parameters(checkpoint)
    assert isinstance(checkpoint, AdaptedCheckpoint)
    assert read.final_norm_tensor == f"{NORM}.weight"
    assert np.array_equal(read.norm.scale_D, SCALE.astype(np.float64))
    assert np.array_equal(read.norm.shift_D, SHIFT.astype(np.float64))
    (change,) = checkpoint.tensors.changes
    assert (change.path, change.weight, change.bias) == (MAP, f"{MAP}.weight", f"{MAP}.bias")
    assert set(change.tensors) == {"lora_A.weight", "lora_B.weight"}


def test_without_trained_norms_they_are_the_bases_and_kilobytes_are_read(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    found, direction = classify(str(adapter))
    own, expected = classify(str(base))
    assert np.array_equal(direction, expected)
    apart = ("source", "evidence", "bytes_read", "bytes_total", "source_format", "seconds")
    assert {k: v for k, v in found.items() if k not in apart} == {k: v for k, v in own.items() if k not in apart}
    assert found["source_format"] == "peft"
    assert found["evidence"][-1] == f"LORA adapter {adapter}, on its base {base}"
    assert found["bytes_read"] < own["bytes_read"] + 4000
    assert found["bytes_total"] == own["bytes_total"] + (adapter / "adapter_model.safetensors").stat().st_size


def test_the_base_is_found_beside_the_adapter_and_from_here(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "models" / "base")
    beside = write_adapter(tmp_path / "models" / "adapter", "../base")
    here = write_adapter(tmp_path / "adapters" / "one", "models/base")
    monkeypatch.chdir(tmp_path)
    for adapter in (beside, here):
        assert classify(str(adapter))[0]["family"] == "layernorm"
    assert read_config(str(beside))["model_type"] == "gpt_neox"


def test_over_http_only_what_is_asked_for_is_fetched(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    with (adapter / "adapter_model.safetensors").open("r+b") as file:  # a sparse end, which no header names
        os.truncate(file.fileno(), 5_000_000)
    with misbehaving(adapter) as server:
        found, _ = classify(server.url)
    assert (found["family"], found["source_format"], found["error"]) == ("layernorm", "peft", None)
    assert found["bytes_read"] < 100_000


def test_a_fingerprint_is_of_both(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", "../base")
    before = open_checkpoint(str(adapter)).fingerprint()
    os.utime(tmp_path / "base" / "model.safetensors", (1, 1))
    between = open_checkpoint(str(adapter)).fingerprint()
    os.utime(adapter / "adapter_model.safetensors", (1, 1))
    assert len({before, between, open_checkpoint(str(adapter)).fingerprint()}) == 3


def test_a_folder_with_weights_of_its_own_is_read_as_itself(base, tmp_path):
    shutil.copytree(base, tmp_path / "merged")
    write_adapter(tmp_path / "merged", "nowhere/at-all")
    found, _ = classify(str(tmp_path / "merged"))
    assert (found["source_format"], found["error"]) == ("safetensors", None)


def test_a_folder_of_adapters_is_a_series(base, tmp_path):
    for step in (20, 100):
        write_adapter(tmp_path / "run" / f"checkpoint-{step}", base)
    assert series_in(str(tmp_path / "run")).names == ("checkpoint-20", "checkpoint-100")


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("nowhere/at-all", "HF_HUB_OFFLINE is set"),
        ("/nowhere/at/all", "no such directory"),
        ("http://127.0.0.1:9/base", "a URL, which an adapter may not have opened"),
        ("file:///etc", "a URL, which an adapter may not have opened"),
        (".", "it is the adapter itself"),
        ("", "names no base"),
        (None, "names no base"),
        ("a\nb", "names no base"),
    ],
)
def test_a_base_that_cannot_be_had_is_one_line(tmp_path, named, told):
    adapter = write_adapter(tmp_path / "adapter", "x", base_model_name_or_path=named)
    error = classify(str(adapter))[0]["error"]
    assert error.startswith(f"{adapter}: ")
    assert told in error
    assert "base_model_name_or_path" in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({f"base_model.model.{NORM}s.weight": SCALE}, "it trains gpt_neox.final_layer_norms.weight, which its base"),
        ({f"base_model.model.{MAP}.ia3_l": SCALE}, "is none of a LORA adapter"),
    ],
    ids=["a norm", "another kind"],
)
def test_tensors_that_are_not_of_the_base_are_refused(base, tmp_path, tensors, told):
    adapter = write_adapter(tmp_path / "adapter", base, tensors)
    error = classify(str(adapter))[0]["error"]
    assert error.startswith(f"{adapter}: ")
    assert told in error


def test_an_adapter_without_weights_says_so(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_model.safetensors").unlink()
    assert "without adapter_model.safetensors or adapter_model.bin" in classify(str(adapter))[0]["error"]


def test_names_lead_to_a_base_that_is_stored_bare(minilm, tmp_path):
    """The published class has `bert.` before what all-MiniLM stores, and the adapter was trained on that."""
    name = "base_model.model.bert.encoder.layer.5.output.LayerNorm"
    scale = np.linspace(1, 2, 384).astype(np.float32)
    folder = tmp_path / "adapter"
    write_adapter(folder, minilm)
    save_file({f"{name}.weight": scale, f"{name}.bias": scale}, folder / "adapter_model.safetensors")
    read = read_parameters(open_checkpoint(str(folder)))
    assert read.final_norm_tensor == "encoder.layer.5.output.LayerNorm.weight"
    assert np.array_equal(read.norm.scale_D, scale.astype(np.float64))


def test_a_hostile_adapter_leaves_no_trace(base, tmp_path):
    import torch

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "left-behind"), "w")

    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.lora_A.weight": torch.zeros(2), "evil": Evil()}, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"names io\.open"):
        open_checkpoint(str(adapter)).headers()
    assert not Path(tmp_path / "left-behind").exists()


def test_every_command_takes_an_adapter(deadbench, base, tmp_path):
    path = f"base_model.model.{NORM}"
    adapter = write_adapter(tmp_path / "adapter", base, {f"{path}.weight": SCALE, f"{path}.bias": SHIFT})
    code, out, err = deadbench("classify", adapter)
    assert (code, "layernorm" in out) == (0, True), err
    code, _, err = deadbench("export", adapter, "-o", tmp_path / "directions.safetensors")
    assert code == 0, err
    direction = load_file(tmp_path / "directions.safetensors")["final_layer_norm.direction"]
    assert np.allclose(direction * np.linalg.norm(1 / SCALE), 1 / SCALE)
    code, out, err = deadbench("plan", adapter, "--assume", "1x24GB", "--input", "tokens:random", "--json")
    assert (code, {row["read"] for row in json.loads(out)["reads"]}) == (0, {"parameters", "random", "trained"}), err
