"""The machine that pickles are programs for, with the opcodes of protocols 2 to 5 and none that imports or calls.

Opcodes: `pickletools` of Python's library. In which order they are followed, `pickle_loop.py` says.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from deadbench.suite.checkpoints.formats.pickled_names import MAX_TEXT, Constructor, Record, RefusedError, plain_key
from deadbench.suite.checkpoints.strict_json import shown

_MAX_TAKEN = 4_000_000  # items that calls take in, each of which may be taken again: of 128 000 pieces 1 million
_MAX_MARKS = 200
_MAX_LONG_BYTES = 16
_PLAIN_KEYS = (str, Record)
_SIZED = (list, tuple, dict, set, frozenset, str, bytes)


class Machine:
    """The stack machine that a pickle is written for.

    Attributes:
        raw: the pickle.
        position: of the next opcode.
        stack: the values that opcodes work on.
        marks: how many values were on it at each mark.
        memo: values to be taken again, by their numbers.
    """

    def __init__(
        self, raw: bytes | memoryview, start: int, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None
    ):
        """Begin at `start`; `known` and `persistent` as `read_pickle` has them."""
        self.raw, self.position = raw, start
        self._known, self._resolve = known, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self._spent = 0  # what calls took in

    # What opcodes read.

    def _number(self, size: int) -> int:
        end = self.position + size
        if end > len(self.raw):
            raise IndexError
        value = int.from_bytes(self.raw[self.position : end], "little")
        self.position = end
        return value

    def _bytes(self, count: int) -> bytes:
        start, end = self.position, self.position + count
        if end > len(self.raw):
            raise IndexError
        self.position = end
        return bytes(self.raw[start:end])

    def _text(self, count: int) -> None:
        self.stack.append(self._bytes(count).decode("utf-8", "surrogatepass"))

    def _old_text(self, count: int) -> None:
        raw = self._bytes(count)
        try:
            self.stack.append(raw.decode())
        except UnicodeDecodeError:
            self.stack.append(raw)

    def _line(self) -> str:
        window = bytes(self.raw[self.position : self.position + MAX_TEXT])
        end = window.index(b"\n")
        self.position += end + 1
        return window[:end].decode()

    # What they do.

    def _protocol(self) -> None:
        version = self._number(1)
        if not 2 <= version <= 5:
            raise RefusedError(f"is of protocol {version}; 2 to 5 are read")

    def _long(self, size: int) -> None:
        count = self._number(size)
        if count > _MAX_LONG_BYTES:
            raise RefusedError(f"holds an integer of {count:,} bytes")
        self.stack.append(int.from_bytes(self._bytes(count), "little", signed=True))

    def _signed(self) -> None:
        self.stack.append(struct.unpack_from("<i", self.raw, self.position)[0])
        self.position += 4

    def _float(self) -> None:
        self.stack.append(struct.unpack_from(">d", self.raw, self.position)[0])
        self.position += 8

    def _remember(self, number: int) -> None:
        if number == 1 and not self.memo:  # Python 2 counts from one
            self.memo.append(Record("nothing"))
        if number != len(self.memo):
            raise RefusedError(f"remembers a value as number {number:,}, not {len(self.memo):,}")
        self.memo.append(self.stack[-1])

    def mark(self) -> None:
        """Begin a group of values.

        Raises:
            RefusedError: within more groups than any program of pickles makes.
        """
        if len(self.marks) >= _MAX_MARKS:
            raise RefusedError(f"nests values more than {_MAX_MARKS} deep")
        self.marks.append(len(self.stack))

    def _marked(self) -> list[Any]:
        begin = self.marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def _tuple_of_three(self) -> None:
        last, middle, first = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append((first, middle, last))

    def _pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def _append_all(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise RefusedError(f"appends to a {type(target).__name__}")
        target.extend(items)

    def _append_one(self) -> None:
        item = self.stack.pop()
        self._append_all([item])

    def _set_marked(self) -> None:
        self._set_all(self._marked())

    def _set_all(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise RefusedError(f"sets items of a {type(target).__name__}")
        rest = iter(items)
        for key in rest:
            target[key if type(key) in _PLAIN_KEYS else plain_key(key)] = next(rest)

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_all([key, value])

    def _add_all(self) -> None:
        items = self._marked()
        target = self.stack[-1]
        if type(target) is not set:
            raise RefusedError(f"adds to a {type(target).__name__}")
        target.update(map(plain_key, items))

    def _push_marked(self, kind: Callable[[list[Any]], Any]) -> None:
        items = self._marked()
        self.stack.append(kind(items))

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedError(f"names {shown(module)}.{shown(name)}")
        full = f"{module}.{name}"
        if full not in self._known:
            raise RefusedError(
                f"names {full[:100] if full.isprintable() else shown(full)}, which is no tensor, number or plain "
                "container and could run code"
            )
        self.stack.append(self._known[full])

    def _stacked_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _spend(self, count: int) -> None:
        self._spent += count
        if self._spent > _MAX_TAKEN:
            raise RefusedError(f"takes more than {_MAX_TAKEN:,} items into its calls")

    def _call(self) -> None:
        args, made = self.stack.pop(), self.stack.pop()
        if type(made) is not Constructor or type(args) is not tuple:
            raise RefusedError(f"calls {shown(made)}")
        for each in args:
            if isinstance(each, _SIZED):
                self._spend(len(each))
        self.stack.append(made.make(*args))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Record:
            if isinstance(state, dict) and not target.fields:
                target.fields = state
            elif isinstance(state, dict):
                target.fields.update(state)
                self._spend(len(state))
            else:
                target.fields["state"] = state
        elif type(target) is not dict:  # the attributes of an OrderedDict are not read
            raise RefusedError(f"sets attributes of a {type(target).__name__}")

    def _persistent(self) -> None:
        if self._resolve is None:
            raise RefusedError("refers to something outside it")
        self.stack.append(self._resolve(self.stack.pop()))


def _push(value: Any) -> Callable[[Machine], object]:
    return lambda m: m.stack.append(value)


def _new(kind: type) -> Callable[[Machine], object]:
    return lambda m: m.stack.append(kind())


_STEPS: dict[bytes, Callable[[Machine], object]] = {
    b"\x80": Machine._protocol,
    b"\x95": lambda m: m._bytes(8),
    b"N": _push(None),
    b"\x88": _push(True),
    b"\x89": _push(False),
    b"M": lambda m: m.stack.append(m._number(2)),
    b"J": Machine._signed,
    b"\x8a": lambda m: m._long(1),
    b"\x8b": lambda m: m._long(4),
    b"G": Machine._float,
    b"\x8c": lambda m: m._text(m._number(1)),
    b"X": lambda m: m._text(m._number(4)),
    b"\x8d": lambda m: m._text(m._number(8)),
    b"U": lambda m: m._old_text(m._number(1)),
    b"T": lambda m: m._old_text(m._number(4)),
    b"C": lambda m: m.stack.append(m._bytes(m._number(1))),
    b"B": lambda m: m.stack.append(m._bytes(m._number(4))),
    b"\x8e": lambda m: m.stack.append(m._bytes(m._number(8))),
    b"\x96": lambda m: m.stack.append(m._bytes(m._number(8))),
    b"]": _new(list),
    b"\x8f": _new(set),
    b"(": Machine.mark,
    b"t": lambda m: m._push_marked(tuple),
    b"\x87": Machine._tuple_of_three,
    b"a": Machine._append_one,
    b"e": lambda m: m._append_all(m._marked()),
    b"s": Machine._set_one,
    b"u": Machine._set_marked,
    b"\x90": Machine._add_all,
    b"\x91": lambda m: m._push_marked(lambda items: frozenset(map(plain_key, items))),
    b"0": Machine._pop,
    b"1": Machine._marked,
    b"q": lambda m: m._remember(m._number(1)),
    b"r": lambda m: m._remember(m._number(4)),
    b"c": lambda m: m._name(m._line(), m._line()),
    b"\x93": Machine._stacked_name,
    b"R": Machine._call,
    b"\x81": Machine._call,
    b"b": Machine._build,
    b"Q": Machine._persistent,
}
OPCODES: list[Callable[[Machine], object] | None] = [_STEPS.get(bytes([code])) for code in range(256)]
