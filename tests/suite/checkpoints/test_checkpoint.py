"""What a SOURCE may be, and that a changed checkpoint does not look like the old one."""

import os
import subprocess
import sys

import pytest

from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.headers import read_headers
from deadbench.suite.checkpoints.opening import list_revisions
from deadbench.suite.checkpoints.sources import identify
from deadbench.suite.errors import CheckpointError
from tests.conftest import ROOT, save_tiny, write_checkpoint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no such directory"),
        ("no-slash", "no such directory, and neither a Hub id"),
        ("../up/one", "no such directory"),
        ("nosuchprotocol://x", "cannot be read"),
        ("no/such.pt", "^no/such.pt: no such file, and neither a Hub id"),
        ("/no/such.safetensors", "^/no/such.safetensors: no such file"),
        ("~nobody-of-that-name/x", "no such directory, and neither a Hub id"),
    ],
)
def test_sources_that_are_none(source, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(source).headers()


def test_a_single_file_is_named_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.safetensors").write_bytes(b"abc")
    for source in ("t.safetensors", "./t.safetensors", str(tmp_path / "t.safetensors")):
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(source).headers()
        assert str(caught.value) == f"{source}: 3 bytes, too short for a safetensors file; download it again"


def test_a_folder_whose_name_begins_with_a_tilde(tmp_path, monkeypatch):
    """`~t` is the home of a user t alone where there is one."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "~no-user-of-that-name", {"model_type": "gpt2"})
    for source in ("~no-user-of-that-name", "./~no-user-of-that-name"):
        assert Checkpoint(source).config() == {"model_type": "gpt2"}


def test_hidden_files_are_no_part_of_a_checkpoint(tmp_path):
    """`._NAME` of macOS beside the weights, an editor's copy of the configuration, a folder of git among a series."""
    series = tmp_path / "series"
    folder = save_tiny(series / "step1")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    plain = Checkpoint(str(folder)).fingerprint()
    for name in ("._model.fp16.safetensors", ".config.json"):
        (folder / name).write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    (folder / "._link.safetensors").symlink_to(__file__)
    (series / ".git").mkdir()
    checkpoint = Checkpoint(str(folder))
    assert not [name for name in checkpoint.names() if name.startswith(".")]
    assert checkpoint.fingerprint() == plain
    assert read_headers(checkpoint)
    assert list_revisions(str(series)) == ["step1"]
    hidden = tmp_path / ".cache"
    series.rename(hidden)
    assert read_headers(Checkpoint(str(hidden / "step1"))), "a folder that is named is read whatever its name"


def test_a_file_is_not_a_checkpoint(tmp_path, monkeypatch):
    """Nor is its path, which may look like a Hub id, one."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ids.npy").write_text("x")
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / "data" / "ids.npy"), "data/ids.npy"):
        with pytest.raises(CheckpointError, match=f"^{source}: not a directory"):
            Checkpoint(source)


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


@pytest.mark.parametrize("name", ["exp::1", "a::x", "data:1", "zip::exp"])
def test_a_folder_with_colons_is_that_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "exp", {"model_type": "another"})
    write_checkpoint(tmp_path / name, {"model_type": "gpt2"})
    write_checkpoint(tmp_path / name / "step::1", {"model_type": "gpt_neox"})
    for source in (name, f"./{name}", str(tmp_path / name)):
        assert Checkpoint(source).config() == {"model_type": "gpt2"}
        assert Checkpoint(source, "step::1").config() == {"model_type": "gpt_neox"}
    assert identify(name) == (name, None)
    assert list_revisions(name) == ["step::1"]


def test_the_fingerprint_follows_the_files(tmp_path):
    folder = save_tiny(tmp_path / "m")
    before = Checkpoint(str(folder)).fingerprint()
    assert Checkpoint(str(folder)).fingerprint() == before
    save_tiny(folder, seed=1)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert Checkpoint(str(folder)).fingerprint() != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[" * 100_000, "config.json is not JSON .nested too deeply"),
        ("[1]", "config.json is not a JSON object"),
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ('{"model_type": "gpt2", "n_layer": 1000000000}', "n_layer is 1000000000; no model has more"),
        ('{"vision_config": {"depths": [2, 1e300]}}', "depths is .*; no model has more"),
        ('{"num_labels": 1000000000}', "num_labels is 1000000000; no model"),
    ],
)
def test_configurations_that_are_none(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(str(tmp_path)).config()
    assert "\n" not in str(caught.value)


def test_links_may_stay_or_lead_into_the_hubs_cache_and_nowhere_else(tmp_path):
    snapshot = save_tiny(tmp_path / "models--org--m" / "snapshots" / "1a2b")
    blobs = tmp_path / "models--org--m" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    (snapshot / "again.json").symlink_to("config.json")
    assert {"again.json", "model.safetensors"} <= set(Checkpoint(str(snapshot)).names())
    (tmp_path / "blobs").mkdir()
    for target in (
        "/etc/passwd",
        tmp_path / "blobs" / "secret",
        tmp_path / "elsewhere.json",
        blobs / ".." / "other.json",
    ):
        if target != "/etc/passwd":
            target.write_text("{}")
        (snapshot / "secret.json").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"secret.json: a link to .*, outside the checkpoint"):
            Checkpoint(str(snapshot)).names()
        (snapshot / "secret.json").unlink()


def test_a_series_is_listed_where_it_is(tmp_path):
    for name in ("step1", "step20", "other"):
        (tmp_path / "series" / name).mkdir(parents=True)
    assert list_revisions(str(tmp_path / "series")) == ["other", "step1", "step20"]


@pytest.mark.parametrize("package", ["suite", "analysis"])
def test_imports_flow_one_way(package):
    forbidden = {"suite": ("runners", "analysis"), "analysis": ("runners",)}[package]
    imports = [
        (path, line.split()[1])
        for path in (ROOT / package).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.split()[:1] in (["import"], ["from"])
    ]
    ours = [(path, module.split(".")[1]) for path, module in imports if module.startswith("deadbench.")]
    assert {room for _, room in ours} >= {package}
    assert [(path, room) for path, room in ours if room in forbidden] == []


@pytest.mark.subprocess
def test_the_command_line_starts_without_heavy_imports():
    heavy = "{'torch', 'transformers', 'ray', 'polars', 'pydantic', 'altair'}"
    code = f"import sys, deadbench.runners.cli.main; sys.exit(str(x) if (x := {heavy} & {{*sys.modules}}) else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
