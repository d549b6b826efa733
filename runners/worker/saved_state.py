"""Checkpoints of a running read: the accumulators and the position, so that a read that was cut off goes on from there.

`OUT/_progress/<identity>.arrow`, one for each rank, written by the process that reads: what it holds may be gigabytes,
and nothing of that passes through the driver, which only removes it when the row is stored. A file is whole or not
there, ends with the hash of what it holds, and says what it is of; what does not fit is never used.
"""

import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from deadbench.runners.engines.sweep_state import SWEEP_STATE
from deadbench.runners.jobs.job import ReadJob
from deadbench.runners.results.versions import versions
from deadbench.runners.worker.hashed_file import Hashed, check_whole
from deadbench.runners.worker.progress_folder import FOLDER, name_of
from deadbench.suite.errors import message
from deadbench.suite.ranks import Ranks
from deadbench.suite.reads.final_norm import STATE as FINAL_NORM_STATE
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.reads.residual import STREAM_STATE, ResidualRead
from deadbench.suite.spectra.arrow_state import StateError, struct
from deadbench.suite.storage import is_url, open_place, put_in_place, written_aside

_VERSION = 3  # of the states: raised when what is in them changes its meaning
_WRITING_SHARE = 20  # the time between two checkpoints is at least so many times what the last took to write
_DISK_SHARE = 2  # of what is free on a local disk, a checkpoint takes at most one part in so many
_FILE = pa.schema(
    {
        "facts": pa.string(),
        "position": pa.string(),
        "final_norm": pa.struct(FINAL_NORM_STATE),
        "stream": pa.struct(STREAM_STATE),
        "sweep": pa.struct(SWEEP_STATE),
    }
)


@dataclass
class Position:
    """Where a read is: in which pass (by its first tap), how many of its batches are done, and the seconds so far.

    `swept`: through how many blocks every batch has gone, where an engine runs block by block.
    """

    first: int = 0
    per_pass: int = 0
    batch: int = 0
    swept: int = 0
    num_taps: int = 1
    forward_seconds: float = 0.0
    spectrum_seconds: float = 0.0


