"""Whether a place makes a file exclusively, as is tried: who says that it can may overwrite, and answers get lost."""

import contextlib
import time
from collections.abc import Callable

_PAUSES = (0.0, 0.5, 1.0)  # seconds before each attempt: what passes is not taken for what the place cannot do
_OTHERS = 2


def makes_once(make: Callable[[bytes], None], content: Callable[[], bytes | None], first: bytes) -> bool:
    """Whether `first` can be made, and nothing else over it; what is then there decides, not what was answered.

    Args:
        make: makes the file exclusively; raises what the place's library does.
        content: of the file, None where there is none.
        first: of the file that must stay.
    """
    for pause in _PAUSES:
        if pause:
            time.sleep(pause)
        with contextlib.suppress(Exception):
            make(first)
        with contextlib.suppress(Exception):
            if content() == first:
                break
    else:
        return False
    for _ in range(_OTHERS):
        with contextlib.suppress(Exception):
            make(first + b"\n")
    return content() == first
