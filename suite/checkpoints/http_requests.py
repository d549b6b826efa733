"""One request after another to servers that limit, cut off and stall: what passes is tried again.

Only what may pass is: 429 and 5xx after the time that the server names, broken connections, and answers that end early;
and only while there is patience with the server, which earns it by what it gives. Clients, patience, and what servers
said of their limits, are shared by all threads of a process. Redirects are followed, but not from a public server into
this machine's own network, and no credential goes along to another host.
"""

import contextlib
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx2

from deadbench.suite.checkpoints.http_client import HEAD_SECONDS, IDLE_SECONDS, InsideError, client, is_inside, within
from deadbench.suite.checkpoints.rate_limits import LEAST_SECONDS, LIMITS, named_wait, number
from deadbench.suite.errors import ChangedError, CheckpointError, UnreachableError, first_line

ATTEMPTS, SILENT_ATTEMPTS = 4, 2  # the latter of a server that says nothing for so long
FIRST_WAIT_SECONDS, _LONGEST_FLOOR_SECONDS = 0.5, 30.0
REQUEST_SECONDS = 300.0  # for one ranged answer
SLOWEST_BYTES_PER_SECOND = 1000  # of a longer one, after its first IDLE_SECONDS
_COMPRESSIONS = ("gzip", "x-gzip", "deflate", "br", "zstd", "compress")  # of S3, aws-chunked is none
_REDIRECTS = 10
_PASSING = (429, 500, 502, 503, 504)

T = TypeVar("T")


class CutOffError(Exception):
    """An answer shorter than it said, or none; asked for again."""


class _LimitedError(Exception):
    """The server asks to wait; asked again after that."""

    def __init__(self, seconds: float):
        super().__init__(seconds)
        self.seconds = seconds


