"""What polars' threads still read when a frame has failed, or Ctrl-C came: a process that ends meanwhile is aborted.

Such a thread is in Arrow, and asks for an interpreter that is no more.
"""

import threading
import time
from collections.abc import Iterator
from typing import TypeVar

_ENDING_SECONDS, _QUIET_SECONDS = 10.0, 0.05

T = TypeVar("T")


class Steps:
    """Steps of iterators, in any thread."""

    def __init__(self) -> None:
        self._going = self._begun = 0
        self._fewer = threading.Condition()

    def each(self, pieces: Iterator[T]) -> Iterator[T]:
        """The pieces; making one is a step."""
        while True:
            with self._fewer:
                self._going += 1
                self._begun += 1
            try:
                piece = next(pieces)
            except StopIteration:
                return
            finally:
                with self._fewer:
                    self._going -= 1
                    self._fewer.notify_all()
            yield piece

    def wait(self) -> None:
        """Return when no step goes on and none is begun for a moment, or after a while."""
        until = time.monotonic() + _ENDING_SECONDS
        while time.monotonic() < until:
            with self._fewer:
                self._fewer.wait_for(lambda: self._going == 0, until - time.monotonic())
                begun = self._begun
            time.sleep(_QUIET_SECONDS)
            with self._fewer:
                if self._going == 0 and self._begun == begun:
                    return


STEPS = Steps()
