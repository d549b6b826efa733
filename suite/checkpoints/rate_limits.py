"""When a server that limits its callers may be asked again: one memory of that for all threads of a process.

A server says "not before" by 429 (or 503) with `Retry-After`, the Hub by `RateLimit`. Whoever hears it makes everyone
wait who would ask the same host, instead of each finding out for itself. Processes tell each other (`on_pause`).
"""

import email.utils
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from deadbench.suite.patience import Patience

_RATE_LIMIT = re.compile(r"r\s*=\s*0\s*;\s*t\s*=\s*([0-9]+)")  # `"api";r=0;t=55`: none left, for 55 seconds
# Of a host that has given nothing: before a stranger's server costs more, the command says so. One that has answered
# may name the longest wait as often as one request is refused.
_FIRST_SECONDS, _KNOWN_SECONDS, _MOST_SECONDS, _EARNED_SECONDS, _FORGOTTEN_SECONDS = 15.0, 100.0, 120.0, 0.5, 60.0
LEAST_SECONDS = 1.0  # that a host is given to answer
_SPREAD = 0.1  # of the pause: those who waited do not all ask in the same instant


class HostLimits:
    """Pauses by host, and how long hosts are waited for in vain.

    Attributes:
        longest_wait: seconds that are waited at a server's word; beyond, the request fails and says so.
        attempts: how often one request is refused by a limit before it fails.
        silence: what hosts may take that say nothing, trickle or break off.
        told: what those may that say "not yet"; of one that is known more than for silence, which may be all it does.
        on_pause: told (host, seconds) of each pause that this process heard of itself.
    """

    def __init__(self) -> None:
        self.longest_wait, self.attempts = 30.0, 4
        self.silence = Patience(_FIRST_SECONDS, _FIRST_SECONDS, _MOST_SECONDS, _EARNED_SECONDS, _FORGOTTEN_SECONDS)
        self.told = Patience(_FIRST_SECONDS, _KNOWN_SECONDS, _MOST_SECONDS, _EARNED_SECONDS, _FORGOTTEN_SECONDS)
        self.on_pause: Callable[[str, float], None] | None = None
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def allow(self, host: str, waits: list[float], seconds: float) -> bool:
        """Whether a request to `host` that has waited for `waits` may wait for `seconds` more."""
        further = self.told.further(host, seconds)  # none where others were told to wait at the same time
        left = self.told.left(host)
        if self._is_strange(host):
            left = min(left, self.silence.left(host))
        return len(waits) + 1 < self.attempts and (not further or further + LEAST_SECONDS <= left)

    def pause(self, host: str, seconds: float, *, heard: bool = True) -> None:
        """Nobody asks `host` for so long; `heard` from the host itself, not from another process."""
        now = time.monotonic()
        until = now + seconds
        with self._lock:
            before = self._until.get(host, 0.0)
            longer = until > before
            if longer:
                self._until[host] = until
        if longer:
            self.told.waited(host, now, until, "it limits requests")
            if self._is_strange(host):  # one that takes turns costs no more than one that is silent
                self.silence.waited(host, now, until, "it limits requests")
        if heard and longer and self.on_pause is not None:
            self.on_pause(host, seconds)

    def _is_strange(self, host: str) -> bool:
        """Whether `host` has not answered yet, and nobody has more time for such."""
        return self.told.first <= self.silence.first and not self.told.knows(host)

    def wait(self, host: str) -> None:
        """Return when `host` may be asked."""
        spread = random.random() * _SPREAD
        while (left := self.left(host)) > 0:
            time.sleep(left * (1 + spread))

    def left(self, host: str) -> float:
        """Seconds until `host` may be asked."""
        with self._lock:
            return max(0.0, self._until.get(host, 0.0) - time.monotonic())


def number(told: str) -> int | None:
    """The number that a header tells; None where it is none, or longer than any that is meant."""
    return int(told) if re.fullmatch(r"[0-9]{1,18}", told) else None


def named_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: `Retry-After` as number or date, or the Hub's `RateLimit`; None for none."""
    told = (headers.get("Retry-After") or "").strip()
    if (seconds := number(told)) is not None:
        return float(seconds)
    if told:
        try:
            when = email.utils.parsedate_to_datetime(told)
        except (ValueError, OverflowError):  # the latter of a year with twelve digits
            return None
        return max(0.0, ((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
    match = _RATE_LIMIT.search(headers.get("RateLimit") or "")
    seconds = number(match[1]) if match else None
    return None if seconds is None else float(seconds)


LIMITS = HostLimits()  # of this process
