"""GGUF: metadata, where each tensor lies, the tensors (github.com/ggml-org/ggml, docs/gguf.md).

The metadata are the configuration: which architecture, how wide, and an epsilon whose key names the norms' family. The
header is read in order, since its strings say nowhere how long they are together; arrays of numbers are passed over.
"""

import functools
import itertools
import math
import struct
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from deadbench.suite.checkpoints.dialects.tensors import Values, as_floats
from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.gguf_metadata import adds_one, config_of, norm_of, unfit
from deadbench.suite.checkpoints.no_weights import is_pointer, pointer
from deadbench.suite.checkpoints.shard_names import shard_of
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.checkpoints.tensors import (
    MAX_DIMENSIONS,
    MAX_EXTENT,
    Contents,
    TensorEntry,
    check_name,
)
from deadbench.suite.errors import CheckpointError

MAGIC = b"GGUF"
_MAX_HEADER_BYTES, _MAX_KEYS, _MAX_TENSORS, _MAX_ITEMS, _MAX_TEXT = 256_000_000, 100_000, 1_000_000, 10_000_000, 2**24
_WINDOW = 2**18
_MAX_PARTS = 1000
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT, _STRING, _ARRAY = 6, 8, 9
# By type: its name, how many values a block has, and its bytes.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
# Those whose values the package `gguf` unpacks, where it is installed.
_BY_PACKAGE = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS",
    "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip


def read_gguf(files: Files, name: str) -> Contents:
    """The tensors of a GGUF and of all parts that it was split into, and the configuration that its metadata are.

    Raises:
        CheckpointError: a header that is cut off, contradicts itself, or is of another version; a part that is no
            first one; one line.
    """
    facts, entries = _read_header(files, name)
    for part in _further_parts(facts, name):
        further, held = _read_header(files, part)
        if further.get("split.no", 0) == 0:
            raise CheckpointError(f"{part}: not the part that its name says; copy the parts of one model")
        entries += held
    _check_names(name, entries)
    norm, config = norm_of(facts, {entry.name for entry in entries}), config_of(facts, entries)
    whole_scales, package = adds_one(config), find_spec("gguf") is not None
    entries = [_as_values(entry, whole_scales, package) for entry in entries]
    return Contents(entries, None, config, norm=norm, unfit=unfit(facts))


def _further_parts(facts: dict[str, Any], name: str) -> list[str]:
    """The other files of one that was split, whose first part has the metadata."""
    count, number = facts.get("split.count", 1), facts.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int) or not 0 <= number < max(count, 1) <= _MAX_PARTS:
        raise CheckpointError(f"{name}: part {shown(number)} of {shown(count)}; corrupt")
    if count <= 1:
        return []
    first = shard_of(name)
    if number or first is None or (first.number, first.of, first.ending) != (1, count, ".gguf"):
        raise CheckpointError(
            f"{name}: part {number + 1} of {count}; give the first, named as …-00001-of-{count:05d}.gguf, with the "
            "others beside it"
        )
    return [first.name(part) for part in range(2, count + 1)]


def _check_names(name: str, entries: list[TensorEntry]) -> None:
    if len({entry.name for entry in entries}) != len(entries):
        raise CheckpointError(f"{name}: two tensors have one name; corrupt or hostile")


