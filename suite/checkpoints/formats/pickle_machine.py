"""The machine that pickles are programs for, with the opcodes of protocols 2 to 5 and none that imports or calls.

Opcodes: `pickletools` of Python's library.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from deadbench.suite.checkpoints.formats.pickled_names import MAX_TEXT, Constructor, Record, RefusedError, plain_key
from deadbench.suite.checkpoints.strict_json import shown

MAX_OPCODES = 20_000_000  # 128 000 pieces of a checkpoint of torch.distributed take 8 million
_MAX_TAKEN = 4_000_000  # items that calls take in, each of which may be taken again: of those pieces 1 million
_MAX_MARKS = 200
_MAX_LONG_BYTES = 16
_BININT2, _SET_ITEMS, _BUILD = b"Mub"
_PROTO, _STOP, _MEMOIZE, _BINGET, _LONG_BINGET, _BININT1 = b"\x80.\x94hjK"
_EMPTY_TUPLE, _EMPTY_DICT, _TUPLE1, _TUPLE2 = b")}\x85\x86"
# What follows an opcode most often: an object of a class that takes nothing, whose attributes come next; and
# a call with the tuple that was made last.
_NEW_WITH, _CALL_WITH = b"\x81\x94}\x94(", b"\x94\x85\x94R\x94"
_FOUR = struct.Struct("<I").unpack_from
_SIZED = (list, tuple, dict, set, frozenset, str, bytes)


class Machine:
    """The stack machine that a pickle is written for.

    Attributes:
        position: of the next opcode.
    """

    def __init__(
        self, raw: bytes | memoryview, start: int, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None
    ):
        """Begin at `start`; `known` and `persistent` as `read_pickle` has them."""
        self.position = start
        self._raw, self._known, self._resolve = raw, known, persistent
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._spent = 0  # what calls took in

    def run(self) -> Any:
        """Follow the opcodes to STOP; what is left is the value.

        Those that nine tenths of a pickle consist of are met here, for the sake of time: a checkpoint of many ranks has
        ten million.
        """
        raw, table, memo, position, stack = self._raw, _OPCODES, self._memo, self.position, self._stack
        if raw[position] != _PROTO:
            raise RefusedError("does not begin as one of protocols 2 to 5 does")
        for _ in range(MAX_OPCODES):
            code = raw[position]
            position += 1
            if code == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code == _LONG_BINGET:
                (index,) = _FOUR(raw, position)
                stack.append(memo[index])
                position += 4
            elif code == _BINGET:
                stack.append(memo[raw[position]])
                position += 1
            elif code == _BININT1:
                stack.append(raw[position])
                position += 1
            elif code == _BININT2:
                stack.append(raw[position] | raw[position + 1] << 8)
                position += 2
            elif code == _TUPLE2:
                last = stack.pop()
                stack[-1] = pair = (stack[-1], last)
                if raw[position : position + 5] == _CALL_WITH and type(stack[-2]) is Constructor:
                    self._spend(2)
                    stack.pop()
                    memo[len(memo)] = pair
                    memo[len(memo)] = (pair,)
                    memo[len(memo)] = stack[-1] = stack[-1].make(pair)
                    position += 5
            elif code == _EMPTY_TUPLE:
                if raw[position : position + 5] == _NEW_WITH and type(stack[-1]) is Constructor:
                    memo[len(memo)] = stack[-1] = stack[-1].make()
                    fields: dict[Any, Any] = {}
                    memo[len(memo)] = fields
                    stack.append(fields)
                    self._mark()
                    stack = self._stack
                    position += 5
                else:
                    stack.append(())
            elif code == _SET_ITEMS:
                self._set_marked()
                stack = self._stack
                if raw[position] == _BUILD and type(stack[-2]) is Record:
                    self._build()
                    position += 1
            elif code == _TUPLE1:
                stack[-1] = (stack[-1],)
            elif code == _EMPTY_DICT:
                stack.append({})
            elif code == _STOP:
                self.position = position
                break
            else:
                step = table[code]
                if step is None:
                    raise RefusedError(f"holds the opcode {code:#04x}, which no checkpoint needs")
                self.position = position
                step(self)
                position, stack = self.position, self._stack
        else:
            raise RefusedError(f"takes more than {MAX_OPCODES:,} steps")
        if len(self._stack) != 1 or self._marks:
            raise RefusedError("leaves more or less than one value")
        return self._stack[0]

    # What opcodes read.

    def _number(self, size: int) -> int:
        end = self.position + size
        if end > len(self._raw):
            raise IndexError
        value = int.from_bytes(self._raw[self.position : end], "little")
        self.position = end
        return value

    def _bytes(self, count: int) -> bytes:
        start, end = self.position, self.position + count
        if end > len(self._raw):
            raise IndexError
        self.position = end
        return bytes(self._raw[start:end])

    def _text(self, count: int) -> None:
        self._stack.append(self._bytes(count).decode("utf-8", "surrogatepass"))

    def _old_text(self, count: int) -> None:
        raw = self._bytes(count)
        try:
            self._stack.append(raw.decode())
        except UnicodeDecodeError:
            self._stack.append(raw)

    def _line(self) -> str:
        window = bytes(self._raw[self.position : self.position + MAX_TEXT])
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
        self._stack.append(int.from_bytes(self._bytes(count), "little", signed=True))

    def _signed(self) -> None:
        self._stack.append(struct.unpack_from("<i", self._raw, self.position)[0])
        self.position += 4

    def _float(self) -> None:
        self._stack.append(struct.unpack_from(">d", self._raw, self.position)[0])
        self.position += 8

    def _remember(self) -> None:
        self._memo[self._raw[self.position]] = self._stack[-1]
        self.position += 1

    def _mark(self) -> None:
        if len(self._marks) >= _MAX_MARKS:
            raise RefusedError(f"nests values more than {_MAX_MARKS} deep")
        self._marks.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _tuple_of_three(self) -> None:
        last, middle, first = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._stack.append((first, middle, last))

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked()

    def _append_all(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise RefusedError(f"appends to a {type(target).__name__}")
        target.extend(items)

    def _append_one(self) -> None:
        item = self._stack.pop()
        self._append_all([item])

    def _set_marked(self) -> None:
        self._set_all(self._marked())

    def _set_all(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise RefusedError(f"sets items of a {type(target).__name__}")
        rest = iter(items)
        for key in rest:
            target[key if type(key) is str else plain_key(key)] = next(rest)

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_all([key, value])

    def _add_all(self) -> None:
        items = self._marked()
        target = self._stack[-1]
        if type(target) is not set:
            raise RefusedError(f"adds to a {type(target).__name__}")
        target.update(map(plain_key, items))

    def _push_marked(self, kind: Callable[[list[Any]], Any]) -> None:
        items = self._marked()
        self._stack.append(kind(items))

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedError(f"names {shown(module)}.{shown(name)}")
        full = f"{module}.{name}"
        if full not in self._known:
            raise RefusedError(
                f"names {full[:100] if full.isprintable() else shown(full)}, which is no tensor, number or plain "
                "container and could run code"
            )
        self._stack.append(self._known[full])

    def _stacked_name(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _spend(self, count: int) -> None:
        self._spent += count
        if self._spent > _MAX_TAKEN:
            raise RefusedError(f"takes more than {_MAX_TAKEN:,} items into its calls")

    def _call(self) -> None:
        args, made = self._stack.pop(), self._stack.pop()
        if type(made) is not Constructor or type(args) is not tuple:
            raise RefusedError(f"calls {shown(made)}")
        for each in args:
            if isinstance(each, _SIZED):
                self._spend(len(each))
        self._stack.append(made.make(*args))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
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
        self._stack.append(self._resolve(self._stack.pop()))


def _push(value: Any) -> Callable[[Machine], object]:
    return lambda m: m._stack.append(value)


def _new(kind: type) -> Callable[[Machine], object]:
    return lambda m: m._stack.append(kind())


_STEPS: dict[bytes, Callable[[Machine], object]] = {
    b"\x80": Machine._protocol,
    b"\x95": lambda m: m._bytes(8),
    b"N": _push(None),
    b"\x88": _push(True),
    b"\x89": _push(False),
    b"M": lambda m: m._stack.append(m._number(2)),
    b"J": Machine._signed,
    b"\x8a": lambda m: m._long(1),
    b"\x8b": lambda m: m._long(4),
    b"G": Machine._float,
    b"\x8c": lambda m: m._text(m._number(1)),
    b"X": lambda m: m._text(m._number(4)),
    b"\x8d": lambda m: m._text(m._number(8)),
    b"U": lambda m: m._old_text(m._number(1)),
    b"T": lambda m: m._old_text(m._number(4)),
    b"C": lambda m: m._stack.append(m._bytes(m._number(1))),
    b"B": lambda m: m._stack.append(m._bytes(m._number(4))),
    b"\x8e": lambda m: m._stack.append(m._bytes(m._number(8))),
    b"\x96": lambda m: m._stack.append(m._bytes(m._number(8))),
    b"]": _new(list),
    b"\x8f": _new(set),
    b"(": Machine._mark,
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
    b"q": Machine._remember,
    b"r": lambda m: m._memo.update({m._number(4): m._stack[-1]}),
    b"c": lambda m: m._name(m._line(), m._line()),
    b"\x93": Machine._stacked_name,
    b"R": Machine._call,
    b"\x81": Machine._call,
    b"b": Machine._build,
    b"Q": Machine._persistent,
}
_OPCODES: list[Callable[[Machine], object] | None] = [_STEPS.get(bytes([code])) for code in range(256)]
