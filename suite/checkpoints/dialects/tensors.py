"""The tensors of a checkpoint on their way from one library's names and forms to another's.

Nothing is read here: a tensor of another form is made when it is asked for, of the values of those that it comes from.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.checkpoints.tensors import TensorEntry
from deadbench.suite.errors import CheckpointError

Values = NDArray[Any]  # as unsigned integers of the items' size
_HOLDERS = re.compile(r"^(?:(?:_orig_mod|_forward_module|_fsdp_wrapped_module|module|model|net)\.)+")


class Tensors:
    """The tensors of one dialect, of which those become transformers' whose rule is known.

    Attributes:
        without_place: those that transformers' model has no place for, and that do nothing where they are zero.
    """

    def __init__(self, entries: Iterable[TensorEntry]):
        """Begin with `entries`, under the names that they are stored by; prefixes of wrappers do not matter."""
        self._stored = {_HOLDERS.sub("", entry.name): entry for entry in entries}
        self._made: dict[str, TensorEntry] = {}
        self._used: set[str] = set()
        self.without_place: list[TensorEntry] = []

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __getitem__(self, name: str) -> TensorEntry:
        return self._stored[name]

    def blocks(self, begin: str) -> list[int]:
        """The numbers of the blocks whose names begin with `begin`."""
        found = {name.removeprefix(begin).partition(".")[0] for name in self._stored if name.startswith(begin)}
        return sorted(int(number) for number in found if number.isdecimal() and len(number) < 6)

    def rename(self, names: Mapping[str, str], block: int | None = None) -> None:
        """Give transformers' names to what is only called otherwise; `{}` in both stands for `block`."""
        for stored, name in names.items():
            self.make(_numbered(name, block), (_numbered(stored, block),))

    def make(
        self,
        name: str,
        stored: Sequence[str],
        shape: tuple[int, ...] | None = None,
        by: Callable[..., Values] | None = None,
        *,
        dtype: str | None = None,
    ) -> None:
        """Make `name` of what is stored under other names, where all of that is there; without `by` it is the same.

        What is made already stays as it is.

        Raises:
            CheckpointError: there are not as many values as `shape` has.
        """
        if name in self._made or not all(each in self._stored for each in stored):
            return
        parts = tuple(self._stored[each] for each in stored)
        self._used.update(stored)
        first = parts[0]
        if by is None:
            self._made[name] = replace(first, name=name, called=first.stored_name)
            return
        shape = first.shape if shape is None else shape
        self._made[name] = replace(
            first, name=name, called=first.stored_name, dtype=dtype or first.dtype, shape=shape, pieces=(), flat=False,
            parts=parts, made=by,
        )  # fmt: skip

    def turn(self, names: Mapping[str, str], block: int | None = None) -> None:
        """As `rename`, of matrices that are stored the other way round."""
        for stored, name in names.items():
            stored = _numbered(stored, block)
            if stored in self._stored:
                self.make(_numbered(name, block), (stored,), self._stored[stored].shape[::-1], np.transpose)

    def fill(self, name: str, like: str, width: int, value: float) -> None:
        """Make the vector `name`, which is not stored, all of one `value`, beside `like`, which is no smaller."""
        entry = self._stored[like]
        if width <= math.prod(entry.shape):
            shape, dtype = (width,), entry.dtype
            made = replace(entry, name=name, called=None, shape=shape, pieces=(), flat=False)
            whole = functools.partial(_constant, shape, value, dtype)
            self._made.setdefault(name, replace(made, parts=(), made=whole))

    def leave_out(self, pattern: str) -> None:
        """Leave out what follows from the configuration: masks, angles."""
        self._used.update(name for name in self._stored if re.search(pattern, name))

    def leave_out_zeros(self, names: Iterable[str]) -> None:
        """Leave out what the architecture has no place for, if it is zero: that is seen when weights are loaded."""
        there = [name for name in names if name in self._stored and name not in self._used]
        self.without_place += [self._stored[name] for name in there]
        self._used.update(there)

    def all(self) -> list[TensorEntry]:
        """Those that became transformers', and as they are stored those of which nothing is known."""
        return [*self._made.values(), *(entry for name, entry in self._stored.items() if name not in self._used)]


