"""Headers are untrusted: everything that could be wrong with one is a single line."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from deadbench.suite.checkpoints.headers import read_headers
from deadbench.suite.checkpoints.tensors import Piece, TensorEntry, read_floats, read_rows, read_vector, stored_dtype
from deadbench.suite.errors import CheckpointError


class Memory:
    """A checkpoint folder in memory."""

    def __init__(self, **files: bytes):
        self.files = {name.replace("__", "."): data for name, data in files.items()}

    def has(self, name):
        return name in self.names()

    def names(self):
        return list(self.files)

    def size(self, name):
        return len(self.files[name])

    def read(self, name, start=0, end=None):
        return self.files[name][start:end]


def raw(header: object, data: bytes = b"", length: int | None = None) -> Memory:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return Memory(model__safetensors=struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_vectors_are_read_exactly(dtype):
    values = np.array([1.5, -0.25, 3.0], dtype)
    files = Memory(model__safetensors=save({"a.weight": values, "b": np.zeros((2, 2), np.float32)}))
    entries = read_headers(files)
    assert read_vector(files, entries["a.weight"]).tolist() == values.tolist()
    assert entries["b"].shape == (2, 2)


@pytest.mark.parametrize("cuts", [[6], [2, 4], [1, 5]])
def test_some_rows_of_a_matrix_that_lies_in_pieces(cuts):
    """Cut over ranks by rows and by columns; of each piece no more is read than those rows."""
    whole = np.arange(24, dtype=np.float32).reshape(6, 4)
    files, pieces = {}, []
    for rank, rows in enumerate(np.split(np.arange(6), cuts)):
        for half, columns in enumerate((slice(0, 1), slice(1, 4))):
            values = np.ascontiguousarray(whole[rows, columns])
            files[f"r{rank}{half}"] = b"head" + values.tobytes()
            if values.size:
                place = (int(rows[0]), columns.start)
                pieces.append(Piece(f"r{rank}{half}", 4, 4 + values.nbytes, place, values.shape))
    held, read = Memory(**files), []
    entry = TensorEntry("w", "r00", "F32", whole.shape, 0, 96, tuple(pieces))
    assert np.array_equal(read_floats(held, entry), whole)
    of_memory = held.read
    held.read = lambda name, start=0, end=None: (read.append(end - start), of_memory(name, start, end))[1]
    assert np.array_equal(read_rows(held, entry, 1, 3), whole[1:4])
    assert sum(read) == 3 * 4 * 4
    assert read_rows(held, entry, 4, 3) is None


@pytest.mark.parametrize(
    "other", [{"flat": True}, {"made": np.asarray}, {"pieces": (Piece("f", 0, 96, (0, 0), (6, 4), (1, 6)),)}]
)
def test_rows_that_do_not_lie_by_themselves_are_none(other):
    assert read_rows(Memory(), TensorEntry("w", "f", "F32", (6, 4), 0, 96, **other), 0, 2) is None


def test_bfloat16_is_read_exactly():
    import torch
    from safetensors.torch import save as save_torch

    values = torch.tensor([1.0, -0.3, 1e-30, 3e38]).bfloat16()
    files = Memory(model__safetensors=save_torch({"w": values}))
    assert read_vector(files, read_headers(files)["w"]).tolist() == values.double().tolist()


def test_shards_are_followed_through_the_index():
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = Memory()
    files.files = {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": save({"a": np.ones(3, np.float32)}),
        "model-00002-of-00002.safetensors": save({"b": np.zeros(2, np.float32)}),
    }
    entries = read_headers(files)
    assert {name: e.file for name, e in entries.items()} == index["weight_map"]
    assert read_vector(files, entries["a"]).tolist() == [1, 1, 1]
    files.files["model.safetensors.index.json"] = json.dumps(
        {"weight_map": index["weight_map"] | {"c": "model-00001-of-00002.safetensors"}}
    ).encode()
    with pytest.raises(CheckpointError, match=r"00001-of-00002.safetensors holds 'c', which it does not"):
        read_headers(files)
    del files.files["model-00002-of-00002.safetensors"]
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors, which is missing"):
        read_headers(files)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (Memory(model__safetensors=b"abc"), "too short"),
        (raw({}, length=2**62), "header claims 4611686018427387904 bytes"),
        (raw({}, length=50), "header claims 50 bytes"),
        (raw(b"{not json"), "not JSON"),
        (raw(b"[" * 100_000), "not JSON"),
        (raw([1, 2]), "not a JSON object"),
        (raw({"w": entry(offsets=(0, 16))}, b"x" * 16), "'w' has a malformed entry"),
        (raw({"w": entry(shape=(-2,))}, b"x" * 8), "malformed"),
        (raw({"w": entry(shape=("2",))}, b"x" * 8), "malformed"),
        (raw({"w": {"dtype": "F32"}}), "malformed"),
        (raw({"w": "text"}), "malformed"),
        (raw({"w": entry()}, b"x" * 4), "beyond the end of the file"),
        (raw({"v": entry(), "w": entry(offsets=(4, 12))}, b"x" * 12), "overlap"),
        (Memory(config__json=b"{}"), "no model.safetensors"),
        (Memory(pytorch_model__bin=b"x"), "not written by torch.save"),
        (raw({"w": entry(shape=(1,) * 40)}, b"x" * 8), "malformed"),
        (raw({"w": entry(dtype="F4", shape=(2**60,))}, b"x" * 8), "malformed"),
        (raw({"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, b"x" * 8), "malformed"),
        (raw({"w": entry(offsets=(8, 0))}, b"x" * 8), "malformed"),
        (raw({"../../etc/w": entry()}, b"x" * 8), "is a path or not printable"),
        (raw({"/etc/w": entry()}, b"x" * 8), "is a path or not printable"),
        (raw({"w\n\x1b[2J": entry()}, b"x" * 8), "is a path or not printable"),
        (raw(b'{"w": 1, "w": 2}'), "the key 'w' is given twice"),
        (raw(b'{"w": {"shape": [1], "shape": [2]}}'), "the key 'shape' is given twice"),
        (raw(b'{"w": ' + b"9" * 5000 + b"}"), "not JSON"),
        (raw(b"[" + b"[]," * 3_000_000 + b"[]]"), "more than 3,000,000 lists"),
        (Memory(model__safetensors__index__json=b"[]"), "the index is not a JSON object"),
        (Memory(model__safetensors__index__json=b"{}"), "weight_map is no object"),
        (Memory(model__safetensors__index__json=b'{"weight_map": {}}'), "weight_map is empty"),
        (Memory(model__safetensors__index__json=b'{"weight_map": {"a": "/etc/passwd"}}'), "outside the checkpoint"),
        (Memory(model__safetensors__index__json=b'{"weight_map": {"a": "..\\\\w.safetensors"}}'), "outside the check"),
        (Memory(model__safetensors__index__json=b'{"weight_map": {"a": "w.bin"}}'), "which is no .safetensors file"),
        (Memory(model__safetensors__index__json=b'{"weight_map": {"a": ["w"]}}'), "outside the checkpoint"),
        (
            Memory(model__safetensors__index__json=b'{"weight_map": {"a": "../../etc/passwd"}}'),
            "outside the checkpoint",
        ),
        (Memory(model__safetensors__index__json=b'{"weight_map": {"a": 3}}'), "outside the checkpoint"),
    ],
)
def test_bad_checkpoints_are_one_line(files, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_headers(files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones((2, 2), np.float32), "expected a vector"),
        (np.ones(3, np.int64), "expected a vector"),
        (np.array([1, np.nan, np.inf], np.float32), "2 values that are not finite"),
    ],
)
def test_bad_vectors_are_one_line(value, message):
    files = Memory(model__safetensors=save({"w": value}))
    with pytest.raises(CheckpointError, match=message):
        read_vector(files, read_headers(files)["w"])


def test_a_dtype_younger_than_this_program_is_listed_but_not_read():
    files = raw({"w": entry(dtype="F4", shape=(16,)), "v": entry(offsets=(8, 16))}, b"\0" * 16)
    entries = read_headers(files)
    assert read_vector(files, entries["v"]).tolist() == [0, 0]
    with pytest.raises(CheckpointError, match="is F4"):
        read_vector(files, entries["w"])


def test_stored_dtype_is_that_of_most_parameters():
    files = Memory(model__safetensors=save({"a": np.zeros((9, 9), np.float16), "b": np.zeros(5, np.float32)}))
    assert stored_dtype(read_headers(files)) == "float16"
    assert stored_dtype({}) is None


def headers_or_error(files):
    try:
        return read_headers(files), None
    except CheckpointError as error:
        return None, str(error)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_one_line(data):
    files = Memory(model__safetensors=data)
    entries, error = headers_or_error(files)
    assert (entries is None) != (error is None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
SPEC = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 5) | JSON, max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40) | JSON, min_size=1, max_size=3) | JSON,
    },
)


@given(st.dictionaries(st.text(max_size=8), SPEC | JSON, max_size=4) | JSON, st.integers(0, 40))
def test_any_json_header_gives_tensors_inside_the_file_or_one_line(header, size):
    files = raw(header, b"\0" * size)
    entries, error = headers_or_error(files)
    assert entries is not None or ("\n" not in error and len(error) < 500)
    for each in (entries or {}).values():
        assert 8 <= each.start <= each.end <= files.size("model.safetensors")


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=12) | JSON, max_size=3) | JSON)
def test_any_index_is_one_line(weight_map):
    files = Memory(model__safetensors__index__json=json.dumps({"weight_map": weight_map}).encode())
    with pytest.raises(CheckpointError) as caught:
        read_headers(files)
    assert "\n" not in str(caught.value)


def test_a_vector_wider_than_any_model_has_is_refused_before_it_is_read():
    entry = TensorEntry("ln_f.weight", "model.safetensors", "F32", (2**29,), 0, 2**31)
    with pytest.raises(
        CheckpointError, match=r"ln_f.weight is a vector of 536,870,912 values; .* more than 16,777,216"
    ):
        read_vector(None, entry)
