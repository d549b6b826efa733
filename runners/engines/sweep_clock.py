"""Where the time of a sweep goes: to the model, or to what is taken from its stream."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from deadbench.runners.engines.base import ForwardPass
from deadbench.runners.engines.device import Moment


class Clock:
    """Seconds in the model and in the taps since they were last told."""

    def __init__(self, device: torch.device) -> None:
        """Of what is done on `device`."""
        self._device = device
        self._stretches: list[tuple[str, Moment, Moment]] = []

    @contextlib.contextmanager
    def _running(self, what: str) -> Iterator[None]:
        started = Moment.on(self._device)
        try:
            yield
        finally:
            self._stretches.append((what, started, Moment.on(self._device)))

    def model(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model runs, its weights' coming included."""
        return self._running("model")

    def taps(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a tap is read."""
        return self._running("taps")

    def so_far(self, *, wait: bool = True) -> tuple[float, float]:
        """Those of the model and those of the taps; without `wait` as far as the device has come."""
        stretches, self._stretches = self._stretches, []
        seconds = {"model": 0.0, "taps": 0.0}
        for what, started, ended in stretches:
            if wait or ended.has_come():
                seconds[what] += started.seconds_to(ended)
            else:
                self._stretches.append((what, started, ended))
        return seconds["model"], seconds["taps"]

    def forward_pass(self, captured: dict[str, Tensor], calls: int) -> ForwardPass:
        """The pass of the batch that has just come out."""
        return ForwardPass(captured.pop("input"), captured.pop("output"), self.so_far, calls)
