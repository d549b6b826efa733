"""GGUF: the metadata tell the architecture and the family; a header that lies is one line."""

import struct
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest

from deadbench.suite.checkpoints.adapters import open_prepared
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.formats.gguf import read_gguf
from deadbench.suite.checkpoints.tensors import read_raw, read_vector
from deadbench.suite.errors import CheckpointError
from deadbench.suite.reads.classify import classify
from deadbench.suite.reads.norms_table import list_norms
from deadbench.suite.reads.parameters import read_parameters
from tests.suite.checkpoints.formats.ggufs import gguf, llama_like, q4_0
from tests.suite.checkpoints.formats.memory import MemoryFiles
from tests.suite.checkpoints.servers import misbehaving

RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
D = 8


LLAMA = {"model_type": "llama", "hidden_size": D, "num_hidden_layers": 2}


def scales(seed=0):
    return np.random.default_rng(seed).uniform(0.5, 1.5, D).astype("f4")


def model(architecture, eps_key, names=("output_norm.weight",), further=None):
    tensors = {"token_embd.weight": np.ones((32, D)), "blk.0.attn_norm.weight": np.ones(D)}
    return gguf(llama_like(architecture, D, 2, eps_key, further), tensors | {name: scales() for name in names})


@pytest.mark.parametrize(
    ("architecture", "eps_key", "family", "final_norm"),
    [
        ("llama", RMS, "rmsnorm", "norm"),
        ("qwen2", RMS, "rmsnorm", "norm"),
        ("qwen3moe", RMS, "rmsnorm", "norm"),
        ("olmo2", RMS, "rmsnorm", "norm"),
        ("mamba", RMS, "rmsnorm", "norm_f"),
        ("gpt2", LAYER, "layernorm", "ln_f"),
        ("gptneox", LAYER, "layernorm", "final_layer_norm"),
        ("falcon", LAYER, "layernorm", "ln_f"),
        ("starcoder2", LAYER, "layernorm", "norm"),
        ("bloom", LAYER, "layernorm", "ln_f"),
        ("no-such-model", RMS, "rmsnorm", "output_norm"),
        ("no-such-model", LAYER, "layernorm", "output_norm"),
    ],
)
def test_the_metadata_tell_architecture_and_family(architecture, eps_key, family, final_norm, tmp_path):
    names = ("output_norm.weight", "output_norm.bias") if family == "layernorm" else ("output_norm.weight",)
    path = tmp_path / "model.gguf"
    path.write_bytes(model(architecture, eps_key, names))
    for source in (path, tmp_path):
        result, direction_D = classify(str(source))
        assert result["error"] is None
        assert (result["family"], result["final_norm"]) == (family, final_norm)
        assert (result["final_norm_tensor"], result["source_format"]) == ("output_norm.weight", "gguf")
        assert result["eps"] == pytest.approx(1e-5)
        assert result["placement"] == "pre"
        gamma = scales().astype(float)
        assert result["scale_harmonic"] == pytest.approx(D / (1 / gamma**2).sum(), rel=1e-12)
        assert abs(direction_D @ (1 / gamma) / np.linalg.norm(1 / gamma)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_scales_that_the_converter_adds_one_to(architecture, tmp_path):
    (tmp_path / "model.gguf").write_bytes(model(architecture, RMS))
    checkpoint = Checkpoint(str(tmp_path))
    read = read_parameters(checkpoint)
    assert (read.final.behaviour.scale, read.final.family) == ("1+weight", "rmsnorm")
    np.testing.assert_allclose(read.norm.scale_D, scales().astype(float), rtol=1e-12)
    (final,) = (row for row in list_norms(checkpoint, read) if row["role"] == "final")
    assert final["scale_max"] == pytest.approx(float(scales().max()), rel=1e-12)


def test_an_encoder_whose_last_block_ends_in_the_norm(tmp_path):
    names = [f"blk.{n}.layer_output_norm.{which}" for n in range(2) for which in ("weight", "bias")]
    (tmp_path / "model.gguf").write_bytes(model("bert", LAYER, names))
    result, _ = classify(str(tmp_path))
    assert (result["family"], result["placement"]) == ("layernorm", "post")
    assert result["final_norm"] == "encoder.layer.1.output.LayerNorm"
    assert result["final_norm_tensor"] == "blk.1.layer_output_norm.weight"


def test_a_family_that_the_architecture_is_not_of(tmp_path):
    (tmp_path / "model.gguf").write_bytes(model("llama", LAYER))
    assert "metadata say layernorm, its architecture is of rmsnorm" in classify(str(tmp_path))[0]["error"]


def test_tensors_of_every_float_type_and_alignment():
    values = np.random.default_rng(1).normal(size=(3, 4)).astype("f4")
    tensors = {"a": values, "b": values, "c": values[0]}
    for alignment in (1, 32, 64):
        facts = {"general.architecture": "llama", "general.alignment": alignment}
        files = MemoryFiles(w__gguf=gguf(facts, tensors, {"b": "F16", "c": "BF16"}, alignment))
        found = {entry.name: entry for entry in read_gguf(files, "w.gguf").entries}
        assert (found["a"].shape, found["b"].dtype, found["c"].dtype) == ((3, 4), "F16", "BF16")
        assert np.array_equal(read_raw(files, found["a"]).view("f4"), values)
        assert np.array_equal(read_raw(files, found["b"]).view("f2"), values.astype("f2"))
        expected = (values[0].view("u4") & 0xFFFF0000).view("f4")
        assert np.array_equal(read_vector(files, found["c"]), expected.astype(float))


def test_other_types_are_unpacked_by_llama_cpps_own_package(tmp_path, monkeypatch):
    """Where it is installed; else a line says how to get it, and the norm is read all the same."""
    wide = np.random.default_rng(1).normal(size=(4, 64)).astype("f4")
    maps = dict.fromkeys(("token_embd.weight", "output.weight"), wide)
    tensors = maps | {"blk.0.attn_norm.weight": np.ones(64), "output_norm.weight": np.ones(64)}
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf(llama_like("llama", 64, 1, RMS), tensors, dict.fromkeys(maps, "Q4_0")))

    def dequantize(rows, kind):
        blocks = rows.reshape(-1, 18)
        halves = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype("f4") - kind
        return (blocks[:, :2].copy().view("<f2").astype("f4") * halves).reshape(len(rows), -1)

    package, quants = ModuleType("gguf"), ModuleType("gguf.quants")
    package.__spec__, package.GGMLQuantizationType, quants.dequantize = (
        ModuleSpec("gguf", None),
        {"Q4_0": 8},
        dequantize,
    )
    monkeypatch.setitem(sys.modules, "gguf", package)
    monkeypatch.setitem(sys.modules, "gguf.quants", quants)
    checkpoint = Checkpoint(str(file))
    entry = checkpoint.headers()["model.embed_tokens.weight"]
    assert (entry.dtype, entry.shape, checkpoint.translation().unfit) == ("F32", (4, 64), None)
    assert np.array_equal(read_raw(checkpoint, entry).view("f4"), q4_0(wide)[1])
    monkeypatch.setitem(sys.modules, "gguf", None)
    for module in ("formats.gguf", "dialects.llama_cpp"):
        monkeypatch.setattr(f"deadbench.suite.checkpoints.{module}.find_spec", lambda name: None)
    checkpoint = Checkpoint(str(file))
    told = "token_embd.weight is Q4_0, whose values are not unpacked here; pip install 'deadbench[gguf]', or give"
    assert told in str(checkpoint.translation().unfit)
    assert classify(str(file))[0]["scale_harmonic"] == 1


