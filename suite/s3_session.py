"""How long an S3 endpoint is waited for: what s3fs is made with, wherever a bucket is read from or written to.

Each attempt of aiobotocore's goes through here, and so do those that s3fs makes again by itself: together they are
bounded by the patience with the host. Of what the endpoint says, no more is held than a listing may have.
"""

import asyncio
import functools
import time
import urllib.parse
from typing import Any

import fsspec

from deadbench.suite.errors import UnreachableError, reason_of
from deadbench.suite.http_session import watch_pace
from deadbench.suite.patience import Patience
from deadbench.suite.plain_text import plain

PATIENCE = Patience(15.0, 15.0, 120.0, 0.5, 60.0)  # as with any server of checkpoints
_LEAST_SECONDS = 1.0  # that a host is given to answer
_HEAD_SECONDS = 30.0  # for an answer that is no file, and for the head of one that is
_SLOWEST_BYTES_PER_SECOND = 10_000  # of what is written
_ATTEMPTS, _LONGEST_PAUSE_SECONDS = 4, 5.0  # between two attempts the libraries wait for less
_ANSWER_BYTES = 2**24  # of an answer that is no file: a page of a listing has a thousand names of a kilobyte
_PASSING = (429, 500, 502, 503, 504)
_MOST_PAGES = 2000  # of one listing
# Of each listing that goes on.
_PAGES: dict[tuple[str, ...], int] = {}
# When a host last let a request fail: the pause before the next one is waited in vain as well.
_FAILED: dict[str, float] = {}


def s3_options() -> dict[str, Any]:
    """Options of s3fs by which its requests have their time; what fsspec's own configuration says of them stays."""
    ours = {
        "connect_timeout": PATIENCE.first,
        "read_timeout": PATIENCE.first,
        "retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS},
        "http_session_cls": _session_class(),
    }
    return {"config_kwargs": ours | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})}


@functools.cache
def _session_class() -> type:
    from aiobotocore.httpsession import AIOHTTPSession
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionClosedError, HTTPClientError, ReadTimeoutError

    class PatientSession(AIOHTTPSession):  # type: ignore[misc,unused-ignore]
        """Sends the requests of aiobotocore, each while there is patience with its host."""

        async def send(self, request: Any) -> Any:
            """The answer, with its body where it is no file."""
            host = urllib.parse.urlsplit(request.url).netloc.rpartition("@")[2]
            _check_listing(request.url)
            _count_pause(host)
            left = PATIENCE.left(host)
            if left < _LEAST_SECONDS:  # an error of ours, which nobody tries again
                why = PATIENCE.why(host)
                raise UnreachableError(f"{host}: cannot be reached ({why}); check the address and the network")
            began, streamed = time.monotonic(), request.stream_output
            seconds = max(_LEAST_SECONDS, min(_HEAD_SECONDS, left)) + _writing_seconds(request.headers)
            try:
                request.stream_output = True  # what is no file is read below, as far as it may go
                async with asyncio.timeout(seconds):
                    answer = await super().send(request)
                    if not streamed or answer.status_code >= 300:
                        answer._content = await _body(answer.raw)
            except (HTTPClientError, ClientError, TimeoutError) as error:
                _failed(host, began, _told(error))
                if isinstance(error, HTTPClientError):
                    raise
                kind = ReadTimeoutError if isinstance(error, TimeoutError) else ConnectionClosedError
                raise kind(endpoint_url=f"//{host}", error=error) from error
            finally:
                request.stream_output = streamed
            if answer.status_code in _PASSING:
                _failed(host, began, f"HTTP {answer.status_code}")
                return answer
            _FAILED.pop(host, None)
            PATIENCE.answered(host)
            if streamed and answer.status_code < 300:
                watch_pace(
                    answer.raw,
                    lambda count: PATIENCE.received(host, count),
                    lambda began, why: _failed(host, began, why),
                )
            return answer

    return PatientSession


async def _body(raw: Any) -> bytes:
    """All of an answer of aiohttp's; UnreachableError where it goes on for ever."""
    pieces, received = list[bytes](), 0
    try:
        async for piece in raw.content.iter_any():
            pieces.append(piece)
            received += len(piece)
            if received > _ANSWER_BYTES:
                raise UnreachableError(f"{raw.url.host}: more than {_ANSWER_BYTES:,} bytes where S3 lists or explains")
    except BaseException:
        raw.close()
        raise
    return b"".join(pieces)


def _check_listing(url: str) -> None:
    """Count the pages of a listing, which a stranger may go on with for ever."""
    parts = urllib.parse.urlsplit(url)
    asked = urllib.parse.parse_qs(parts.query)
    if "list-type" not in asked:
        return
    listing = (parts.netloc, parts.path, *asked.get("prefix", ()))
    pages = _PAGES.pop(listing, 0) + 1
    if "continuation-token" not in asked:
        return
    if pages > _MOST_PAGES:
        raise UnreachableError(f"{parts.netloc}: a listing of more than {_MOST_PAGES:,} pages")
    _PAGES[listing] = pages


def _told(error: Exception) -> str:
    """Why a request came to nothing, in a few words: botocore's own name the whole address again."""
    inner = getattr(error, "kwargs", {}).get("error") or error
    return "no answer in time" if isinstance(inner, TimeoutError) else plain(reason_of(inner), 60)


def _writing_seconds(headers: Any) -> float:
    """For which a request's body may be on its way to the host."""
    told = [headers.get(name) for name in ("Content-Length", "X-Amz-Decoded-Content-Length")]
    size = max((int(each) for each in told if each and str(each).isdecimal()), default=0)
    return size / _SLOWEST_BYTES_PER_SECOND


def _count_pause(host: str) -> None:
    failed = _FAILED.pop(host, None)
    if failed is not None and time.monotonic() - failed <= _LONGEST_PAUSE_SECONDS:  # else it is another's request
        PATIENCE.waited(host, failed, time.monotonic(), PATIENCE.why(host))


def _failed(host: str, began: float, why: str) -> None:
    now = time.monotonic()
    PATIENCE.waited(host, began, now, why)
    _FAILED[host] = now