def need(entry: TensorEntry, shape: tuple[int, ...]) -> None:
    """Check what is stored before it is taken apart.

    Raises:
        CheckpointError: it is of another shape.
    """
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.file}: {entry.stored_name} is of shape {list(entry.shape)}; by its configuration it would be "
            f"{list(shape)}; take both from the same place"
        )


def joined(name: str, parts: Sequence[TensorEntry], axis: int) -> TensorEntry:
    """One tensor of its parts along an axis.

    Raises:
        CheckpointError: parts that do not fit together.
    """
    first = parts[0]
    if len(parts) == 1:
        return replace(first, name=name, called=first.stored_name)
    others = [
        part for part in parts if (part.dtype, _without(part.shape, axis)) != (first.dtype, _without(first.shape, axis))
    ]
    if others or axis >= len(first.shape):
        other = (others or parts)[-1]
        raise CheckpointError(
            f"{other.file}: {other.stored_name} is {other.dtype} of shape {list(other.shape)}, and does not fit to "
            f"{first.dtype} of {list(first.shape)} in {first.file}; take the files of all ranks from one checkpoint"
        )
    shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
    return replace(
        first, name=name, called=first.stored_name, shape=shape, pieces=(), flat=False, parts=tuple(parts),
        made=lambda *values: np.concatenate(values, axis),
    )  # fmt: skip


def combined(name: str, parts: Sequence[TensorEntry], by: Callable[[Values], Values]) -> TensorEntry:
    """One tensor of as many of the same shape: `by` makes it of all their values in float32, one after another.

    Raises:
        CheckpointError: they are of different shapes or dtypes.
    """
    first = parts[0]
    if any((part.dtype, part.shape) != (first.dtype, first.shape) for part in parts):
        raise CheckpointError(
            f"{first.file}: {first.stored_name} has other shapes in other files; take all from one checkpoint"
        )

    def make(*values: Values) -> Values:
        return as_bits(by(np.stack([as_floats(each, first.dtype) for each in values])), first.dtype)

    return replace(first, name=name, called=first.stored_name, pieces=(), flat=False, parts=tuple(parts), made=make)


def as_floats(values: Values, dtype: str) -> NDArray[np.float32]:
    """Stored values as float32."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float32)


def as_bits(values: NDArray[np.float32], dtype: str) -> Values:
    """float32 as what is stored, rounded to the nearest, of two the even one."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    form = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    return np.ascontiguousarray(values, form).view(f"<u{np.dtype(form).itemsize}")


def of_groups(number: int, heads: int, groups: int, size: int) -> Callable[[Values], Values]:
    """What takes the queries, keys or values out of a map in which each group's queries, key and value lie together."""
    each = heads // groups
    part = (slice(0, each), slice(each, each + 1), slice(each + 1, each + 2))[number]

    def take(values: Values) -> Values:
        behind = values.shape[1:]
        return values.reshape(groups, each + 2, size, *behind)[:, part].reshape(-1, *behind)

    return take


def heads_of(
    config: Mapping[str, Any], heads: str = "num_attention_heads", width: str = "hidden_size"
) -> tuple[int, int, int]:
    """Heads of queries, groups of them that share keys and values, and the width of each head.

    Raises:
        CheckpointError: the configuration does not say them.
    """
    told = [config.get(heads), config.get("num_key_value_heads") or config.get(heads), config.get(width)]
    numbers = [n if isinstance(n, int) and n > 0 else 0 for n in told]
    if not all(numbers) or numbers[0] % numbers[1]:
        raise CheckpointError(f"{heads} is {told[0]}, of {told[1]} groups, and {width} {told[2]}; give --config")
    size = config.get("head_dim")
    return numbers[0], numbers[1], size if isinstance(size, int) and size > 0 else numbers[2] // numbers[0]


def rows(start: int, stop: int) -> Callable[[Values], Values]:
    """What takes rows `start` to `stop` of a matrix, or values of a vector."""
    return lambda values: values[start:stop]


def _constant(shape: tuple[int, ...], value: float, dtype: str) -> Values:
    return as_bits(np.full(shape, value, np.float32), dtype)


def _numbered(name: str, block: int | None) -> str:
    return name if block is None else name.replace("{}", str(block))


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
