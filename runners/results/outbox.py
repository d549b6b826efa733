"""Finished reads on their way to the results: what a full disk or a bucket refuses is kept, and tried again."""

import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import pyarrow as pa

from deadbench.runners.results.store import ResultStore
from deadbench.suite.storage import refusal

PATIENCE_SECONDS = 600.0  # for which results that cannot be written are kept, unless told
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


class UnwritableError(RuntimeError):
    """Results could not be written for too long; one line, exit code 1."""


class Stored(Protocol):
    """What goes to the results together: rows by table, those of `reads` one for each read."""

    @property
    def tables(self) -> dict[str, pa.Table]:
        """Tables by name."""


_Event = TypeVar("_Event", bound=Stored)


class Outbox(Generic[_Event]):
    """Writes finished reads in order; while the store refuses, keeps them."""

    def __init__(
        self,
        store: ResultStore,
        say: Callable[[str], None],
        patience: float,
        wanted: Callable[[_Event], bool] = lambda event: True,
    ):
        """`patience` in seconds; what is not `wanted` any more when its turn comes is dropped."""
        self._store, self._say, self._patience, self._wanted = store, say, patience, wanted
        self._waiting: deque[tuple[str, _Event]] = deque()
        self._pause, self._again, self._refused_since = 0.0, 0.0, 0.0
        self._written = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, event: _Event) -> list[_Event]:
        """Take one finished read, or several together; returns what has been written, this one or more or none."""
        self._waiting.append((f"{time.time_ns()}-{uuid.uuid4().hex[:12]}", event))
        return self.flush()

    def flush(self) -> list[_Event]:
        """Write what waits, if it is time for that; returns what was written.

        Raises:
            UnwritableError: the store has refused for longer than the patience.
        """
        written = []
        while self._waiting and time.monotonic() >= self._again:
            stamp, event = self._waiting[0]
            try:
                wanted = self._wanted(event)
                if wanted:
                    # The stamp stays: a table that a failed attempt has written is replaced, not doubled.
                    self._store.write(event.tables, stamp)
            except Exception as error:  # stores raise the errors of their own libraries
                self._refused(error)
            else:
                self._waiting.popleft()
                self._pause, self._again = 0.0, 0.0
                if wanted:
                    self._written += event.tables["reads"].num_rows
                    written.append(event)
        return written

    def drain(self) -> list[_Event]:
        """Write all that waits, however long that takes within the patience.

        Raises:
            UnwritableError: as `flush`.
        """
        written = self.flush()
        while self._waiting:
            time.sleep(max(0.0, self._again - time.monotonic()))
            written += self.flush()
        return written

    def _refused(self, error: Exception) -> None:
        now = time.monotonic()
        if not self._pause:
            self._refused_since = now
            self._say(f"results in {self._store.location} cannot be written ({refusal(error)}); kept and tried again")
        self._pause = min(2 * self._pause or _FIRST_PAUSE, _LONGEST_PAUSE)
        self._again = now + self._pause
        if now - self._refused_since >= self._patience:
            unwritten = sum(event.tables["reads"].num_rows for _, event in self._waiting)
            raise UnwritableError(
                f"{self._store.location}: cannot be written for {self._patience:g} s ({refusal(error)}); "
                f"{self._written} reads are written, {unwritten} that had finished are not"
            ) from error