def _read_header(files: Files, name: str) -> tuple[dict[str, Any], list[TensorEntry]]:
    """The metadata of one file, and its tensors."""
    cursor = _Cursor(files, name)
    try:
        if (first := cursor.take(4)) != MAGIC:
            if is_pointer(first + files.read(name, 4, 40)):
                raise pointer(files, name)
            raise CheckpointError(f"{name}: not a GGUF; give a file that begins as one")
        version = cursor.number("<I")
        if version not in (2, 3):
            raise CheckpointError(f"{name}: GGUF of version {version}; 2 and 3 are read, little-endian")
        num_tensors, num_keys = cursor.count(_MAX_TENSORS), cursor.count(_MAX_KEYS)
        facts = {}
        for _ in range(num_keys):
            key = cursor.text()
            facts[key] = cursor.value(cursor.number("<I"))
        told = [cursor.tensor() for _ in range(num_tensors)]
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{name}: the header is cut off or corrupt; download the file again") from error
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**20:
        raise CheckpointError(f"{name}: an alignment of {shown(alignment)}; corrupt")
    start = -(-cursor.position // alignment) * alignment
    entries = [_entry(name, *each, start, files.size(name)) for each in told]
    _check_names(name, entries)
    for before, after in itertools.pairwise(sorted(entries, key=lambda each: (each.start, each.end))):
        if after.start < before.end:
            raise CheckpointError(f"{name}: {shown(before.name)} and {shown(after.name)} overlap; corrupt header")
    return facts, entries


class _Cursor:
    """Bytes of a file in their order, fetched by windows."""

    def __init__(self, files: Files, name: str):
        self._files, self._name, self._size = files, name, files.size(name)
        self._start, self._raw = 0, b""
        self.position = 0

    def take(self, count: int) -> bytes:
        begin = self.position - self._start
        if not 0 <= begin <= begin + count <= len(self._raw):
            self._start, begin = self.position, 0
            end = min(self.position + max(count, _WINDOW), self._size)
            self._raw = self._files.read(self._name, self.position, end) if end > self.position else b""
        self._move(count)
        return self._raw[begin : begin + count]

    def _move(self, count: int) -> None:
        self.position += count
        if self.position > min(self._size, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{self._name}: the header is cut off, or longer than any; download the file again")

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, most: int) -> int:
        found = int(self.number("<Q"))
        if found > most:
            raise CheckpointError(f"{self._name}: a header with {found:,} of what at most {most:,} are read; corrupt")
        return found

    def text(self) -> str:
        return self.take(self.count(_MAX_TEXT)).decode()

    def value(self, kind: int) -> Any:
        """A value; of an array its number of items alone."""
        if kind in _NUMBERS:
            number = self.number(_NUMBERS[kind])
            return float(str(np.float32(number))) if kind == _FLOAT else number  # as the configuration had it
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise CheckpointError(f"{self._name}: a value of the unknown type {kind}; corrupt, or a later GGUF")
        inner, items = self.number("<I"), self.count(_MAX_ITEMS)
        if inner in _NUMBERS:
            self._move(items * struct.calcsize(_NUMBERS[inner]))
        elif inner == _STRING:
            for _ in range(items):
                self._move(self.count(_MAX_TEXT))
        else:
            raise CheckpointError(f"{self._name}: an array of the type {inner}; corrupt, or a later GGUF")
        return _Items(items)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self.text(), self.number("<I")
        if axes > MAX_DIMENSIONS:
            raise CheckpointError(f"{self._name}: tensor {shown(name)} has {axes} axes; corrupt")
        shape = tuple(self.count(MAX_EXTENT) for _ in range(axes))
        return name, shape[::-1], self.number("<I"), self.count(2**60)


class _Items(int):
    """How many items an array has, which are not read."""


def _entry(file: str, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, size: int) -> TensorEntry:
    check_name(file, name)
    dtype, block, block_bytes = _TYPES.get(kind, (f"type {kind}", 0, 0))
    values = math.prod(shape)
    if block and (shape or (1,))[-1] % block:
        raise CheckpointError(
            f"{file}: tensor {shown(name)} of shape {list(shape)} is no whole number of {dtype} blocks"
        )
    end = start + offset + (values // block * block_bytes if block else 0)
    if end > size:
        raise CheckpointError(f"{file}: tensor {shown(name)} lies beyond the end of the file; truncated")
    return TensorEntry(name, file, dtype, shape, start + offset, end)


def _as_values(entry: TensorEntry, whole_scales: bool, package: bool) -> TensorEntry:
    """A tensor whose values are to be had: unpacked, and of a scale that is stored as its sum with one, less one."""
    if entry.dtype == "Q8_0":
        rows, blocks = math.prod(entry.shape[:-1]), entry.shape[-1] // 32
        packed = replace(entry, dtype="U8", shape=(rows, blocks * 34))
        return replace(entry, dtype="F32", parts=(packed,), made=_unpacked)
    if entry.dtype in _BY_PACKAGE and package:
        block, block_bytes = next(each[1:] for each in _TYPES.values() if each[0] == entry.dtype)
        shape = (math.prod(entry.shape[:-1]), entry.shape[-1] // block * block_bytes)
        made = functools.partial(_unpacked_by_package, kind=entry.dtype)
        return replace(entry, dtype="F32", parts=(replace(entry, dtype="U8", shape=shape),), made=made)
    if whole_scales and entry.name.endswith("norm.weight") and entry.dtype in ("F32", "F16", "BF16"):

        def less_one(values: Values, dtype: str = entry.dtype) -> Values:
            return (as_floats(values, dtype).astype(np.float64) - 1).view(np.uint64)

        return replace(entry, dtype="F64", parts=(entry,), made=less_one)
    return entry


def _unpacked(raw: Values) -> Values:
    """Blocks of a float16 and 32 integers of a byte, which it scales, as float32."""
    blocks = np.ascontiguousarray(raw).reshape(-1, 34)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    values: Values = (scales * blocks[:, 2:].view(np.int8)).view(np.uint32)
    return values


def _unpacked_by_package(raw: Values, kind: str) -> Values:
    """Rows of blocks of another type as float32, by llama.cpp's own package."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = np.ascontiguousarray(raw)
    values: Values = np.ascontiguousarray(dequantize(rows, GGMLQuantizationType[kind]), np.float32).view(np.uint32)
    return values
