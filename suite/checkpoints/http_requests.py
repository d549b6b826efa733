"""One request after another to servers that limit, cut off and stall: what passes is tried again."""

import functools
import re
import time
from typing import TypeVar

import httpx2

ATTEMPTS = 4
FIRST_WAIT_SECONDS = 0.5
_CONNECTIONS = 64
_IDLE_SECONDS, _REQUEST_SECONDS = 30.0, 300.0  # without a byte; for one ranged answer
PASSING = (429, 500, 502, 503, 504)

T = TypeVar("T")


class CutOffError(Exception):
    """An answer shorter than it said, or none; asked for again."""


class LimitedError(Exception):
    """The server asks to wait; asked again after that."""


def body_of(answer: httpx2.Response, count: int) -> bytes:
    """The first `count` bytes of an answer, which may be longer; fewer where it ends."""
    pieces, received, deadline = [], 0, time.monotonic() + _REQUEST_SECONDS
    for piece in answer.iter_raw():
        pieces.append(piece)
        received += len(piece)
        if received >= count:
            break
        if time.monotonic() > deadline:
            raise CutOffError(f"{received} of {count} bytes in {_REQUEST_SECONDS:.0f} s")
    return b"".join(pieces)[:count]


def total(content_range: str | None) -> int | None:
    """Bytes of the whole file, by a Content-Range header; None where it does not say."""
    match = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", content_range or "")
    return int(match[1]) if match else None


@functools.cache
def client() -> httpx2.Client:
    """The process's client for other servers than the Hub: HF_HUB_OFFLINE says nothing about them."""
    limits = httpx2.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
    return httpx2.Client(follow_redirects=True, timeout=httpx2.Timeout(_IDLE_SECONDS, pool=None), limits=limits)
