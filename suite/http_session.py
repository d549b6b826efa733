"""Sessions of aiohttp whose answers have their time, by which fsspec reads result sets and lists of web servers.

Its own waits five minutes for a server that says nothing. Checkpoints are read by `suite/checkpoints/http_requests`.
"""

import asyncio
from typing import Any

_HEAD_SECONDS = 15.0  # for an answer's status and headers, however they trickle
_IDLE_SECONDS = 15.0  # without a byte of its body
_WHOLE_SECONDS = 300.0  # for one answer


async def timed_session(**options: Any) -> Any:
    """A session of aiohttp as fsspec's `get_client` makes one."""
    import aiohttp

    async def head_in_time(request: Any, answer: Any) -> Any:
        return await asyncio.wait_for(answer(request), _HEAD_SECONDS)

    times = aiohttp.ClientTimeout(total=_WHOLE_SECONDS, sock_connect=_HEAD_SECONDS, sock_read=_IDLE_SECONDS)
    given: dict[str, Any] = {"timeout": times, "middlewares": (head_in_time,)}
    return aiohttp.ClientSession(**(given | options))