@pytest.mark.parametrize("source", ["the folder", "its first file"])
def test_parts_of_one_file(source, tmp_path):
    """The first part has all metadata and may have no tensor; the scales of gemma are stored as their sums with one."""
    whole = llama_like("gemma", D, 2, RMS, {"split.count": 3, "split.no": 0})
    parts = [{}, {"token_embd.weight": np.ones((32, D)), "output.weight": np.ones((32, D))}]
    parts.append({"output_norm.weight": scales() + 1})
    for number, tensors in enumerate(parts):
        facts = whole if number == 0 else {"split.count": 3, "split.no": number}
        (tmp_path / f"m-0000{number + 1}-of-00003.gguf").write_bytes(gguf(facts, tensors))
    path = tmp_path if source == "the folder" else tmp_path / "m-00001-of-00003.gguf"
    checkpoint = Checkpoint(str(path))
    assert read_parameters(checkpoint).norm.scale_D == pytest.approx(scales().astype(float) + 1, abs=1e-6)
    assert checkpoint.config()["vocab_size"] == 32
    assert checkpoint.config()["tie_word_embeddings"] is False
    assert checkpoint.bytes_total() == sum(file.stat().st_size for file in tmp_path.iterdir())
    with checkpoint.local_copy() as local:
        assert read_parameters(open_prepared(local)).columns()["scale_harmonic"] > 0


