"""The end of a pass: its taps are decomposed, at once or beside what the device does next."""

from collections.abc import Generator
from functools import partial
from typing import Any

import torch

from deadbench.runners.engines.device import Moment
from deadbench.runners.jobs.events import Progress, Remark
from deadbench.runners.worker.aside import Aside
from deadbench.runners.worker.saved_state import Position
from deadbench.suite.reads.residual import ResidualRead
from deadbench.suite.spectra.solvers import remarks

Said = Generator[Progress | Remark, None, None]


class PassEnd:
    """Ends the passes of one read. A context, at whose end nothing is beside the model any more.

    Beside the next pass only what fits beside it: two passes whose accumulators fit together would be one. So it is for
    engines whose next pass is the next tap.

    Attributes:
        decomposing: whether that is what the device is at; memory that runs out then is not the batch's.
        remarks: what the device was found to do wrong.
    """

    def __init__(self, label: str, device: torch.device, num_rows: int):
        """Of a read of `num_rows` rows."""
        self._label, self._device, self._num_rows, self._aside = label, device, num_rows, Aside(device)
        self.decomposing = False
        self.remarks: list[str] = []

    def __enter__(self) -> "PassEnd":
        self._aside.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._aside.__exit__(*exception)

    def now(self, stream: ResidualRead, position: Position) -> Said:
        """With a word after each tap: the driver would take a long silence for a hang."""
        yield from self.taken_up(stream, position)
        started, self.decomposing = Moment.on(self._device), True
        for _ in stream.ending():
            yield Progress(self._label, "spectrum", self._num_rows, self._num_rows)
        self.decomposing = False
        position.spectrum_seconds += started.seconds_to(Moment.on(self._device))
        yield from self._remarked()

    def beside(self, stream: ResidualRead, position: Position) -> Said:
        """Beside what comes next, where the device can; all others wait for it when they ask for what comes of it."""
        if not self._aside.possible:
            yield from self.now(stream, position)
            return
        yield from self.taken_up(stream, position)
        self._aside.begin(partial(_decompose, stream), stream.close_pass())

    def taken_up(self, stream: ResidualRead, position: Position) -> Said:
        """What was left to itself, if anything was, is waited for."""
        if self._aside.busy:
            position.spectrum_seconds += self._aside.ended()
            if not stream.ranks.alone:
                stream.conclude()
            yield from self._remarked()

    def _remarked(self) -> Said:
        for line in remarks():
            self.remarks.append(line)
            yield Remark(self._label, line)


def _decompose(stream: ResidualRead) -> None:
    """The end of a closed pass, as far as no other rank is asked."""
    for _ in stream.decompose():
        pass
    if stream.ranks.alone:
        stream.conclude()
