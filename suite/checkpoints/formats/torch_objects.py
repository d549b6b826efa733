"""What torch writes into pickles: tensors as views of storages, dtypes, sizes, devices; each as a plain record.

What a tensor is made of is checked here against its storage; where the storage lies, its format says.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deadbench.suite.checkpoints.formats.pickled_names import Constructor, RefusedError, record
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.checkpoints.tensors import ITEM_BYTES, MAX_DIMENSIONS, MAX_EXTENT, Piece

_EXPANDED_VALUES = 2**20  # of a view with more values than its storage, as `expand` makes

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32", "Short": "I16",
    "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class DType:
    """A dtype of torch, by the name that it has in headers; as a storage's, what its items are."""

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """A storage: its key in the file, what its items are, and how many there are."""

    key: str
    dtype: str
    count: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the storage."""
        return self.count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A view of a storage: items of `dtype`, the first of them `offset`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def piece(self, file: str, **where: Any) -> Piece:
        """Its bytes, counted from the storage's first; `where` has what else a `Piece` says."""
        item = ITEM_BYTES[self.dtype]
        start = self.offset * item
        end = start + _span(self.shape, self.strides) * item
        plain = _contiguous(self.shape, self.strides)
        return Piece(file, start, end, (0,) * len(self.shape), self.shape, None if plain else self.strides, **where)


def read_storage(told: Any) -> Storage:
    """The storage that a persistent id stands for: ("storage", type, key, device, number of items)."""
    if type(told) is not tuple or len(told) not in (5, 6) or told[0] != "storage" or not isinstance(told[1], DType):
        raise RefusedError(f"refers to {shown(told)}, which is no storage")
    if len(told) == 6 and told[5] is not None:
        raise RefusedError("holds views of storages, as torch before 0.4 wrote them")
    key, count = told[2], told[4]
    if not isinstance(key, str) or type(count) is not int or not 0 <= count <= MAX_EXTENT:
        raise RefusedError(f"holds a storage {shown(key)} of {shown(count)} items")
    return Storage(key, told[1].name, count)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, told: Any = None
) -> StoredTensor:
    if not isinstance(storage, Storage) or told:  # what is told is that the values are to be conjugated or negated
        raise RefusedError(f"makes a tensor of {shown(storage)}, {shown(told)}")
    return _view(storage, storage.dtype, offset, shape, strides)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, told: Any = None
) -> StoredTensor:
    """A view of a storage of bytes."""
    if not isinstance(storage, Storage) or not isinstance(dtype, DType) or told:
        raise RefusedError(f"makes a tensor of {shown(storage)}, {shown(dtype)}")
    return _view(storage, dtype.name, offset, shape, strides)


def _view(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    sane = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_DIMENSIONS
    sane = sane and all(type(n) is int and 0 <= n <= MAX_EXTENT for n in (offset, *shape, *strides))
    if not sane:
        raise RefusedError(f"makes a tensor of shape {shown(shape)}, strides {shown(strides)}, offset {shown(offset)}")
    held = storage.num_bytes // ITEM_BYTES[dtype]
    values, span = math.prod(shape), _span(shape, strides)
    if (span and offset + span > held) or (values > held and values > _EXPANDED_VALUES):
        raise RefusedError(
            f"makes a tensor of shape {shown(shape)}, strides {shown(strides)} and offset {offset} of a storage of "
            f"{held:,} values, beyond its end"
        )
    return StoredTensor(storage, dtype, offset, shape, strides)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Items from a view's first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if math.prod(shape) else 0


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and step != expected:
            return math.prod(shape) == 0
        expected *= n
    return True


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _subclass(make: Any, kind: Any, args: Any, *_: Any) -> StoredTensor:
    """A tensor with attributes of its own, which are not read."""
    if make not in (_TENSORS[0], _TENSORS[1], _TENSORS[2]) or kind not in _KINDS or not isinstance(args, tuple):
        raise RefusedError(f"makes a tensor by {shown(make)}")
    made: StoredTensor = make.make(*args)
    return made


class Size(tuple[int, ...]):
    """A torch.Size, of whole numbers alone."""

    __slots__ = ()


def _size(items: Any = ()) -> Size:
    for each in items if type(items) in (tuple, list) else (None,):
        if type(each) is not int:
            raise RefusedError(f"has a torch.Size of {shown(items)}")
    return Size(items)


def _device(*args: Any) -> str:
    return ":".join(str(each) for each in args if isinstance(each, (str, int)))


_KINDS = (record("torch.Tensor"), record("torch.nn.parameter.Parameter"))
_TENSORS = (
    Constructor("torch._utils._rebuild_tensor_v2", _tensor),
    Constructor("torch._utils._rebuild_tensor_v3", _typed_tensor),
    Constructor("torch._utils._rebuild_tensor", _tensor),
)
TORCH_NAMES: Mapping[str, Any] = (
    {f"torch.{name}": DType(dtype) for name, dtype in _DTYPES.items()}
    | {f"torch.{name}Storage": DType(dtype) for name, dtype in _STORAGES.items()}
    | {"torch.storage.UntypedStorage": DType("U8"), "torch.UntypedStorage": DType("U8")}
    | {
        each.name: each
        for each in (
            *_TENSORS,
            *_KINDS,
            Constructor("torch._utils._rebuild_parameter", _parameter),
            Constructor("torch._utils._rebuild_parameter_with_state", _parameter),
            Constructor("torch._tensor._rebuild_from_type_v2", _subclass),
            Constructor("torch.Size", _size, of_numbers=Size),
            Constructor("torch.device", _device),
        )
    }
)
