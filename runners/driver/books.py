"""What becomes of finished reads, however they were run: into the results, the summary, the record, the report."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deadbench.runners.driver.outbox import Outbox
from deadbench.runners.jobs.events import Finished
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.reporting.run_record import RunRecord
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker.progress_folder import remove_checkpoints


@dataclass
class Summary:
    """What a run came to."""

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
        reporter: Reporter,
        record: RunRecord,
        run_id: str,
        patience: float,
        counted: Callable[[str], None] = lambda status: None,
    ):
        """`patience` in seconds, for which results that cannot be written are kept; `counted` is told each status."""
        self._store, self._reporter, self._record, self._counted = store, reporter, record, counted
        self._outbox = Outbox(store, reporter.say, patience)
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

    def _enter(self, written: list[Finished]) -> None:
        """Reads that are in the results now."""
        for event in written:
            row = event.row
            if row["status"] == "ok" and event.job.engine is not None:
                remove_checkpoints(self._store.location, event.job)
            self.summary.ok += row["status"] == "ok"
            self.summary.failed += row["status"] != "ok"
            names = ("model", "revision", "read", "status", "error", "depth")
            self.summary.reads.append({name: row[name] for name in names})
            self._record.finished(event)
            self._counted(row["status"])
            self._reporter.finished(event)
