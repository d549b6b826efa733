"""Files of torch.save give the tensors that were saved, to the bit, whatever views they are; the rest is one line."""

import collections
import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.formats.torch_files import read_torch_file
from deadbench.suite.checkpoints.headers import read_headers
from deadbench.suite.checkpoints.tensors import read_raw, read_vector
from deadbench.suite.checkpoints.weight_files import weight_files, weights_file
from deadbench.suite.errors import CheckpointError
from deadbench.suite.reads.classify import classify
from tests.suite.checkpoints.formats.memory import MemoryFiles, as_torch, saved
from tests.suite.checkpoints.formats.sparse import sparse_torch_file
from tests.suite.checkpoints.servers import misbehaving

OLD = {"_use_new_zipfile_serialization": False}


def tensors_of(raw, name="w.bin"):
    files = MemoryFiles(**{name: raw})
    return {e.name: as_torch(read_raw(files, e), e) for e in read_torch_file(files, name).entries}


def states():
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    parameter = torch.nn.Parameter(torch.randn(4))
    parameter.note = "attributes of its own are saved with it"
    every = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    return collections.OrderedDict(
        whole=base,
        transposed=base.transpose(0, 2),
        slice=base[1:, ::2, 1],
        last=base[-1, -1, -2:],
        scalar=base[1, 1, 1],
        empty=torch.empty(0, 7),
        expanded=torch.arange(3.0).expand(5, 3),
        flag=torch.tensor([True, False]),
        complex=torch.randn(3, dtype=torch.complex64).conj().resolve_conj(),
        eight=torch.tensor([1.5, -2]).to(torch.float8_e4m3fn),
        bytes=torch.arange(5, dtype=torch.uint8),
        parameter=parameter,
        **{str(dtype).removeprefix("torch."): torch.arange(6).reshape(2, 3).to(dtype) for dtype in every},
    )


@pytest.mark.parametrize("options", [{}, OLD, {"pickle_protocol": 4}], ids=["zip", "old", "zip protocol 4"])
def test_every_tensor_is_the_one_that_was_saved(options):
    values = states()
    if options is OLD:
        del values["eight"]  # which torch itself cannot save in that form
    found = tensors_of(saved(values, **options))
    assert list(found) == list(values)
    for name, value in values.items():
        assert torch.equal(found[name].view(torch.uint8) if name == "eight" else found[name],
                           value.detach().view(torch.uint8) if name == "eight" else value.detach()), name  # fmt: skip


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_a_small_tensor_costs_little_of_a_large_file(options):
    value = {"large": torch.zeros(2_000_000), "norm": torch.arange(8.0), "rows": torch.zeros(1000, 500)[7]}
    files = MemoryFiles(w__pt=saved(value, **options))
    contents = read_torch_file(files, "w.pt")
    entries = {entry.name: entry for entry in contents.entries}
    assert as_torch(read_raw(files, entries["norm"]), entries["norm"]).tolist() == list(range(8))
    read_raw(files, entries["rows"])
    assert files.bytes_read < (20_000 if not options else 1_100_000)
    assert bool(contents.remark) == bool(options)
    if options:
        assert "first 1,048,576 bytes were read in order" in contents.remark


@pytest.mark.parametrize(
    ("wrap", "step"),
    [
        (lambda state: state, None),
        (lambda state: {"state_dict": state, "global_step": 7, "epoch": 1, "optimizer_states": [{}]}, 7),
        (lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "iter_num": 9}, 9),
        (lambda state: {"module": state, "global_steps": 5}, 5),
        (lambda state: {"model": {"module": state}, "iteration": 3}, 3),
        (lambda state: {"model_state_dict": state, "step": 2}, 2),
    ],
)
def test_the_state_dict_of_a_training_checkpoint_is_found(wrap, step):
    state = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.Linear(3, 2)).state_dict()
    contents = read_torch_file(MemoryFiles(w__pt=saved(wrap(state))), "w.pt")
    assert [entry.name for entry in contents.entries] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert contents.step == step


def test_values_that_are_to_be_conjugated_are_refused():
    with pytest.raises(CheckpointError, match=r"makes a tensor of .*conj"):
        tensors_of(saved({"w": torch.randn(3, dtype=torch.complex64).conj()}))


def test_an_optimizer_whose_state_is_flat_is_no_part_of_the_model():
    value = {"optimizer.state.exp_avg.norm.weight": torch.zeros(2), "norm.weight": torch.ones(2)}
    (entry,) = read_torch_file(MemoryFiles(w__pt=saved(value)), "w.pt").entries
    assert entry.name == "norm.weight"


def test_nested_state_dicts_have_their_path_as_name():
    value = {"model": {"language_model": {"encoder": {"final_layernorm.weight": torch.ones(3)}, "note": "x"}}}
    (entry,) = read_torch_file(MemoryFiles(w__pt=saved(value)), "w.pt").entries
    assert entry.name == "language_model.encoder.final_layernorm.weight"


