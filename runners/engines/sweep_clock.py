"""Where the time of a sweep goes: to the model, or to what is taken from its stream."""

import contextlib
import time
from collections.abc import Iterator

from torch import Tensor

from deadbench.runners.engines.base import ForwardPass


class Clock:
    """Seconds in the model and in the taps since they were last told."""

    def __init__(self) -> None:
        self._seconds = {"model": 0.0, "taps": 0.0}

    @contextlib.contextmanager
    def _running(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - started

    def model(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model runs, its weights' coming included."""
        return self._running("model")

    def taps(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a tap is read."""
        return self._running("taps")

    def so_far(self) -> tuple[float, float]:
        """Those of the model and those of the taps."""
        model, taps = self._seconds["model"], self._seconds["taps"]
        self._seconds = {"model": 0.0, "taps": 0.0}
        return model, taps

    def forward_pass(self, captured: dict[str, Tensor], calls: int) -> ForwardPass:
        """The pass of the batch that has just come out."""
        return ForwardPass(captured.pop("input"), captured.pop("output"), *self.so_far(), calls)
