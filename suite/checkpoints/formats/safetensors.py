"""safetensors: 8 bytes little-endian header length, JSON header, tensor data (github.com/huggingface/safetensors).

The header is untrusted: its length, offsets, dtypes and shapes are checked before anything is allocated.
"""

import itertools
import math
from typing import Any

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.no_weights import no_safetensors
from deadbench.suite.checkpoints.strict_json import parse_object, shown
from deadbench.suite.checkpoints.tensors import (
    ITEM_BYTES,
    MAX_DIMENSIONS,
    MAX_EXTENT,
    Contents,
    TensorEntry,
    check_name,
)
from deadbench.suite.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def read_header(files: Files, name: str) -> Contents:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: a malformed header; one line.
    """
    size = files.size(name)
    if size < 8:
        raise no_safetensors(files, name, 0, size)
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
    return Contents(entries)


def _entry(file: str, tensor: str, spec: Any, data_start: int, size: int) -> TensorEntry:
    check_name(file, tensor)
    try:
        dtype, shape, (start, end) = spec["dtype"], tuple(spec["shape"]), spec["data_offsets"]
        sane = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, end))
        sane = sane and len(shape) <= MAX_DIMENSIONS and max(shape, default=0) <= MAX_EXTENT and start <= end
        if sane and dtype in ITEM_BYTES:  # dtypes younger than this list are listed, not checked and never read
            sane = end - start == math.prod(shape) * ITEM_BYTES[dtype]
    except (TypeError, KeyError, ValueError):
        sane = False
    if not sane:
        raise CheckpointError(f"{file}: tensor {shown(tensor)} has a malformed entry: {shown(spec)}")
    if data_start + end > size:
        raise CheckpointError(f"{file}: tensor {shown(tensor)} lies beyond the end of the file; truncated")
    return TensorEntry(tensor, file, dtype, shape, data_start + start, data_start + end)