def test_sharded_with_an_index_and_a_file_beside_them():
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}
    files = MemoryFiles(
        **{
            "pytorch_model.bin.index.json": json.dumps(index).encode(),
            "pytorch_model-00001-of-00002.bin": saved({"a": torch.ones(2)}),
            "pytorch_model-00002-of-00002.bin": saved({"b": torch.zeros(3)}),
            "training_args.bin": b"",
        }
    )
    assert {name: entry.file[:19] for name, entry in read_headers(files).items()} == {
        "a": "pytorch_model-00001", "b": "pytorch_model-00002",
    }  # fmt: skip
    assert weight_files(files).format.name == "torch"
    files.files["pytorch_model.bin"] = saved({"a": torch.ones(2)})  # transformers opens this one first
    assert list(read_headers(files)) == ["a"]
    lone = MemoryFiles(model__pt=saved({"a": torch.ones(1)}), training_args__bin=b"")
    assert weight_files(lone).shards == ("model.pt",)


def test_what_trainers_save_beside_the_weights_is_none_of_them():
    beside = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "random_states_0.pt", "sampler.bin")
    files = MemoryFiles()
    files.files = {name: saved({}) for name in beside} | {"weights.pt": saved({"a": torch.ones(2)})}
    assert weight_files(files).shards == ("weights.pt",)


@pytest.mark.parametrize(("name", "of"), [("w.bin", "torch"), ("w.safetensors", "torch"), ("w.pt", "torch")])
def test_a_file_is_what_its_first_bytes_say(name, of):
    for options in ({}, OLD):
        files = MemoryFiles(**{name: saved({"a": torch.ones(1)}, **options)})
        assert weights_file(files, name).format.name == of


# Archives made by hand: pickles that are not torch's, and directories that are not zip's.

HEAD = b"\x80\x02}X\x01\x00\x00\x00w"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ%stQ"
CALL = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"%s\x89ccollections\nOrderedDict\n)RtRs."


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def archive(pickled, storages=(("0", b"\0" * 16),), compression=zipfile.ZIP_STORED, extra=()):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        made.writestr("archive/data.pkl", pickled)
        for name, raw in [(f"archive/data/{key}", raw) for key, raw in storages] + list(extra):
            made.writestr(name, raw)
    return file.getvalue()


