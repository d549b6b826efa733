"""Sessions of aiohttp whose answers have their time, by which fsspec reads result sets and lists of web servers.

Its own waits five minutes for a server that says nothing. Checkpoints are read by `suite/checkpoints/http_requests`.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

_HEAD_SECONDS = 15.0  # for an answer's status and headers, however they trickle
_IDLE_SECONDS = 15.0  # without a byte of its body
_WHOLE_SECONDS = 300.0  # for one answer
_SLOWEST_BYTES_PER_SECOND = 1000  # of one, after as long as it may be idle
_LOOK_SECONDS = 1.0


async def timed_session(**options: Any) -> Any:
    """A session of aiohttp as fsspec's `get_client` makes one."""
    import aiohttp

    async def head_in_time(request: Any, answer: Any) -> Any:
        given = await asyncio.wait_for(answer(request), _HEAD_SECONDS)
        watch_pace(given)
        return given

    times = aiohttp.ClientTimeout(total=_WHOLE_SECONDS, sock_connect=_HEAD_SECONDS, sock_read=_IDLE_SECONDS)
    given: dict[str, Any] = {"timeout": times, "middlewares": (head_in_time,)}
    return aiohttp.ClientSession(**(given | options))


def watch_pace(
    answer: Any,
    received: Callable[[int], None] = lambda count: None,
    slow: Callable[[float, str], None] = lambda began, why: None,
) -> None:
    """End an answer of aiohttp's whose body trickles: whoever reads it has a ClientPayloadError.

    Args:
        answer: its body is read as fast as it comes.
        received: told how many bytes came since the last time.
        slow: told since when the answer was waited for, and why it was ended.
    """
    import aiohttp

    began, loop, before = time.monotonic(), asyncio.get_running_loop(), 0

    def look() -> None:
        nonlocal before
        count, seconds = answer.content.total_bytes, time.monotonic() - began
        received(count - before)
        before = count
        if answer.closed or answer.content.is_eof():
            return
        if count < (seconds - _IDLE_SECONDS) * _SLOWEST_BYTES_PER_SECOND:
            why = f"{count:,} bytes in {seconds:.0f} s; at least {_SLOWEST_BYTES_PER_SECOND} a second"
            slow(began, why)
            answer.content.set_exception(aiohttp.ClientPayloadError(why))
            answer.close()
            return
        loop.call_later(_LOOK_SECONDS, look)

    look()
