"""While a stranger's configuration is built, nothing is fetched: what it names elsewhere is not what is measured."""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any

_EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"}
_HERE = threading.local()


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Refuse this thread every connection; others go on with theirs.

    Raises:
        PermissionError: inside, where something asks for one.
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
        raise PermissionError("the configuration names something elsewhere, and nothing is fetched for it")
