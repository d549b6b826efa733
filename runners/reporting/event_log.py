"""`--log-format json`: what happens in a run as one JSON object a line on stderr, for programs that watch."""

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any

from deadbench.runners.jobs.events import Finished, Progress
from deadbench.runners.jobs.job import ModelJob, ReadJob
from deadbench.runners.reporting.progress import Reporter
from deadbench.suite.plain_text import MAX_LINE, plain

_PROGRESS_SECONDS = 1.0  # between two events of one model


class EventLog(Reporter):
    """A reporter whose every word is an event: `time`, `event`, `run_id`, and what belongs to it."""

    def __init__(self, total_reads: int, *, debug: bool = False):
        super().__init__(total_reads, debug=debug)
        self._run_id: str | None = None
        self._told: dict[str, tuple[float, str, str]] = {}

    def __enter__(self) -> "EventLog":
        return self

    def say(self, text: str) -> None:
        """A remark."""
        self._tell("message", text=plain(text, MAX_LINE))

    def run_started(self, run_id: str, num_models: int) -> None:
        """`run_started`: how many models and reads."""
        self._run_id = run_id
        self._tell("run_started", models=num_models, reads=self._total)

    def model_started(self, job: ModelJob, attempt: int, nodes: list[str], devices: float) -> None:
        """`model_started`: where, and for which reads."""
        reads = [read.label() for read in job.reads]
        self._tell("model_started", model=job.model_id, attempt=attempt, nodes=nodes, devices=devices, reads=reads)

    def progress(self, model_id: str, event: Progress) -> None:
        """`progress`: at most once a second of each model, and at each new phase."""
        self._at[model_id] = event
        now = time.monotonic()
        last = self._told.get(model_id)
        if last is not None and last[1:] == (event.label, event.phase) and now - last[0] < _PROGRESS_SECONDS:
            return
        self._told[model_id] = now, event.label, event.phase
        count = {f"{event.unit}_done": event.done, f"{event.unit}_total": event.total} if event.total else {}
        memory = {} if event.device_bytes is None else {"device_bytes": event.device_bytes}
        self._tell("progress", model=model_id, read=event.label, phase=event.phase, **count, **memory)

    def finished(self, event: Finished) -> None:
        """`read_finished`: the outcome, and the numbers that one asks for first."""
        row = event.row
        names = ("model", "revision", "read", "seed", "status", "error", "attempt", "family", "depth", "alignment")
        traceback = {"traceback": event.traceback} if self._debug and event.traceback else {}
        self._tell("read_finished", **{name: row[name] for name in names}, **traceback)

    def elsewhere(self, read: ReadJob, row: dict[str, Any]) -> None:
        """`read_elsewhere`: the outcome of a read of this run that another run, `by`, has stored."""
        names = ("model", "revision", "read", "seed", "status", "error", "depth")
        self._tell("read_elsewhere", **{name: row[name] for name in names}, by=row["run_id"])

    def retry(self, read: ReadJob, cause: str, attempt: int, changed: str | None) -> None:
        """`retry`: of which read, why, and with what changed."""
        key = {"model": read.model.id, "revision": read.revision, "read": read.read}
        self._tell("retry", **key, cause=cause, attempt=attempt, changed=changed)

    def gone(self, model_id: str) -> None:
        """`model_ended`."""
        for known in (self._told, self._at):
            known.pop(model_id, None)
        self._tell("model_ended", model=model_id)

    def run_ended(self, outcome: str, counts: dict[str, int]) -> None:
        """`run_ended`: finished, interrupted or stopped, and the counts."""
        self._tell("run_ended", outcome=outcome, **counts)

    def _tell(self, event: str, **facts: Any) -> None:
        head = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, "run_id": self._run_id}
        print(json.dumps(head | facts, allow_nan=False), file=sys.stderr, flush=True)