class SavedRead:
    """What one rank has saved of its part of one read."""

    def __init__(self, read: ReadJob, ranks: Ranks, facts: dict[str, Any], *, possible: bool):
        """`facts` are what must be equal for the state to be of use, beside the read's identity and the versions.

        Nothing is saved where it is not `possible`.
        """
        self.interval, self._ranks = read.checkpoint_interval if possible else 0.0, ranks
        self._facts = json.dumps(
            {"state": _VERSION, "identity": read.identity(), "versions": json.loads(versions()), **facts}
            | {"rank": ranks.rank, "ranks": ranks.size, "divided": ranks.divided},
            sort_keys=True,
        )
        self._due, self.remark = time.monotonic() + self.interval, ""
        self._target: str | None = None
        self._others: dict[str | None, str] = {}  # where engines that the plan might have taken would save
        if self.interval and read.checkpoint_location is not None:
            part = f"-{ranks.rank}of{ranks.size}" if ranks.size > 1 else ""
            targets = {
                each.engine: f"{read.checkpoint_location}/{FOLDER}/{name_of(each)}{part}.arrow"
                for each in read.by_any_engine()
            }
            self._target = targets.pop(read.engine)
            self._others = targets
            if not is_url(self._target) and not Path(read.checkpoint_location).is_dir():
                self.remark = f"no checkpoints: {read.checkpoint_location} is no folder of this node"
                self._target = None

    def is_due(self, *, in_step: bool) -> bool:
        """Whether it is time to save; ranks that are in step say so together, by the clock of the first."""
        if not self.interval:
            return False
        due = self._target is not None and time.monotonic() >= self._due
        return bool(self._ranks.share(due)[0]) if in_step else due

    def save(
        self,
        position: Position,
        measured: FinalNormRead,
        stream: ResidualRead,
        sweep: Iterable[pa.RecordBatch] = (),
        *,
        in_step: bool,
    ) -> None:
        """Write the state in the place of the last one; with `in_step` all ranks do, or none.

        `sweep`: where an engine that runs block by block stands. What cannot be written is said in `remark`: the read
        goes on.
        """
        started = time.monotonic()
        aside, failure = None, None
        if self._target is not None:
            try:
                aside = self._write(self._batches(position, measured, stream, sweep))
            except Exception as error:  # whatever a disk, a bucket or its library comes up with
                failure = f"no checkpoint: {message(error)}"
        written = [bool(aside)] if not in_step else self._ranks.share(bool(aside))
        if aside is not None and self._target is not None:
            with contextlib.suppress(OSError):  # what is left of it goes when the read is stored
                put_in_place(aside, self._target, _fs(aside)) if all(written) else _fs(aside).rm_file(aside)
        self.remark = failure or ""
        now = time.monotonic()
        self._due = now + max(self.interval, _WRITING_SHARE * (now - started))

    def load(self, measured: FinalNormRead, stream: ResidualRead) -> Position | None:
        """Fill `measured` and `stream` from the last checkpoint; None where there is none of use.

        They may be half filled then; why is in `remark`.
        """
        if self._target is None:
            return None
        try:
            if not _fs(self._target).exists(self._target):
                for engine in (engine for engine, target in self._others.items() if _fs(target).exists(target)):
                    self.remark = f"its checkpoint of engine {engine} is ignored: another engine reads it now"
                return None
        except Exception as error:  # a place that the driver can write to and this process cannot
            self.remark = f"no checkpoints: {message(error)}"
            self._target = None
            return None
        try:
            with _fs(self._target).open(self._target, "rb") as file:
                check_whole(file)
            states = self._states()
            head = next(states)
            if head.schema != _FILE or head.column("facts")[0].as_py() != self._facts:
                raise StateError("it is of another version, input, device or number of ranks")
            position = Position(**json.loads(head.column("position")[0].as_py()))
            measured.restore(next(states).column("final_norm")[0])
            stream.restore(_each(states, "stream"))
            return position
        except Exception as error:  # a torn file can break a parser anywhere
            self.remark = f"its checkpoint is ignored: {message(error)}"
            return None

    def sweep(self) -> Iterator[pa.RecordBatch]:
        """Where an engine that runs block by block stood, from the checkpoint that was loaded: one batch at a time."""
        return _each(self._states(), "sweep")

    def _states(self) -> Iterator[pa.RecordBatch]:
        """What the file holds, one after another."""
        assert self._target is not None
        with _fs(self._target).open(self._target, "rb") as file, pa.ipc.open_stream(file) as reader:
            yield from reader

    def _batches(
        self,
        position: Position,
        measured: FinalNormRead,
        stream: ResidualRead,
        sweep: Iterable[pa.RecordBatch],
    ) -> Iterator[pa.RecordBatch]:
        yield _row(facts=self._facts, position=json.dumps(asdict(position)))
        yield _row(final_norm=measured.to_arrow())
        for state in stream.to_arrow():
            yield _row(stream=state)
        for state in sweep:
            yield _row(sweep=state)

    def _write(self, batches: Iterable[pa.RecordBatch]) -> str:
        """The file beside its target; whole, and on a local disk for good."""
        assert self._target is not None
        aside = f"{self._target}.{uuid.uuid4().hex}"
        fs, room = _fs(aside), float("inf")
        if not is_url(aside):
            Path(aside).parent.mkdir(exist_ok=True)
            room = shutil.disk_usage(Path(aside).parent).free / _DISK_SHARE
        with written_aside(aside, fs) as file:
            hashed = Hashed(file)
            with pa.ipc.new_stream(hashed, _FILE) as writer:
                for batch in batches:
                    writer.write_batch(batch)
                    if hashed.written > room:
                        raise OSError(f"it would take more than half of the {2 * room / 1e9:.1f} GB that are free")
            hashed.seal()
        return aside


def _each(states: Iterator[pa.RecordBatch], column: str) -> Iterator[pa.RecordBatch]:
    """Those of one kind, which are packed in a column of their own."""
    packed = (state.column(column) for state in states)
    return (pa.RecordBatch.from_struct_array(each) for each in packed if each[0].is_valid)


def _fs(path: str) -> Any:
    return open_place(path)[0]


def _row(**columns: Any) -> pa.RecordBatch:
    return struct({name: columns.get(name) for name in _FILE.names}, _FILE)