def test_parts_that_are_not_all_there(tmp_path):
    whole = llama_like("llama", D, 2, RMS, {"split.count": 2, "split.no": 0})
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(gguf(whole, {"token_embd.weight": np.ones((32, D))}))
    assert "m-00002-of-00002.gguf" in classify(str(first))[0]["error"]
    second.write_bytes(gguf({"split.count": 2, "split.no": 1}, {"output_norm.weight": scales()}))
    assert classify(str(first))[0]["error"] is None
    assert "part 2 of 2; give the first" in classify(str(second))[0]["error"]
    renamed = first.rename(tmp_path / "whole.gguf")
    assert "named as …-00001-of-00002.gguf" in classify(str(renamed))[0]["error"]
    assert "2 gguf files and no" in classify(str(tmp_path), config=LLAMA)[0]["error"]
    second.write_bytes(gguf({}, {"output_norm.weight": scales()}))
    renamed.rename(first)
    assert "not the part that its name says" in classify(str(first))[0]["error"]
    first.write_bytes(gguf(whole | {"split.count": 100_000}, {}))
    assert "part 0 of 100000; corrupt" in classify(str(first))[0]["error"]


def test_over_a_web_server_the_tensors_are_not_fetched(tmp_path):
    tensors = {"token_embd.weight": np.ones((64, D)), "large": np.zeros((2_000_000,)), "output_norm.weight": scales()}
    (tmp_path / "model.gguf").write_bytes(gguf(llama_like("llama", D, 2, RMS), tensors))
    with misbehaving(tmp_path) as server:
        result, _ = classify(f"{server.url}/model.gguf")
    assert (result["error"], result["family"]) == (None, "rmsnorm")
    assert result["bytes_read"] < 600_000


GOOD = model("llama", RMS)
SHAPE = GOOD.index(b"output_norm.weight") + len("output_norm.weight") + 4
BROKEN = {
    "cut off": (GOOD[:200], "cut off"),
    "empty": (b"", "cut off"),
    "another magic": (b"GGUX" + GOOD[4:], "not a GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + GOOD[8:], "GGUF of version 50331648"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + GOOD[8:], "GGUF of version 1"),
    "many tensors": (GOOD[:8] + b"\xff" * 8 + GOOD[16:], "at most 1,000,000"),
    "many keys": (GOOD[:16] + b"\xff" * 8 + GOOD[24:], "at most 100,000"),
    "a long key": (GOOD[:24] + b"\xff" * 8 + GOOD[32:], "at most 16,777,216"),
    "no text": (GOOD.replace(b"general.architecture", b"\xff" * 20), "cut off or corrupt"),
    "an unknown type": (GOOD.replace(b"general.name\x08", b"general.name\x0d"), "unknown type 13"),
    "an array of arrays": (GOOD.replace(b"tokens\x09\0\0\0\x08", b"tokens\x09\0\0\0\x09"), "an array of the type 9"),
    "a tensor beyond the end": (GOOD[:-20], "lies beyond the end"),
    "a huge tensor": (GOOD[:SHAPE] + struct.pack("<Q", 2**40) + GOOD[SHAPE + 8 :], "lies beyond the end"),
    "axes": (GOOD[: SHAPE - 4] + struct.pack("<I", 99) + GOOD[SHAPE:], "has 99 axes"),
    "half a block": (GOOD[: SHAPE + 8] + struct.pack("<I", 8) + GOOD[SHAPE + 12 :], "no whole number of Q8_0 blocks"),
    "overlap": (GOOD[: SHAPE + 12] + struct.pack("<Q", 0) + GOOD[SHAPE + 20 :], "overlap"),
    "a path": (GOOD.replace(b"output_norm.weight", b"../put_norm.weight"), "is a path"),
    "alignment": (gguf({"general.alignment": 0}, {"a": scales()}), "an alignment of 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_headers_are_one_line(name):
    raw, message = BROKEN[name]
    files = MemoryFiles(w__gguf=raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(files, "w.gguf")
    assert "\n" not in str(caught.value)
