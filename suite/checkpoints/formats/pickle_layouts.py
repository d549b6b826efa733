"""Objects with plain fields are laid out in a pickle in few ways, a hundred thousand of them after each other in one.

How one is laid out is found out once; the next ones are told by their opcodes, all at once, and only numbers are taken.
"""

import struct
from collections.abc import Callable
from typing import Any

from deadbench.suite.checkpoints.formats.pickled_names import Constructor, Record

_MOST = 16  # layouts of a class that are kept
_MEMOIZE = 0x94
_ALL_SET = b"ub"
# By opcodes, what follows them in terms of `struct`, and in bytes.
_NUMBERS = {ord("K"): ("B", 1), ord("M"): ("H", 2), ord("J"): ("i", 4)}
_MET = {ord("h"): ("B", 1), ord("j"): ("I", 4)}
_TEXT = 0x8C
# A call with one, two or three numbers that lie on the stack.
_CALL_WITH = tuple(tuple_of + b"\x94\x85\x94R\x94" for tuple_of in (b"\x85", b"\x86", b"\x87"))
_Field = tuple[str, Callable[..., Any] | None, int, int]


class Layout:
    """How the fields of an object lie.

    Attributes:
        size: bytes, up to the end of the object.
        mask: which bits of them are the same in each object that is laid out so.
        bits: those.
    """

    __slots__ = ("_fields", "_kind", "_unpack", "bits", "mask", "size")

    def __init__(self, kind: str, raw: bytes, form: str, fixed: bytes, fields: list[_Field]):
        """Of the bytes `raw` those that are 255 in `fixed`; the others are numbers in the `form` of `struct`."""
        self.size, self.mask = len(raw), int.from_bytes(fixed, "little")
        self.bits = int.from_bytes(raw, "little") & self.mask
        self._kind, self._fields, self._unpack = kind, fields, struct.Struct(f"<{form}").unpack_from

    def take(self, raw: bytes | memoryview, position: int, memo: list[Any]) -> Record:
        """The object whose fields begin at `position`."""
        told = self._unpack(raw, position)
        fields: dict[Any, Any] = {}
        made = Record(self._kind, fields)
        memo += (made, fields)
        for name, make, at, end in self._fields:
            if make is None:
                fields[name] = told[at]
            elif make is _of_memo:
                fields[name] = memo[told[at]]
            elif make is _text:
                fields[name] = text = _text(told[at])
                memo.append(text)
            else:
                numbers = told[at:end]
                fields[name] = value = make(numbers)
                memo += (numbers, (numbers,), value)
        return made


class Layouts:
    """The layouts that were met, by classes."""

    def __init__(self) -> None:
        """None was."""
        self._met: dict[str, list[Layout]] = {}

    def find(self, kind: str, raw: bytes | memoryview, position: int, memo: list[Any]) -> Layout | None:
        """How the fields from `position` on of an object of the class `kind` lie; None where they are not all plain."""
        met = self._met.setdefault(kind, [])
        for place, layout in enumerate(met):
            if int.from_bytes(raw[position : position + layout.size], "little") & layout.mask == layout.bits:
                if place:
                    met.insert(0, met.pop(place))
                return layout
        found = _layout(kind, raw, position, memo)
        if found is not None:
            met.insert(0, found)
            del met[_MOST:]
        return found


def _layout(kind: str, raw: bytes | memoryview, begin: int, memo: list[Any]) -> Layout | None:
    """How fields lie: a name that was met before, then a value that was, a whole number, a text, or a call of such."""
    form, fixed, fields, position, count = "", bytearray(), list[_Field](), begin, 0

    def operand(kind: str, size: int) -> None:
        nonlocal form, position, count
        form += f"x{kind}"
        fixed.extend(b"\xff" + b"\0" * size)
        position, count = position + 1 + size, count + 1

    def same(size: int) -> None:
        nonlocal form, position
        form += f"{size}x"
        fixed.extend(b"\xff" * size)
        position += size

    def met_before() -> tuple[Any, int]:
        size = _MET[raw[position]][1]
        number = int.from_bytes(raw[position + 1 : position + 1 + size], "little")
        return (memo[number] if number < len(memo) else None), size

    while raw[position : position + 2] != _ALL_SET:
        if raw[position] not in _MET:
            return None
        name, size = met_before()
        if type(name) is not str:
            return None
        same(1 + size)
        code = raw[position]
        if code in _NUMBERS:
            fields.append((name, None, count, count + 1))
            operand(*_NUMBERS[code])
        elif code == _TEXT:
            length = raw[position + 1]
            if raw[position + 2 + length] != _MEMOIZE:
                return None
            fields.append((name, _text, count, count + 1))
            same(1)
            form += f"x{length}s"
            fixed.extend(b"\xff" + b"\0" * length)
            position, count = position + 1 + length, count + 1
            same(1)
        elif code in _MET:
            value, size = met_before()
            if type(value) is Constructor:
                same(1 + size)
                first = count
                while raw[position] in _NUMBERS and count < first + 3:
                    operand(*_NUMBERS[raw[position]])
                calls = _CALL_WITH[max(count - first, 1) - 1]
                if raw[position : position + len(calls)] != calls or first == count:
                    return None
                same(len(calls))
                fields.append((name, value.of_numbers, first, count))
            else:
                fields.append((name, _of_memo, count, count + 1))
                operand(*_MET[code])
        else:
            return None
    same(2)
    return Layout(kind, bytes(raw[begin:position]), form, bytes(fixed), fields)


def _of_memo(value: Any) -> Any:
    return value


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")
