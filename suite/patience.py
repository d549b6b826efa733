"""How long hosts are waited for in vain: one account for all threads of a process, since they may ask the same host.

A host that has given nothing yet has little, one that has answered is known, and what it gives earns it more. Where
requests wait side by side in vain, the time counts once.
"""

import threading
import time
from dataclasses import dataclass

_MEGABYTE = 2**20


@dataclass
class _Account:
    """What is left for a host, whether it has answered, until when its waiting was counted, and what came of it."""

    left: float
    known: bool = False
    counted: float = -1.0
    why: str = ""


class Patience:
    """Seconds that hosts may be waited for in vain.

    Attributes:
        first: seconds for a host that has given nothing.
        known: and for one as soon as it has answered.
        most: and for one that has given much.
        earned: by an answer, and by each megabyte.
        forgotten_after: seconds after which what a host has taken is forgotten; None: never.
    """

    def __init__(self, first: float, known: float, most: float, earned: float, forgotten_after: float | None):
        self.first, self.known, self.most, self.earned = first, known, most, earned
        self.forgotten_after = forgotten_after
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Lock()

    def left(self, host: str) -> float:
        """Seconds that `host` may still be waited for in vain."""
        with self._lock:
            return max(0.0, self._of(host).left)

    def knows(self, host: str) -> bool:
        """Whether `host` has answered a request."""
        with self._lock:
            return self._of(host).known

    def further(self, host: str, seconds: float) -> float:
        """Of so many seconds from now, those that nobody waits for `host` yet."""
        now = time.monotonic()
        with self._lock:
            return max(0.0, now + seconds - max(now, self._of(host).counted))

    def why(self, host: str) -> str:
        """What came of waiting for `host` the last time."""
        with self._lock:
            return self._of(host).why

    def answered(self, host: str) -> None:
        """`host` has answered a request."""
        with self._lock:
            account = self._of(host)
            account.left += 0.0 if account.known else self.known - self.first
            account.known = True
        self._earn(host, self.earned)

    def received(self, host: str, count: int) -> None:
        """`host` has sent so many bytes."""
        self._earn(host, self.earned * count / _MEGABYTE)

    def waited(self, host: str, began: float, ended: float, why: str) -> None:
        """From `began` to `ended`, on the clock of `time.monotonic`, `host` was, or will be, waited for in vain."""
        with self._lock:
            account = self._of(host)
            account.why = why
            account.left -= max(0.0, ended - max(began, account.counted))
            account.counted = max(account.counted, ended)

    def _earn(self, host: str, seconds: float) -> None:
        with self._lock:
            account = self._of(host)
            account.left = min(account.left + seconds, self.most)

    def _of(self, host: str) -> _Account:
        now = time.monotonic()
        account = self._accounts.setdefault(host, _Account(self.first))
        if self.forgotten_after is not None and account.counted >= 0 and now > account.counted + self.forgotten_after:
            account.left, account.counted = max(account.left, self.known if account.known else self.first), -1.0
        return account
