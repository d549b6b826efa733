"""A folder without weights says what is there instead and what to do, and which folder it is."""

import json

import pytest

from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.headers import read_headers
from deadbench.suite.errors import CheckpointError

CONFIG = json.dumps({"model_type": "gpt2", "n_embd": 32})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 145448\n"


def folder(root, **files):
    root.mkdir(parents=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)
    return root


def told(source):
    """The one line, of whichever is asked for first: configuration or weights."""
    checkpoint = Checkpoint(str(source))
    with pytest.raises(CheckpointError) as caught:
        _ = checkpoint.config() and read_headers(checkpoint)
    text = str(caught.value)
    assert text.startswith(f"{source}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"adapter_config__json": '{"base_model_name_or_path": "org/base"}', "adapter_model__safetensors": "x" * 20},
            "an adapter alone (adapter_config.json), without its base org/base; merge it",
        ),
        ({"adapter_config__json": "[]", "config__json": CONFIG}, "an adapter alone (adapter_config.json)"),
        ({"model__gguf": "GGUF"}, "model.gguf: the header is cut off"),
        (
            {"config__json": CONFIG, "shard__distcp": "x"},
            "shards of torch.distributed.checkpoint (shard.distcp) without the .metadata",
        ),
        (
            {"config__json": CONFIG, "pytorch_model__bin": "x"},
            "pytorch_model.bin: not written by torch.save (it begins with b'x')",
        ),
        ({"config__json": CONFIG, "model__safetensors": POINTER}, "a Git LFS pointer, not the weights: run `git lfs"),
        ({"config__json": CONFIG, "model__safetensors": "x" * 200}, "the header claims"),
        ({"config__json": POINTER}, "config.json is a Git LFS pointer, not the file itself: run `git lfs pull`"),
        (
            {"config__json": CONFIG, "model__safetensors__index__json": POINTER},
            "model.safetensors.index.json is a Git LFS pointer",
        ),
        ({"m__gguf": POINTER}, "m.gguf is a Git LFS pointer, not the weights: run `git lfs"),
        ({"config__json": CONFIG, "model__safetensors": ""}, "0 bytes, too short for a safetensors file; download it"),
        (
            {"config__json": CONFIG, "model__safetensors": "<!DOCTYPE html>\n<html>log in"},
            "model.safetensors is a text, not weights (it begins with '<!DOCTYPE html>\\n<html>log in'), as a server's",
        ),
        ({"config__json": CONFIG, "model__safetensors": "{" + "\0" * 20}, "the header claims 123 bytes"),
        (
            {"config__json": CONFIG, "model-00002-of-00003__safetensors": "x"},
            "model-00002-of-00003.safetensors is one of 3 files; copy the others and their index beside it",
        ),
        (
            {"config__json": CONFIG, "pytorch_model-00001-of-00002__bin": "x"},
            "pytorch_model-00001-of-00002.bin is one of 2 files",
        ),
        ({"config__json": CONFIG, "model__onnx": "x"}, "only weights of another library (model.onnx); load and save"),
        (
            {"config__json": CONFIG, "model__safetensors__part": "x"},
            "a download that did not end (model.safetensors.part); download it again",
        ),
        ({"weights__tar__gz": "x"}, "an archive (weights.tar.gz); unpack it"),
        ({"params__json": "{}", "tokenizer__model": "x"}, "weights in the form of Meta's releases (params.json)"),
        (
            {"config__json": CONFIG, "optimizer__pt": "x"},
            "a state of training (optimizer.pt) without the model's weights",
        ),
        ({"a-Q4__gguf": "GGUF", "a-Q8__gguf": "GGUF"}, "2 gguf files and no"),
        ({"config__json": CONFIG}, "no model.safetensors and no model.safetensors.index.json"),
        ({"notes__txt": "x"}, "no config.json; not a transformers checkpoint"),
        ({}, "an empty folder"),
    ],
)
def test_each_cause_is_named_with_its_remedy(files, expected, tmp_path):
    assert expected in told(folder(tmp_path / "model", **files))


def test_links_of_a_cache_whose_files_are_gone(tmp_path):
    snapshot = folder(tmp_path / "models--org--name" / "snapshots" / "abc")
    for file in ("config.json", "model.safetensors"):
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    text = told(snapshot)
    assert "links to files that are gone (config.json, model.safetensors)" in text
    assert text.endswith("download it again: hf download org/name")
    assert f"give {snapshot}" in told(snapshot.parents[1])
    (snapshot.parents[1] / "snapshots" / "abd").mkdir()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert f"give {snapshot}" in told(snapshot.parents[1]), "the branch's own, of several"
    assert "give one of its Hub ids: org/name" in told(tmp_path)
    home = folder(tmp_path / "home")
    (home / "hub").mkdir()
    (tmp_path / "models--org--name").rename(home / "hub" / "models--org--name")
    assert "give one of its Hub ids: org/name" in told(home)
    empty = folder(tmp_path / "models--org--gone")
    assert "of which nothing is here; give the Hub id" in told(empty)


def test_weights_in_a_folder_below(tmp_path):
    root = folder(tmp_path / "model", config__json=CONFIG)
    folder(root / "optimizer_0", shard__distcp="x")
    assert "no model.safetensors and" in told(root)
    folder(root / "pytorch_model_fsdp_0", shard__distcp="x")
    assert told(root).endswith("no weights in it, but in a folder below; give model/pytorch_model_fsdp_0")


def test_a_link_to_what_is_gone(tmp_path):
    (tmp_path / "model").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"model: a link to gone, which is not there; mend the link$"):
        Checkpoint(str(tmp_path / "model"))


def test_weights_that_are_gone_beside_a_configuration(tmp_path):
    root = folder(tmp_path / "model", config__json=CONFIG)
    (root / "model.safetensors").symlink_to("../blobs/gone")
    assert "links to files that are gone (model.safetensors)" in told(root)


def test_a_folder_of_checkpoints(tmp_path):
    folder(tmp_path / "run" / "checkpoint-10", config__json=CONFIG)
    assert "give one: run/checkpoint-10" in told(tmp_path / "run")
