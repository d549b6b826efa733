"""What a worker says: progress while a read runs, and its tables when it is over."""

import resource
import sys
import time
import uuid
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pyarrow as pa

from deadbench.runners.jobs.job import ReadJob, read_step, tokens_seen
from deadbench.runners.results.versions import versions
from deadbench.suite.reads.flags import flags
from deadbench.suite.schema import Row, to_table
from deadbench.suite.secrets import shown_place


@dataclass(frozen=True)
class Progress:
    """Where a running model is; `done` of `total` in the phase, tokens or blocks by `unit`, zero where it has no count.

    `device_bytes`: what the process has taken of its GPU.
    """

    label: str
    phase: str
    done: float = 0
    total: int = 0
    device_bytes: int | None = None
    unit: Literal["tokens", "blocks"] = "tokens"


@dataclass(frozen=True)
class Remark:
    """Something to say of a running read, in one line."""

    label: str
    text: str


@dataclass(frozen=True)
class Finished:
    """One read is over, well or not: its tables, and the traceback of a failure.

    `poisoned`: by a failure after which another process is to try again, where there are retries left.
    """

    job: ReadJob
    tables: dict[str, pa.Table]
    traceback: str | None = None
    poisoned: bool = False

    @property
    def row(self) -> Row:
        """The row of `reads`."""
        return self.tables["reads"].to_pylist()[0]  # type: ignore[no-any-return]


class RankMemoryError(ValueError):
    """A rank ran out of memory: alone it cannot go back, but all may begin again with half the batch."""


class GroupBrokenError(RuntimeError):
    """One rank failed where the others went on: the group cannot be used for another read."""


class SilenceError(BaseException):
    """A read made no progress for so long; one line, and the row's error.

    No `Exception`: what tries again, or goes on without, must not take a read's end for a fault of what it tried.
    """


Event = Progress | Remark | Finished
Rows = dict[str, list[Row]]
Reading = Generator[Progress | Remark, None, Rows]


def new_run_id() -> str:
    """Sortable by time, unique without coordination."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"


def to_tables(rows: Rows, read: ReadJob, run_id: str, attempt: int, started_at: datetime) -> dict[str, pa.Table]:
    """Arrow tables of a read: the key in every row, and in the row of `reads` what is known without measuring."""
    key = {"run_id": run_id} | read.key_columns()
    step = read_step(read)
    step = rows["reads"][0].get("source_step") if step is None else step
    row = rows["reads"][0] | {
        "source": shown_place(read.model.source or "inline config"),
        "source_fingerprint": read.fingerprint,
        "checkpoint_step": step,
        "tokens_seen": tokens_seen(read, step),
        "skip_positions": read.protocol.skip_positions if read.engine else None,
        "modality": read.model.modality,
        "protocol": read.protocol_name,
        "family_expected": read.model.family,
        "versions": versions(),
        "started_at": started_at,
        "finished_at": datetime.now(UTC),
        "attempt": attempt,
    }
    row.setdefault("input", read.input)
    if read.stands_for is not None:
        row["input"] = f"{row['input']} (stands for {read.stands_for})"
    row.setdefault("peak_host_bytes", peak_host_bytes())
    row.setdefault("tensor_parallel", read.tensor_parallel if read.engine else None)
    row["flags"] = flags(row, rows.get("blocks", ())) if row.get("status") == "ok" else None
    keyed = {name: [key | each for each in (rows[name] if name != "reads" else [row])] for name in rows}
    return {name: to_table(name, each) for name, each in keyed.items()}


def failed_read(read: ReadJob, run_id: str, attempt: int, error: str) -> Finished:
    """The row of a read that no process tells of: it died before it could speak, or was never tried (`attempt` 0)."""
    rows: Rows = {"reads": [{"status": "failed", "error": error, "peak_host_bytes": None}]}
    return Finished(read, to_tables(rows, read, run_id, attempt, datetime.now(UTC)))


def peak_host_bytes() -> int:
    """Peak resident memory of this process since it started, in bytes."""
    try:  # getrusage's maximum is not this process's own: a child starts from its parent's
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
