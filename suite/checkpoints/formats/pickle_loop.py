"""The opcodes of a pickle one after another; here are those that most of it consists of, for the sake of time.

The metadata of a checkpoint of many ranks are ten million opcodes, nine of ten in objects with plain fields.
"""

import struct
from typing import Any

from deadbench.suite.checkpoints.formats.pickle_layouts import Layouts
from deadbench.suite.checkpoints.formats.pickle_machine import OPCODES, Machine
from deadbench.suite.checkpoints.formats.pickled_names import Constructor, RefusedError

MAX_OPCODES = 20_000_000  # 128 000 pieces of a checkpoint of torch.distributed take 8 million
_PROTO, _STOP, _MEMOIZE, _BINGET, _LONG_BINGET, _BININT1 = b"\x80.\x94hjK"
_BININT2, _EMPTY_TUPLE, _EMPTY_DICT, _TUPLE1, _TUPLE2 = b"M)}\x85\x86"
_NEW_WITH = b"\x81\x94}\x94("  # what follows a class most often: an object that takes nothing, whose fields come next
_FOUR = struct.Struct("<I").unpack_from


def follow(machine: Machine) -> Any:
    """Follow the opcodes to STOP; what is left is the value.

    Raises:
        RefusedError: what the opcodes are not to do, or too many of them.
    """
    raw, memo, stack, position = machine.raw, machine.memo, machine.stack, machine.position
    push, remember, layouts = stack.append, memo.append, Layouts()
    if raw[position] != _PROTO:
        raise RefusedError("does not begin as one of protocols 2 to 5 does")
    for _ in range(MAX_OPCODES):
        code = raw[position]
        position += 1
        if code == _LONG_BINGET:
            push(memo[_FOUR(raw, position)[0]])
            position += 4
        elif code == _EMPTY_TUPLE:
            maker = stack[-1] if stack else None
            layout = None
            if type(maker) is Constructor and maker.records and raw[position : position + 5] == _NEW_WITH:
                layout = layouts.find(maker.name, raw, position + 5, memo)
            if layout is None:
                push(())
            else:
                stack[-1] = layout.take(raw, position + 5, memo)
                position += 5 + layout.size
        elif code == _MEMOIZE:
            remember(stack[-1])
        elif code == _BINGET:
            push(memo[raw[position]])
            position += 1
        elif code == _BININT1:
            push(raw[position])
            position += 1
        elif code == _BININT2:
            push(raw[position] | raw[position + 1] << 8)
            position += 2
        elif code == _TUPLE1:
            stack[-1] = (stack[-1],)
        elif code == _TUPLE2:
            last = stack.pop()
            stack[-1] = (stack[-1], last)
        elif code == _EMPTY_DICT:
            push({})
        elif code == _STOP:
            machine.position = position
            break
        else:
            step = OPCODES[code]
            if step is None:
                raise RefusedError(f"holds the opcode {code:#04x}, which no checkpoint needs")
            machine.position = position
            step(machine)
            position = machine.position
    else:
        raise RefusedError(f"takes more than {MAX_OPCODES:,} steps")
    if len(stack) != 1 or machine.marks:
        raise RefusedError("leaves more or less than one value")
    return stack[0]
