"""Read single tensors of a safetensors checkpoint: the header first, then only the bytes that are asked for.

The header is untrusted: its length, offsets, dtypes and shapes are checked before anything is allocated.
Format: 8 bytes little-endian header length, JSON header, tensor data (github.com/huggingface/safetensors).
"""

import concurrent.futures
import itertools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.checkpoints.no_weights import no_safetensors, no_weights
from deadbench.suite.checkpoints.strict_json import MAX_JSON_BYTES, parse_object, shown
from deadbench.suite.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_DIMENSIONS, MAX_EXTENT = 32, 2**48
_CONCURRENT_HEADERS = 8  # shards of a remote checkpoint are opened together

_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_FLOAT_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Files(Protocol):
    """Where a checkpoint's files are; implemented by `suite/checkpoints/checkpoint.py:Checkpoint`."""

    def names(self) -> list[str]:
        """File names in the checkpoint folder."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

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
    weight_map: dict[str, str] = {}
    if files.has(INDEX_FILE):
        weight_map = _read_index(files)
        shards = sorted(set(weight_map.values()))
    elif files.has(SINGLE_FILE):
        shards = [SINGLE_FILE]
    else:
        names = files.names()
        shards = sorted(n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_"))
        if len(shards) != 1:
            raise no_weights(files, shards)
    if len(shards) == 1:
        headers = [_read_header(files, shards[0])]
    else:
        with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_HEADERS) as pool:
            headers = list(pool.map(lambda shard: _read_header(files, shard), shards))
    held = {shard: {entry.name: entry for entry in header} for shard, header in zip(shards, headers, strict=True)}
    entries: dict[str, TensorEntry] = {}
    for tensor, shard in weight_map.items():
        if tensor not in held[shard]:
            raise CheckpointError(
                f"{INDEX_FILE}: says that {shard} holds {tensor!r}, which it does not; download the checkpoint again"
            )
        entries[tensor] = held[shard][tensor]
    for tensors in held.values():
        entries = tensors | entries  # what the index does not list is listed after what it does
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


def _read_index(files: Files) -> dict[str, str]:
    """The index's shard of every tensor; each shard is a file that is there."""
    if files.size(INDEX_FILE) > MAX_JSON_BYTES:
        raise CheckpointError(f"{INDEX_FILE}: larger than {MAX_JSON_BYTES} bytes; no index of a checkpoint")
    weight_map = parse_object(files.read(INDEX_FILE), f"{INDEX_FILE}: the index").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{INDEX_FILE}: not a safetensors index (weight_map is no object)")
    shards = sorted({shard if isinstance(shard, str) else f"../{shown(shard)}" for shard in weight_map.values()})
    if not shards:
        raise CheckpointError(f"{INDEX_FILE}: its weight_map is empty; download the checkpoint again")
    for shard in shards:
        if "/" in shard or "\\" in shard or shard.startswith("."):
            raise CheckpointError(f"{INDEX_FILE}: names the file {shown(shard)} outside the checkpoint folder")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_FILE}: names {shown(shard)}, which is no .safetensors file")
    with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_HEADERS) as pool:
        for shard, there in zip(shards, pool.map(files.has, shards), strict=True):
            if not there:
                raise CheckpointError(f"{INDEX_FILE}: names {shard}, which is missing; download the checkpoint again")
    return dict(weight_map)


def _read_header(files: Files, name: str) -> list[TensorEntry]:
    size = files.size(name)
    if size < 8:
        raise CheckpointError(f"{name}: {size} bytes, too short for a safetensors file")
    length = int.from_bytes(files.read(name, 0, 8), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise no_safetensors(files, name, length, size)
    raw = files.read(name, 8, 8 + length)
    if len(raw) != length:
        raise CheckpointError(f"{name}: the header is cut off; download the file again")
    header = parse_object(raw, f"{name}: the header")
    header.pop("__metadata__", None)
    entries = [_entry(name, tensor, spec, 8 + length, size) for tensor, spec in header.items()]
    ordered = sorted(entries, key=lambda e: (e.start, e.end))
    for before, after in itertools.pairwise(ordered):
        if after.start < before.end:
            raise CheckpointError(
                f"{name}: tensors {shown(before.name)} and {shown(after.name)} overlap; corrupt header"
            )
    return entries


def _entry(file: str, tensor: str, spec: Any, data_start: int, size: int) -> TensorEntry:
    # A name is a key here and nowhere a path, but it goes into messages, tables and other tools' file names.
    if not tensor.isprintable() or tensor.startswith(("/", "\\")) or ".." in tensor.replace("\\", "/").split("/"):
        raise CheckpointError(f"{file}: the tensor name {shown(tensor)} is a path or not printable; corrupt or hostile")
    try:
        dtype, shape, (start, end) = spec["dtype"], tuple(spec["shape"]), spec["data_offsets"]
        sane = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, end))
        sane = sane and len(shape) <= MAX_DIMENSIONS and max(shape, default=0) <= MAX_EXTENT and start <= end
        if sane and dtype in _ITEM_BYTES:  # dtypes younger than this list are listed, not checked and never read
            sane = end - start == math.prod(shape) * _ITEM_BYTES[dtype]
    except (TypeError, KeyError, ValueError):
        sane = False
    if not sane:
        raise CheckpointError(f"{file}: tensor {shown(tensor)} has a malformed entry: {shown(spec)}")
    if data_start + end > size:
        raise CheckpointError(f"{file}: tensor {shown(tensor)} lies beyond the end of the file; truncated")
    return TensorEntry(tensor, file, dtype, shape, data_start + start, data_start + end)
