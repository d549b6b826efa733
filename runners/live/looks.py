"""Looks at a model while it trains: a result set, numbers for the trackers, their cost. No training ends by one."""

import logging
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from deadbench.runners.jobs.events import failed_read, new_run_id
from deadbench.runners.live.measure import MOST, live_job, measure
from deadbench.runners.live.reading import Reading, renamed
from deadbench.runners.results.store import ResultStore
from deadbench.suite.errors import one_line

_LOGGED = (
    "depth", "depth_as_executed", "depth_predicted", "depth_predicted_as_executed", "alignment", "lambda_v",
    "scale_harmonic", "num_zero_scales", "num_dead_1e6", "num_learned", "dead_parameters", "worst_block_ratio",
)  # fmt: skip
_PREFIX = "deadbench/"


class Looks:
    """One training's looks at its model, at most one a step."""

    def __init__(
        self,
        out: str | Path,
        *,
        model: str | None = None,
        every: int | None = None,
        batches: Iterable[Any] | None = None,
        reads: Sequence[str] | None = None,
        final_norm: str | nn.Module | None = None,
        blocks: str | nn.Module | Sequence[nn.Module] | None = None,
        taps: str = "all",
        max_tokens: int | str = MOST,
    ):
        """Looks go to the result set `out`, as `model` (None: its class), every so many steps.

        `batches` are held, and are read forward at each look, beside the parameters; without, nothing is run.
        """
        if every is not None and every < 1:
            raise ValueError(f"every={every}: give a number of steps, or None")
        self._out, self._name, self._every = str(out), model, every
        self._batches = None if batches is None else list(batches)
        self._reads = tuple(reads or (("parameters",) if batches is None else ("parameters", "trained")))
        told = {"final_norm": final_norm, "blocks": blocks}
        self._options: dict[str, Any] = told | {"taps": taps, "max_tokens": max_tokens}
        self._store: ResultStore | None = None
        self._seen: set[int] = set()
        self._warned = False
        self._began: float | None = None
        self.num_looks, self.seconds = 0, 0.0

    def begin(self) -> None:
        """The training starts: its time is counted from here."""
        self._began = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether the model is to be looked at after this step."""
        return bool(self._every) and step % (self._every or 1) == 0

    def look(self, model: nn.Module, step: int, *, first: bool = True) -> dict[str, float]:
        """Look at `model` after `step`, once; what there is to log, nothing where it was looked at or could not be.

        `first`: this process tells of it, of those that train together.
        """
        if step in self._seen:
            return {}
        self._seen.add(step)
        started = time.perf_counter()
        try:
            reading = measure(model, self._batches, reads=self._reads, **self._options)
            logged = _logged(reading) if first else {}
            if first:
                self._write(reading, step)
        except Exception as error:  # whatever a model, a disk or a library comes up with: the training goes on
            logged = {}
            if first:
                self._fail(model, step, error)
        self.num_looks += 1
        self.seconds += time.perf_counter() - started
        if logged and (share := self.share()) is not None:
            logged[f"{_PREFIX}time_share"] = share
        return logged

    def share(self) -> float | None:
        """Seconds of the looks over those of the training without them; None before it began."""
        if self._began is None:
            return None
        training = time.perf_counter() - self._began - self.seconds
        return self.seconds / training if training > 0 else None

    def tell(self) -> None:
        """What the looks came to, in one line on stderr."""
        share = self.share()
        if self.num_looks and share is not None:
            cost = f"{100 * share:.2g}" if share < 1 else f"{100 * share:.0f}"
            took = f"{self.num_looks} looks in {self.seconds:.2f} s, {cost} % of the training's time"
            print(f"deadbench: {took}; results in {self._out}", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Say once in a training that something failed; not by `warnings`, which may be errors."""
        if not self._warned:
            self._warned = True
            logging.getLogger("deadbench").warning("deadbench: %s; the training goes on", text)

    def _write(self, reading: Reading, step: int) -> None:
        if self._store is None:
            self._store = ResultStore(self._out)
        for tables in reading.tables:
            self._store.write(renamed(tables, self._name, None, step))

    def _fail(self, model: nn.Module, step: int, error: Exception) -> None:
        """A failed row for each read, and one warning in all."""
        told = one_line(error)
        self.warn(f"the look at step {step} failed ({told})")
        with suppress(Exception):
            run_id = new_run_id()
            jobs = [live_job(model, read) for read in self._reads]
            self._write(Reading(tuple(failed_read(job, run_id, 1, told).tables for job in jobs)), step)


def _logged(reading: Reading) -> dict[str, float]:
    """The numbers of all reads; of one that several have, the last's."""
    found: dict[str, float] = {}
    for row in reading.rows:
        found |= {f"{_PREFIX}{name}": float(row[name]) for name in _LOGGED if row[name] is not None}
    return found
