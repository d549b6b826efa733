"""What a SOURCE may be, and that a changed checkpoint does not look like the old one."""

import os
import subprocess
import sys

import pytest

from suite.sources import Checkpoint, checkpoint_step
from suite.tensors import CheckpointError
from tests.conftest import ROOT, save_tiny


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no such directory"),
        ("no-slash", "no such directory, and neither a Hub id"),
        ("../up/one", "no such directory"),
        ("nosuchprotocol://x", "cannot be read"),
    ],
)
def test_sources_that_are_none(source, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(source)


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint(str(tmp_path / "f"))


def test_a_missing_step_lists_what_there_is(tmp_path):
    (tmp_path / "step1").mkdir()
    with pytest.raises(CheckpointError, match="the checkpoints are step1"):
        Checkpoint(str(tmp_path), "step2")


def test_hub_ids_carry_their_revision_and_offline_is_one_line():
    checkpoint = Checkpoint("org/name@refs/pr/1")
    assert checkpoint.revision == "refs/pr/1"
    assert Checkpoint("org/name").revision == "main"
    with pytest.raises(CheckpointError, match=r"^org/name") as caught:
        checkpoint.config()
    assert "\n" not in str(caught.value)


def test_relative_folders_are_found_beside_the_registry(tmp_path, monkeypatch):
    save_tiny(tmp_path / "models" / "m")
    monkeypatch.chdir("/")
    assert Checkpoint("models/m", base=tmp_path).config()["model_type"] == "gpt_neox"


def test_the_fingerprint_follows_the_files(tmp_path):
    folder = save_tiny(tmp_path / "m")
    before = Checkpoint(str(folder)).fingerprint()
    assert Checkpoint(str(folder)).fingerprint() == before
    save_tiny(folder, seed=1)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert Checkpoint(str(folder)).fingerprint() != before


@pytest.mark.parametrize(
    ("name", "step"),
    [("step1000", 1000), ("global_step20", 20), ("stage1-step150-tokens1B", 150), ("main", None), (None, None)],
)
def test_steps_are_read_from_names(name, step):
    assert checkpoint_step(name) == step


@pytest.mark.parametrize("package", ["suite", "analysis"])
def test_imports_flow_one_way(package):
    forbidden = {"suite": ("runners", "analysis"), "analysis": ("runners",)}[package]
    for path in (ROOT / package).rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in forbidden, f"{path}: {line}"


def test_the_command_line_starts_without_heavy_imports():
    heavy = "{'torch', 'transformers', 'ray', 'polars', 'pydantic', 'altair'}"
    code = f"import sys, runners.cli; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