class Requests:
    """Requests to one server, asked again where that may help; what they come to is one line.

    Attributes:
        headers: of every request.
    """

    def __init__(self, url: str, headers: dict[str, str] | None = None):
        """Requests to the host of `url`."""
        self._host = urllib.parse.urlsplit(url).netloc.rpartition("@")[2]
        self._inside: bool | None = None  # whether that host is; not asked before a redirect
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
        attempt, waits = 0, list[float]()  # of the limits that were waited for
        while True:
            LIMITS.wait(self._host)
            if LIMITS.silence.left(self._host) < LEAST_SECONDS:
                why = LIMITS.silence.why(self._host)
                raise UnreachableError(f"{called}: cannot be reached ({why}); check the address and the network")
            began = time.monotonic()
            try:
                with self._tried_again(called, attempt), self._answer(url, self.headers | headers()) as answer:
                    with self._in_vain_since(began):
                        self._raise_for_status(answer, called, attempt, waits)
                    taken = take(answer)
                    LIMITS.silence.answered(self._host)
                    LIMITS.told.answered(self._host)
                    return taken
            except _LimitedError as limited:
                waits.append(limited.seconds)
            except CutOffError:
                attempt += 1

    def body_of(self, answer: httpx2.Response, count: int) -> bytes:
        """The first `count` bytes of an answer, which may be longer; fewer where it ends."""
        taken, received = [], 0
        for piece in self.pieces(answer, REQUEST_SECONDS):
            taken.append(piece)
            received += len(piece)
            if received >= count:
                break
        return b"".join(taken)[:count]

    def pieces(self, answer: httpx2.Response, seconds: float | None = None) -> Iterator[bytes]:
        """The body of an answer as it comes, for `seconds` at most.

        Raises:
            CutOffError: it takes longer, or trickles.
        """
        received, began = 0, time.monotonic()
        grace, body = self._patience(IDLE_SECONDS), answer.iter_raw()
        while True:
            with self._in_vain_since(time.monotonic()):
                piece = next(body, None)
            if piece is None:
                return
            yield piece
            received += len(piece)
            LIMITS.silence.received(self._host, len(piece))
            taken = time.monotonic() - began
            with self._in_vain_since(began):
                if seconds is not None and taken > seconds:
                    raise CutOffError(f"{received} bytes in {taken:.0f} s")
                if received < (taken - grace) * SLOWEST_BYTES_PER_SECOND:
                    slowest = f"at least {SLOWEST_BYTES_PER_SECOND} a second"
                    raise CutOffError(f"{received} bytes in {taken:.0f} s; {slowest}")

    def _patience(self, most: float) -> float:
        """Seconds without an answer, or a byte of it, that the host is waited for now."""
        return max(LEAST_SECONDS, min(most, LIMITS.silence.left(self._host)))

    def _may_ask_again(self, attempt: int, attempts: int) -> bool:
        """Whether a further attempt of so many may be made, after its pause."""
        pause = FIRST_WAIT_SECONDS * 2**attempt
        return attempt + 1 < attempts and pause + LEAST_SECONDS <= LIMITS.silence.left(self._host)

    @contextlib.contextmanager
    def _in_vain_since(self, began: float) -> Iterator[None]:
        """Where what is inside comes to nothing, the host has been waited for in vain since `began`."""
        try:
            yield
        except (CutOffError, httpx2.TransportError) as error:
            LIMITS.silence.waited(self._host, began, time.monotonic(), first_line(error))
            raise

    @contextlib.contextmanager
    def _tried_again(self, called: str, attempt: int) -> Iterator[None]:
        """What a further attempt may mend is a CutOffError, after a pause; the last attempt's error is one line."""
        try:
            yield
        except (CutOffError, httpx2.TransportError) as error:
            broken = isinstance(error, (CutOffError, httpx2.ReadError, httpx2.RemoteProtocolError))
            # Nobody answers at that address: asking again helps no more than a look at the address.
            hopeless = isinstance(error, (httpx2.ConnectError, httpx2.UnsupportedProtocol, InsideError))
            attempts = SILENT_ATTEMPTS if isinstance(error, httpx2.TimeoutException) else ATTEMPTS
            if hopeless or not self._may_ask_again(attempt, attempts):
                what = "the answer is cut off" if broken else "cannot be reached"
                tried = "" if hopeless or attempt == 0 else f" in {attempt + 1} attempts"
                text = f"{called}: {what} ({first_line(error)}){tried}; check the address and the network"
                raise (CheckpointError if broken else UnreachableError)(text) from error
            pause, now = FIRST_WAIT_SECONDS * 2**attempt, time.monotonic()
            LIMITS.silence.waited(self._host, now, now + pause, first_line(error))
            time.sleep(pause)
            raise CutOffError from error
        except (httpx2.TooManyRedirects, httpx2.InvalidURL, httpx2.DecodingError) as error:
            raise CheckpointError(f"{called}: cannot be read ({type(error).__name__})") from error

    @contextlib.contextmanager
    def _answer(self, url: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
        """The answer at the end of the redirects, its body not yet read."""
        sender = client()
        idle = httpx2.Timeout(self._patience(IDLE_SECONDS), pool=None)
        request = sender.build_request("GET", url, headers=headers, timeout=idle)
        first = request.url.host
        for _ in range(_REDIRECTS + 1):
            if request.url.host != first:
                request.headers.pop("Authorization", None)
                if self._inside is None:
                    self._inside = is_inside(first)
                sender = client(public_only=not self._inside)
            with self._in_vain_since(time.monotonic()), within(self._patience(HEAD_SECONDS)):
                answer = sender.send(request, stream=True, follow_redirects=False)
            if answer.next_request is None:
                with contextlib.closing(answer):
                    yield answer
                return
            answer.close()
            request = answer.next_request
        raise httpx2.TooManyRedirects(f"more than {_REDIRECTS} redirects")

    def missing(self, answer: httpx2.Response, called: str) -> FileNotFoundError:
        """What a 404 means."""
        return FileNotFoundError(f"{called}: no such file (404)")

    def denied(self, answer: httpx2.Response, called: str) -> CheckpointError:
        """What a 401 or 403 means."""
        return CheckpointError(f"{called}: access denied ({answer.status_code}); give a URL that this machine may read")

    def token_advice(self) -> str:
        """What would raise the limit of requests."""
        return ""

    def _raise_for_status(self, answer: httpx2.Response, called: str, attempt: int, waits: list[float]) -> None:
        """Raise what a status above 299 means; _LimitedError, CutOffError: it may pass and attempts are left."""
        status = answer.status_code
        if status >= 300 and status not in _PASSING:  # of others it counts when all has come
            LIMITS.told.answered(self._host)
        packed = answer.headers.get("Content-Encoding", "").strip().lower()
        if status < 300 and packed in _COMPRESSIONS:
            raise CheckpointError(
                f"{called}: the server compresses its answers ({packed}), though it is asked for bytes as they are; "
                "serve the checkpoint without, or download it and name the folder"
            )
        if status < 300 or status == 416:
            return
        if status in _PASSING:
            wait = named_wait(answer.headers)
            if wait is None and self._may_ask_again(attempt, ATTEMPTS):
                raise CutOffError(f"HTTP {status}")
            # One that says "at once" again and again is given longer each time.
            pause = max(wait or 0.0, min(FIRST_WAIT_SECONDS * 2 ** min(len(waits), 10), _LONGEST_FLOOR_SECONDS))
            if wait is not None and wait <= LIMITS.longest_wait and LIMITS.allow(self._host, waits, pause):
                LIMITS.pause(self._host, pause)
                raise _LimitedError(pause)
            after = f"; try again in {wait:.0f} s" if wait else "; try again later"
            if status == 429:
                raise CheckpointError(f"{called}: the server limits requests (429){after}{self.token_advice()}")
            raise CheckpointError(f"{called}: the server fails (HTTP {status}){after}")
        if status == 412:
            raise ChangedError(f"{called}: changed while it was read; run again")
        if status in (404, 410):
            raise self.missing(answer, called)
        if status in (401, 403):
            raise self.denied(answer, called)
        raise CheckpointError(f"{called}: HTTP {status} {answer.reason_phrase}".rstrip())


def total(content_range: str | None) -> int | None:
    """Bytes of the whole file, by a Content-Range header; None where it does not say."""
    match = re.fullmatch(r"bytes (?:[0-9]+-[0-9]+|\*)/([0-9]+)", content_range or "")
    return number(match[1]) if match else None
