"""What becomes of finished reads, however they were run: into the results, the summary, the record, the report."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deadbench.runners.driver.sharing import Sharing
from deadbench.runners.jobs.events import Finished, failed_read
from deadbench.runners.jobs.job import ModelJob
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.reporting.run_record import RunRecord
from deadbench.runners.results.outbox import Outbox
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker.progress_folder import remove_checkpoints

_TOLD = ("model", "revision", "read", "status", "error", "depth")


@dataclass
class Summary:
    """What a run came to: `skipped` reads were in the results, or came there from other runs meanwhile."""

    run_id: str
    ok: int = 0
    failed: int = 0
    skipped: int = 0
    reads: list[dict[str, Any]] = field(default_factory=list)


class Books:
    """Takes finished reads one by one; what the store refuses waits in the outbox, and is told when it is written."""

    def __init__(
        self,
        store: ResultStore,
        sharing: Sharing,
        reporter: Reporter,
        record: RunRecord,
        run_id: str,
        patience: float,
        counted: Callable[[str], None] = lambda status: None,
    ):
        """`patience` in seconds, for which results that cannot be written are kept; `counted` is told each status."""
        self._store, self._reporter, self._record, self._counted = store, reporter, record, counted
        self._sharing = sharing
        self._outbox = Outbox(store, reporter.say, patience, sharing.still_ours)
        self.summary = Summary(run_id)

    def put(self, event: Finished) -> None:
        """Take one finished read, and write what waits.

        Raises:
            UnwritableError: the store has refused for longer than the patience.
        """
        self._enter(self._outbox.put(event))

    def flush(self) -> None:
        """Write what waits, if it is time for that; raises as `put`."""
        self._enter(self._outbox.flush())

    def drain(self) -> None:
        """Write all that waits, however long that takes within the patience; raises as `put`."""
        self._enter(self._outbox.drain())

    def fail_unreadable(self, jobs: list[ModelJob]) -> list[ModelJob]:
        """Failed rows of what the preflight could not open; returns what another run is at. Raises as `put`."""
        left = []
        for job in jobs:
            mine, others = self._sharing.take(job)
            self.look_elsewhere()
            for read in mine.reads:
                self.put(failed_read(read, self.summary.run_id, 0, str(read.error)))
            left += [others] if others.reads else []
        return left

    def look_elsewhere(self) -> None:
        """Enter what other runs have stored of the reads of this one."""
        for read, row in self._sharing.elsewhere():
            ok = row["status"] == "ok"
            self.summary.skipped += ok
            if not ok:
                self.summary.failed += 1
                self.summary.reads.append({name: row[name] for name in _TOLD})
            self._record.elsewhere(read, row)
            self._reporter.elsewhere(read, row)

    def _enter(self, written: list[Finished]) -> None:
        """Reads that are in the results now."""
        for event in written:
            row = event.row
            self._sharing.stored(event)
            if row["status"] == "ok" and event.job.engine is not None:
                remove_checkpoints(self._store.location, *event.job.by_any_engine())
            self.summary.ok += row["status"] == "ok"
            self.summary.failed += row["status"] != "ok"
            self.summary.reads.append({name: row[name] for name in _TOLD})
            self._record.finished(event)
            self._counted(row["status"])
            self._reporter.finished(event)
