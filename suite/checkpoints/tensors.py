"""Read single tensors of a safetensors checkpoint: the header first, then only the bytes that are asked for.

The header is untrusted: its length, offsets, dtypes and shapes are checked before anything is allocated.
Format: 8 bytes little-endian header length, JSON header, tensor data (github.com/huggingface/safetensors).
"""

import concurrent.futures
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.checkpoints.no_weights import no_safetensors
from deadbench.suite.checkpoints.strict_json import parse_object, shown
from deadbench.suite.checkpoints.weight_files import Files, WeightFiles, weight_files
from deadbench.suite.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS, MAX_EXTENT = 32, 2**48
_CONCURRENT_HEADERS = 8  # shards of a remote checkpoint are opened together

_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_FLOAT_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header: where it lies and what it is."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_headers(files: Files, weights: WeightFiles | None = None) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint by name, from its headers alone; `weights` are its files, where they are known.

    Raises:
        CheckpointError: no safetensors, a missing shard, an index that leaves the folder, a malformed header.
    """
    weights = weights or weight_files(files)
    shards = weights.shards
    if len(shards) == 1:
        headers = [_read_header(files, shards[0])]
    else:
        with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_HEADERS) as pool:
            headers = list(pool.map(lambda shard: _read_header(files, shard), shards))
    held = {shard: {entry.name: entry for entry in header} for shard, header in zip(shards, headers, strict=True)}
    loaded = {name: entry for shard in shards for name, entry in held[shard].items()}  # the last one counts
    entries: dict[str, TensorEntry] = {}
    for tensor, shard in weights.weight_map.items():
        if tensor not in held[shard]:
            raise CheckpointError(
                f"{weights.index}: says that {shard} holds {tensor!r}, which it does not; download the checkpoint again"
            )
        entries[tensor] = loaded[tensor]
    return loaded if not entries else entries | {n: e for n, e in loaded.items() if n not in entries}


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
