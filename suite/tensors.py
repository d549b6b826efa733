"""Read single tensors of a safetensors checkpoint: the header first, then only the bytes that are asked for.

The header is untrusted: its length, offsets, dtypes and shapes are checked before anything is allocated.
Format: 8 bytes little-endian header length, JSON header, tensor data (github.com/huggingface/safetensors).
"""

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")

_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_FLOAT_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file, what is wrong and what to do."""


class Files(Protocol):
    """Where a checkpoint's files are; implemented by `suite.sources.Checkpoint`."""

    def names(self) -> list[str]:
        """File names in the checkpoint folder."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` of a file."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header: where it lies and what it is."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_headers(files: Files) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint by name, from its headers alone; single file or sharded with an index.

    Raises:
        CheckpointError: no safetensors, a missing shard, an index that leaves the folder, a malformed header.
    """
    names = files.names()
    if INDEX_FILE in names:
        shards = _indexed_shards(files, names)
    elif SINGLE_FILE in names:
        shards = [SINGLE_FILE]
    else:
        shards = sorted(n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_"))
        if len(shards) != 1:
            raise _no_weights(names, shards)
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for entry in _read_header(files, shard):
            entries.setdefault(entry.name, entry)
    return entries


def read_vector(files: Files, entry: TensorEntry) -> NDArray[np.float64]:
    """A one-dimensional floating-point tensor as float64.

    Raises:
        CheckpointError: not a float vector, cut off, or with values that are not finite.
    """
    if entry.dtype not in DTYPE_NAMES or len(entry.shape) != 1:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} is {entry.dtype} of shape {list(entry.shape)}; "
            f"expected a vector of {', '.join(_FLOAT_DTYPES)} or BF16"
        )
    raw = files.read(entry.file, entry.start, entry.end)
    if len(raw) != entry.end - entry.start:
        raise CheckpointError(f"{entry.file}: tensor {entry.name} is cut off; download the file again")
    if entry.dtype == "BF16":
        values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        values = np.frombuffer(raw, _FLOAT_DTYPES[entry.dtype]).astype(np.float64)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise CheckpointError(f"{entry.file}: tensor {entry.name} has {bad} values that are not finite")
    return values


def stored_dtype(entries: dict[str, TensorEntry]) -> str | None:
    """Name of the float dtype that most parameters are stored in; None if there are none."""
    sizes: dict[str, int] = {}
    for entry in entries.values():
        if entry.dtype in DTYPE_NAMES:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(entry.shape)
    return DTYPE_NAMES[max(sizes, key=lambda dtype: sizes[dtype])] if sizes else None


def _indexed_shards(files: Files, names: list[str]) -> list[str]:
    try:
        index = json.loads(files.read(INDEX_FILE))
        shards = sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{INDEX_FILE}: not a safetensors index ({type(error).__name__})") from error
    for shard in shards:
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or shard.startswith("."):
            raise CheckpointError(f"{INDEX_FILE}: names the file {shard!r} outside the checkpoint folder")
        if shard not in names:
            raise CheckpointError(f"{INDEX_FILE}: names {shard}, which is missing; download the checkpoint again")
    return shards


def _no_weights(names: list[str], shards: list[str]) -> CheckpointError:
    if shards:
        return CheckpointError(
            f"{len(shards)} safetensors files and no {INDEX_FILE}: cannot tell which belong together"
        )
    pickled = sorted(n for n in names if n.endswith(PICKLED_SUFFIXES))
    if pickled:
        return CheckpointError(
            f"only pickled weights ({pickled[0]}), which can run code when opened and are refused; "
            "convert them to safetensors"
        )
    return CheckpointError(f"no {SINGLE_FILE} and no {INDEX_FILE}")


def _read_header(files: Files, name: str) -> list[TensorEntry]:
    size = files.size(name)
    if size < 8:
        raise CheckpointError(f"{name}: {size} bytes, too short for a safetensors file")
    length = int.from_bytes(files.read(name, 0, 8), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{name}: the header claims {length} bytes, the file has {size}; truncated or not a safetensors file"
        )
    try:
        header = json.loads(files.read(name, 8, 8 + length))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: the header is not JSON; corrupt or not a safetensors file") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{name}: the header is not a JSON object")
    header.pop("__metadata__", None)
    entries = [_entry(name, tensor, spec, 8 + length, size) for tensor, spec in header.items()]
    ordered = sorted(entries, key=lambda e: (e.start, e.end))
    for before, after in itertools.pairwise(ordered):
        if after.start < before.end:
            raise CheckpointError(f"{name}: tensors {before.name} and {after.name} overlap; corrupt header")
    return entries


def _entry(file: str, tensor: str, spec: Any, data_start: int, size: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = spec["dtype"], tuple(spec["shape"]), spec["data_offsets"]
        sane = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, end))
        if dtype in _ITEM_BYTES:  # dtypes younger than this list are listed, not checked and never read
            sane = sane and end - start == math.prod(shape) * _ITEM_BYTES[dtype]
        sane = sane and start <= end
    except (TypeError, KeyError, ValueError):
        sane = False
    if not sane:
        raise CheckpointError(f"{file}: tensor {tensor!r} has a malformed entry: {str(spec)[:120]}")
    if data_start + end > size:
        raise CheckpointError(f"{file}: tensor {tensor!r} lies beyond the end of the file; truncated")
    return TensorEntry(tensor, file, dtype, shape, data_start + start, data_start + end)
