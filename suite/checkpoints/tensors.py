"""What is known of a stored tensor before it is read, and reading it: only the bytes that are asked for.

Where a tensor lies is told by one of `suite/checkpoints/formats`; from here on all formats are the same.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.quantised import is_part
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.errors import CheckpointError

MAX_DIMENSIONS, MAX_EXTENT = 32, 2**48

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
_FLOAT_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Piece(NamedTuple):
    """Values of a tensor that lie together.

    Attributes:
        file: where.
        start: byte at which they begin.
        end: byte at which they end.
        place: the index in the tensor of the first value.
        shape: of the piece.
        strides: values from one index to the next, along each axis; None: one after another, the last axis first.
        locate: gives the piece as it lies, where only reading tells; `start` is then counted from what holds it.
    """

    file: str
    start: int
    end: int
    place: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    locate: "Callable[[Files, Piece], Piece] | None" = None


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: what it is and where it lies, from `start` to `end` of `file` or in `pieces`.

    Of a tensor in pieces `file` is that of the first; values that are in no piece are zero. Where
    `flat`, pieces are of its values in one row. A tensor that is stored in another form is `made` of its `parts`: of
    their values as unsigned integers its own. `called` is what the file calls it, where that is another name.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    pieces: tuple[Piece, ...] = ()
    flat: bool = False
    called: str | None = None
    parts: "tuple[TensorEntry, ...]" = ()
    made: "Callable[..., NDArray[Any]] | None" = None

    @property
    def stored_name(self) -> str:
        """What the file calls it."""
        return self.called or self.name

    def files(self) -> set[str]:
        """All files that hold its values."""
        below = {file for part in self.parts for file in part.files()}
        return below or {piece.file for piece in self.pieces} or {self.file}


@dataclass(frozen=True)
class StoredNorm:
    """What a format says of the final norm by itself.

    Attributes:
        name: of its tensors, before `.weight` and `.bias`; None where none is there.
        family: what the norms do; None where that is not told.
        eps: of the norms.
        hidden_size: the width of the residual stream.
        num_blocks: how many blocks there are.
        adds_one: the scale is one more than what is stored.
        module: its path in transformers' model, where that is another than `name`.
    """

    name: str | None
    family: str | None = None
    eps: float | None = None
    hidden_size: int | None = None
    num_blocks: int | None = None
    adds_one: bool = False
    module: str | None = None


@dataclass(frozen=True)
class Contents:
    """What the header of a file tells.

    Attributes:
        entries: its tensors.
        step: the training step, where it is recorded.
        config: the contents of the config.json that the file makes up for, where it can.
        remark: what is to be said of how it was read.
        norm: what it says of the final norm, where it has names of its own.
        dialect: whose names its tensors have, where that is told.
        unfit: why its tensors are no model of transformers, whatever they are called; None where nothing says so.
    """

    entries: list[TensorEntry]
    step: int | None = None
    config: dict[str, Any] | None = None
    remark: str | None = None
    norm: StoredNorm | None = None
    dialect: str | None = None
    unfit: str | None = None


def check_name(file: str, tensor: str) -> None:
    """Refuse a tensor's name that is a path or not printable.

    It is a key here and nowhere a path, but it goes into messages, tables and other tools' file names.
    """
    if not tensor.isprintable() or tensor.startswith(("/", "\\")) or ".." in tensor.replace("\\", "/").split("/"):
        raise CheckpointError(f"{file}: the tensor name {shown(tensor)} is a path or not printable; corrupt or hostile")


def shifted(piece: Piece, start: int) -> Piece:
    """A piece that was counted from byte `start` of its file, counted from the first."""
    return piece._replace(start=start + piece.start, end=start + piece.end, locate=None)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Values from one index to the next along each axis, where the last axis comes first."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def read_raw(files: Files, entry: TensorEntry, into: NDArray[np.uint8] | None = None) -> NDArray[Any]:
    """A tensor's values as unsigned integers of its items' size, put together from its pieces; `into` takes its bytes.

    Raises:
        CheckpointError: cut off, or of a dtype without a known size.
    """
    if entry.dtype not in ITEM_BYTES:
        raise CheckpointError(f"{entry.file}: tensor {entry.name} is {entry.dtype}; read are {', '.join(ITEM_BYTES)}")
    dtype = np.dtype(f"<u{ITEM_BYTES[entry.dtype]}")
    if entry.made is not None:
        return _make(entry.made, [read_raw(files, part) for part in entry.parts], entry, dtype, into)
    pieces = entry.pieces or (Piece(entry.file, entry.start, entry.end, (0,) * len(entry.shape), entry.shape),)
    if into is None and len(pieces) == 1 and pieces[0].shape == entry.shape:
        return _read_piece(files, entry, pieces[0], dtype)
    shape = (math.prod(entry.shape),) if entry.flat else entry.shape
    whole = np.zeros(shape, dtype) if into is None else into.view(dtype).reshape(shape)
    if into is not None and sum(math.prod(piece.shape) for piece in pieces) < whole.size:
        whole[...] = 0
    for piece in pieces:
        place = tuple(slice(at, at + count) for at, count in zip(piece.place, piece.shape, strict=True))
        whole[place] = _read_piece(files, entry, piece, dtype)
    return whole.reshape(entry.shape)


_WIDEST = 2**24  # of a vector; the largest hidden size is 2^16, the largest vocabulary 2^20


def read_vector(files: Files, entry: TensorEntry) -> NDArray[np.float64]:
    """A one-dimensional floating-point tensor as float64.

    Raises:
        CheckpointError: not a float vector, wider than any, cut off, or with values that are not finite.
    """
    if entry.dtype not in DTYPE_NAMES or len(entry.shape) != 1:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} is {entry.dtype} of shape {list(entry.shape)}; "
            f"expected a vector of {', '.join(_FLOAT_DTYPES)} or BF16"
        )
    if entry.shape[0] > _WIDEST:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} is a vector of {entry.shape[0]:,} values; no model's has more than "
            f"{_WIDEST:,}"
        )
    values = read_floats(files, entry)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise CheckpointError(f"{entry.file}: tensor {entry.name} has {bad} values that are not finite")
    return values


def read_rows(files: Files, entry: TensorEntry, first: int, count: int) -> NDArray[np.float64] | None:
    """`count` rows of a matrix from row `first`, by a range of bytes of each piece; None where they do not lie so.

    Raises:
        CheckpointError: cut off.
    """
    if entry.dtype not in DTYPE_NAMES or len(entry.shape) != 2 or first + count > entry.shape[0]:
        return None
    if entry.made is not None or entry.flat or any(piece.strides is not None for piece in entry.pieces):
        return None
    dtype = np.dtype(f"<u{ITEM_BYTES[entry.dtype]}")
    rows = np.zeros((count, entry.shape[1]), dtype)
    for piece in entry.pieces or (Piece(entry.file, entry.start, entry.end, (0, 0), entry.shape),):
        (row, column), (height, width) = piece.place, piece.shape
        begin, end = max(first, row), min(first + count, row + height)
        if begin >= end:
            continue
        piece = piece.locate(files, piece) if piece.locate else piece
        if piece.strides is not None:
            return None
        at, until = (piece.start + (each - row) * width * dtype.itemsize for each in (begin, end))
        part = Piece(piece.file, at, until, (begin, column), (end - begin, width))
        rows[begin - first : end - first, column : column + width] = _read_piece(files, entry, part, dtype)
    return _as_float64(rows, entry.dtype)


def read_floats(files: Files, entry: TensorEntry) -> NDArray[np.float64]:
    """A tensor of one of `DTYPE_NAMES` as float64; raises as `read_raw` does."""
    return _as_float64(read_raw(files, entry), entry.dtype)


def _as_float64(raw: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    values: NDArray[np.float64] = raw.view(_FLOAT_DTYPES[dtype]).astype(np.float64)
    return values


def stored_dtype(entries: Mapping[str, TensorEntry]) -> str | None:
    """Name of the float dtype that most parameters are stored in, scales of quantised ones not among them; or None."""
    sizes: dict[str, int] = {}
    for entry in entries.values():
        if entry.dtype in DTYPE_NAMES and not is_part(entry.name):
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(entry.shape)
    return DTYPE_NAMES[max(sizes, key=lambda dtype: sizes[dtype])] if sizes else None


def _make(
    by: Callable[..., NDArray[Any]],
    parts: list[NDArray[Any]],
    entry: TensorEntry,
    dtype: np.dtype[Any],
    into: NDArray[np.uint8] | None,
) -> NDArray[Any]:
    """The values of a tensor that is stored in another form."""
    try:
        made = by(*parts)
        if into is None:
            return np.ascontiguousarray(made).view(dtype).reshape(entry.shape)
        whole = into.view(dtype).reshape(entry.shape)
        whole[...] = made.view(dtype).reshape(entry.shape)
    except (ValueError, IndexError) as error:
        raise CheckpointError(
            f"{entry.file}: of {entry.stored_name} no {entry.name} of {list(entry.shape)} is made; take configuration "
            "and weights from the same place"
        ) from error
    return into


def _read_piece(files: Files, entry: TensorEntry, piece: Piece, dtype: np.dtype[Any]) -> NDArray[Any]:
    piece = piece.locate(files, piece) if piece.locate else piece
    raw = files.read(piece.file, piece.start, piece.end)
    if len(raw) != piece.end - piece.start:
        raise CheckpointError(f"{piece.file}: tensor {entry.name} is cut off; download the file again")
    values = np.frombuffer(raw, dtype)
    if piece.strides is None:
        return values.reshape(piece.shape)
    in_bytes = [stride * dtype.itemsize for stride in piece.strides]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, piece.shape, in_bytes, writeable=False))