def tensor(shape, strides, offset=0, count=4):
    def tupled(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    return HEAD + CALL % (struct.pack("<i", count), number(offset) + tupled(shape) + tupled(strides))


def test_a_tensor_made_by_hand_is_read():
    assert tensors_of(archive(tensor([2, 2], [1, 2])))["w"].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def flipped(raw, at, value=0xFF):
    return raw[:at] + bytes([raw[at] ^ value]) + raw[at + 1 :]


GOOD = archive(tensor([4], [1]))
DIRECTORY = GOOD.rindex(b"PK\5\6")
LISTED = GOOD.index(b"PK\1\2")
HOSTILE = {
    "beyond the storage": (archive(tensor([5], [1])), "beyond its end"),
    "offset beyond the storage": (archive(tensor([1], [1], 4)), "beyond its end"),
    "strides beyond the storage": (archive(tensor([2, 2], [4, 1])), "beyond its end"),
    "negative strides": (archive(tensor([2], [-1], 3)), "makes a tensor of shape"),
    "negative shape": (archive(tensor([-1], [1])), "makes a tensor of shape"),
    "more values than memory": (archive(tensor([2**40], [0])), "beyond its end"),
    "shape and strides apart": (archive(tensor([2], [1, 1])), "makes a tensor of shape"),
    "forty axes": (archive(tensor([1] * 40, [1] * 40)), "makes a tensor of shape"),
    "storage larger than its entry": (archive(tensor([5], [1], count=5)), "has 16 bytes, not 20"),
    "storage missing": (archive(tensor([4], [1]), [("1", b"")]), "the storage '0' is missing"),
    "no state dict": (archive(pickle.dumps([1, 2], 2)), "a list without tensors"),
    "no tensors": (archive(pickle.dumps({"a": 1}, 2)), "a dict without tensors"),
    "name that is a path": (archive(tensor([4], [1]).replace(b"\x01\0\0\0w", b"\x04\0\0\0../w")), "is a path"),
    "compressed": (archive(tensor([4], [1]), compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "no data.pkl": (archive(b"").replace(b"data.pkl", b"data.pkx"), "no data.pkl"),
    "TorchScript": (archive(tensor([4], [1]), extra=[("archive/constants.pkl", b"")]), "a program of TorchScript"),
    "big-endian": (archive(tensor([4], [1]), extra=[("archive/byteorder", b"big")]), "big-endian"),
    "a byte of the pickle": (flipped(GOOD, GOOD.index(b"FloatStorage")), "does not match its checksum"),
    "cut off": (GOOD[:-30], "corrupt"),
    "no directory": (GOOD[:LISTED], "no zip directory"),
    "only a beginning": (b"PK\3\4", "no zip directory"),
    "directory elsewhere": (flipped(GOOD, DIRECTORY + 18), "lies outside the file"),
    "directory longer": (flipped(GOOD, DIRECTORY + 14), "lies outside the file"),
    "fewer entries": (flipped(GOOD, DIRECTORY + 10, 1), "lists 2 entries"),
    "several volumes": (flipped(GOOD, DIRECTORY + 4), "several volumes"),
    "encrypted": (flipped(GOOD, LISTED + 8, 1), "is encrypted"),
    "damaged directory": (flipped(GOOD, LISTED), "directory is damaged"),
    "overlapping entries": (flipped(GOOD, LISTED + 20, 0x7F), "overlaps another"),
    "an entry elsewhere": (flipped(GOOD, 0), "not written by torch.save"),
    "empty": (b"", "an empty file"),
    "a page": (b"<!DOCTYPE html>", "not written by torch.save"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_archives_are_one_line(name):
    raw, message = HOSTILE[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        tensors_of(raw)
    assert "w.bin" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_entry_listed_twice_is_refused():
    with pytest.warns(UserWarning, match="Duplicate"):
        raw = archive(tensor([4], [1]), [("0", b"\0" * 16), ("0", b"\1" * 16)])
    with pytest.raises(CheckpointError, match="lists .* twice"):
        tensors_of(raw)


def test_an_entry_that_its_own_header_contradicts_is_refused():
    header = GOOD.index(b"PK\3\4", 4)
    with pytest.raises(CheckpointError, match="not what the directory says"):
        tensors_of(flipped(GOOD, header + 30))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], "storages end at"),
        (lambda raw: raw + b"x", "storages end at"),
        (lambda raw: raw[:200], "cut off"),
        (lambda raw: raw.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"), "torch.save of version 1001"),
        (lambda raw: raw.replace(b"M\xe9\x03", b"M\xe8\x03"), "torch.save of version 1000"),
    ],
)
def test_broken_files_of_the_old_form_are_one_line(change, message):
    raw = saved({"a": torch.ones(3)}, **OLD)
    assert change(raw) != raw
    with pytest.raises(CheckpointError, match=message) as caught:
        tensors_of(change(raw))
    assert "\n" not in str(caught.value)


def test_archives_beyond_four_gigabytes(tmp_path):
    """zip64, as torch writes it for such files: the bytes between are a hole."""
    path = sparse_torch_file(tmp_path / "w.bin", {"large": (2**30, 2), "norm": (4,)}, {"norm": np.arange(4.0)})
    files = Checkpoint(str(path))
    entries = files.headers()
    assert read_vector(files, entries["norm"]).tolist() == [0, 1, 2, 3]
    assert entries["large"].shape == (2**30, 2)
    assert files.bytes_read < 20_000
    assert path.stat().st_size > 2**33


OPT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 50272, "hidden_size": 4096,
    "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
    "word_embed_proj_dim": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """27 GB on the outside: OPT-6.7B's tensors in float32."""
    folder, D = tmp_path_factory.mktemp("opt"), 4096
    (folder / "config.json").write_text(json.dumps(OPT))
    shapes = {"model.decoder.embed_tokens.weight": (50272, D), "model.decoder.final_layer_norm.weight": (D,),
              "model.decoder.final_layer_norm.bias": (D,)}  # fmt: skip
    for layer in range(32):
        block = f"model.decoder.layers.{layer}"
        for name, shape in (("self_attn.q_proj", (D, D)), ("self_attn.k_proj", (D, D)), ("self_attn.v_proj", (D, D)),
                            ("self_attn.out_proj", (D, D)), ("fc1", (4 * D, D)), ("fc2", (D, 4 * D)),
                            ("self_attn_layer_norm", (D,)), ("final_layer_norm", (D,))):  # fmt: skip
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    scale = np.random.default_rng(0).uniform(0.5, 1.5, D)
    values = {"model.decoder.final_layer_norm.weight": scale}
    return sparse_torch_file(folder / "pytorch_model.bin", shapes, values).parent, scale


@pytest.mark.parametrize("where", ["here", "on a web server", "one file", "one file on a web server"])
def test_the_norm_of_a_file_of_many_gigabytes_costs_a_megabyte(where, opt):
    folder, scale = opt
    with misbehaving(folder) as server:
        source = server.url if "server" in where else str(folder)
        result, direction_D = classify(f"{source}/pytorch_model.bin" if "file" in where else source)
    assert result["error"] is None
    assert result["bytes_total"] > 26e9
    assert result["bytes_read"] < 1_000_000
    assert (result["family"], result["source_format"]) == ("layernorm", "torch")
    inverse_D = 1 / scale.astype("f4").astype("f8")
    assert abs(direction_D @ inverse_D / np.linalg.norm(inverse_D)) > 1 - 1e-12
