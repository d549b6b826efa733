"""Pickles of strangers, read without being run: the opcodes of protocols 2 to 5, and constructors of our own.

A pickle is a program that may name any function and call it. Here a name stands for what `pickled_names.py`, or the one
who asks, has for it; every other name is refused when it is read, called or not, and nothing is imported. Bounded are
the bytes, the opcodes, the depth, and what one opcode may make.
"""

import contextlib
import gc
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deadbench.suite.checkpoints.formats.pickle_loop import follow
from deadbench.suite.checkpoints.formats.pickle_machine import Machine
from deadbench.suite.checkpoints.formats.pickled_names import CONSTRUCTORS, CutOffError, RefusedError
from deadbench.suite.errors import CheckpointError

MAX_PICKLE_BYTES = 128_000_000


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile, which time and again finds nothing among millions of new values."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_pickle(
    raw: bytes | memoryview,
    what: str,
    constructors: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None = None,
    start: int = 0,
) -> tuple[Any, int]:
    """What a pickle holds, and where it ends.

    Args:
        raw: the bytes, of which those from `start` on are read, up to the end of one pickle.
        what: what messages call it.
        constructors: names that it may hold beside those of `CONSTRUCTORS`, and what each stands for: a `Constructor`,
            or a value.
        persistent: what a persistent id stands for; None: there are none.
        start: where it begins.

    Raises:
        CheckpointError: no pickle, one of another protocol, a name that is not known, or more of something than any
            checkpoint has; one line.
    """
    machine = Machine(raw, start, {**CONSTRUCTORS, **constructors}, persistent)
    try:
        if len(raw) - start > MAX_PICKLE_BYTES:
            raise RefusedError(f"of {len(raw) - start:,} bytes is larger than {MAX_PICKLE_BYTES:,}")
        return follow(machine), machine.position
    except RefusedError as error:
        raise CheckpointError(f"{what}: the pickle {error}; it is not opened") from None
    except (struct.error, IndexError):
        raise CutOffError(f"{what}: the pickle is cut off or corrupt; download the file again") from None
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError, UnicodeError) as error:
        text = f"{type(error).__name__} at byte {machine.position}"
        raise CheckpointError(f"{what}: the pickle is corrupt ({text}); download the file again") from None
