"""While something of a stranger's is built, nothing is fetched: what it names elsewhere is not what is measured."""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any

from deadbench.suite.errors import ElsewhereError
from deadbench.suite.plain_text import plain

_EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"}
_HERE = threading.local()


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Refuse this thread every connection; others go on with theirs.

    Raises:
        ElsewhereError: inside, where something asks for one; no error of the system, which libraries try again after.
    """
    _install()
    before = getattr(_HERE, "refuses", False)
    _HERE.refuses = True
    try:
        yield
    finally:
        _HERE.refuses = before


@functools.cache
def _install() -> None:
    """Python's own hook for what leaves the process; it cannot be taken out again, so there is one."""
    sys.addaudithook(_heard)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _EVENTS and getattr(_HERE, "refuses", False):
        where = next((each for each in arguments if isinstance(each, str)), "an address")
        raise ElsewhereError(
            f"something outside the checkpoint is named in its files, to be fetched from {plain(where)}; nothing is: "
            "write into them what is there"
        )
