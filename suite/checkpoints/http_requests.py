"""One request after another to servers that limit, cut off and stall: what passes is tried again.

Only what may pass is: 429 and 5xx after the time that the server names, broken connections, and answers that end early.
Clients, and what servers said of their limits, are shared by all threads of a process.
"""

import contextlib
import functools
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx2

from deadbench.suite.checkpoints.rate_limits import LIMITS, named_wait
from deadbench.suite.errors import CheckpointError, UnreachableError, first_line

ATTEMPTS = 4
FIRST_WAIT_SECONDS = 0.5
_CONNECTIONS = 64
_IDLE_SECONDS, _REQUEST_SECONDS = 30.0, 300.0  # without a byte; for one ranged answer
_PASSING = (429, 500, 502, 503, 504)

T = TypeVar("T")


class CutOffError(Exception):
    """An answer shorter than it said, or none; asked for again."""


class _LimitedError(Exception):
    """The server asks to wait; asked again after that."""


class Requests:
    """Requests to one server, asked again where that may help; what they come to is one line.

    Attributes:
        headers: of every request.
    """

    def __init__(self, url: str, client: httpx2.Client, headers: dict[str, str] | None = None):
        """Requests to the host of `url`."""
        self._host = urllib.parse.urlsplit(url).netloc.rpartition("@")[2]
        self._client = client
        self.headers = {"Accept-Encoding": "identity"} | (headers or {})

    def ask(
        self, url: str, called: str, headers: Callable[[], dict[str, str]], take: Callable[[httpx2.Response], T]
    ) -> T:
        """What `take` makes of the answer to a GET of `url`.

        Args:
            url: asked for.
            called: what messages call it.
            headers: what an attempt asks beside `self.headers`: the next one may want less.
            take: raises CutOffError for an answer that ended early.

        Raises:
            FileNotFoundError: there is no such file.
            UnreachableError: nobody answers at that address.
            CheckpointError: access is denied, or the server goes on to limit, fail or cut off; one line.
        """
        attempt = refused = 0
        while True:
            LIMITS.wait(self._host)
            try:
                with (
                    _tried_again(called, attempt),
                    self._client.stream("GET", url, headers=self.headers | headers()) as answer,
                ):
                    self._raise_for_status(answer, called, attempt, refused)
                    return take(answer)
            except _LimitedError:
                refused += 1
            except CutOffError:
                attempt += 1

    def missing(self, answer: httpx2.Response, called: str) -> FileNotFoundError:
        """What a 404 means."""
        return FileNotFoundError(f"{called}: no such file (404)")

    def denied(self, answer: httpx2.Response, called: str) -> CheckpointError:
        """What a 401 or 403 means."""
        return CheckpointError(f"{called}: access denied ({answer.status_code}); give a URL that this machine may read")

    def token_advice(self) -> str:
        """What would raise the limit of requests."""
        return ""

    def _raise_for_status(self, answer: httpx2.Response, called: str, attempt: int, refused: int) -> None:
        """Raise what a status above 299 means; _LimitedError, CutOffError: it may pass and attempts are left."""
        status = answer.status_code
        if status < 300 or status == 416:
            return
        if status in _PASSING:
            wait = named_wait(answer.headers)
            if wait is None and attempt + 1 < ATTEMPTS:
                raise CutOffError(f"HTTP {status}")
            if wait is not None and wait <= LIMITS.longest_wait and refused + 1 < LIMITS.attempts:
                LIMITS.pause(self._host, wait)
                raise _LimitedError
            after = f"; try again in {wait:.0f} s" if wait else "; try again later"
            if status == 429:
                raise CheckpointError(f"{called}: the server limits requests (429){after}{self.token_advice()}")
            raise CheckpointError(f"{called}: the server fails (HTTP {status}){after}")
        if status in (404, 410):
            raise self.missing(answer, called)
        if status in (401, 403):
            raise self.denied(answer, called)
        raise CheckpointError(f"{called}: HTTP {status} {answer.reason_phrase}".rstrip())


@contextlib.contextmanager
def _tried_again(called: str, attempt: int) -> Iterator[None]:
    """What a further attempt may mend is a CutOffError, after a pause; the last attempt's error is one line."""
    try:
        yield
    except (CutOffError, httpx2.TransportError) as error:
        broken = isinstance(error, (CutOffError, httpx2.ReadError, httpx2.RemoteProtocolError))
        # Nobody answers at that address: asking again helps no more than a look at the address.
        hopeless = isinstance(error, (httpx2.ConnectError, httpx2.UnsupportedProtocol))
        if hopeless or attempt + 1 == ATTEMPTS:
            what = "the answer is cut off" if broken else "cannot be reached"
            tried = "" if hopeless else f" in {ATTEMPTS} attempts"
            text = f"{called}: {what} ({first_line(error)}){tried}; check the address and the network"
            raise (CheckpointError if broken else UnreachableError)(text) from error
        time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
        raise CutOffError from error
    except (httpx2.TooManyRedirects, httpx2.InvalidURL, httpx2.DecodingError) as error:
        raise CheckpointError(f"{called}: cannot be read ({type(error).__name__})") from error


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
