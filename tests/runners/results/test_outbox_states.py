"""Results that refuse, recover and die at any step: nothing is lost, nothing is there twice, every file is whole."""

import errno
import functools
import os
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileOpener
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from deadbench.runners.jobs.events import Finished, to_tables
from deadbench.runners.results import outbox
from deadbench.runners.results.outbox import Outbox, UnwritableError
from deadbench.runners.results.store import ResultStore
from deadbench.suite import storage
from tests.runners.sleepers import sleeping_jobs


class Killed(BaseException):
    """The driver is gone: nothing of it is tidied up."""


class Disk:
    """What the disk does with the next steps: lets them pass, refuses all after some, or ends the process at one."""

    def __init__(self):
        self.left, self.error = None, None

    def step(self):
        if self.left is None:
            return
        if self.left:
            self.left -= 1
        else:
            raise self.error

    def after(self, steps, error):
        self.left, self.error = steps, error

    def heal(self):
        self.left = None

    @property
    def killing(self):
        return self.left is not None and isinstance(self.error, Killed)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """(disk, clock, reads): time passes only in sleep, and every step of a write asks the disk."""
    disk, now = Disk(), [100.0]
    write, fsync, replace, remove = LocalFileOpener.write, os.fsync, os.replace, storage._remove

    def asking(function):
        def ask(*arguments, **named):
            disk.step()
            return function(*arguments, **named)

        return ask

    monkeypatch.setattr(LocalFileOpener, "write", asking(write))
    monkeypatch.setattr(
        storage, "os", SimpleNamespace(**{**vars(os), "fsync": asking(fsync), "replace": asking(replace)})
    )
    monkeypatch.setattr(storage, "_remove", lambda *args: None if disk.killing else remove(*args))
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s), time_ns=time.time_ns
    )
    monkeypatch.setattr(outbox, "time", clock)
    jobs = sleeping_jobs(tmp_path / "registry", 4)
    return disk, clock, [read for job in jobs for read in job.reads]


@functools.cache
def keys_of(path, inode, changed):
    """The (run, key) of each row of a file, read once as long as it is the same file."""
    names = ["run_id", "model", "revision", "read", "seed", "protocol_hash", "engine"]
    rows = pq.read_table(path, partitioning=None).select(names).to_pylist()
    return [tuple(row.values()) for row in rows]


class Driver(RuleBasedStateMachine):
    """A driver that measures reads in order, over as many lives as it takes."""

    def __init__(self, world):
        super().__init__()
        self.disk, self.clock, self.reads = world
        self.folder = tempfile.TemporaryDirectory()
        self.lives = 0
        self.told: set = set()
        self.begin()

    def begin(self):
        """A new run on the same result set: it measures what is not finished."""
        self.disk.heal()
        self.lives += 1
        self.store = ResultStore(self.folder.name)
        finished = self.store.finished()
        assert self.told <= finished, "what was told as written is gone"
        self.box = Outbox(self.store, lambda text: None, patience=60)
        self.left = [read for read in self.reads if read.identity() not in finished]
        self.put = 0
        self.told = set(finished)

    def living(self, work):
        before = len(self.told)
        try:
            written = work()
        except Killed:
            return self.begin()
        except UnwritableError as error:
            text = str(error)
            assert f"{len(self.box)} that had finished are not" in text
            assert "\n" not in text
            return self.begin()
        self.told |= {event.job.identity() for event in written}
        assert len(self.told) == before + len(written), "told twice"
        return None

    @rule(trouble=st.none() | st.tuples(st.integers(0, 8), st.sampled_from(["full", "killed"])))
    def finish_a_read(self, trouble):
        """The disk goes wrong so many steps after it: a write of two tables takes eight."""
        if self.put == len(self.left):
            return
        if trouble is not None:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.disk.after(trouble[0], full if trouble[1] == "full" else Killed())
        read = self.left[self.put]
        self.put += 1
        rows = {"reads": [{"status": "ok"}], "spectra": [{"site": "final_norm", "eigenvalues": [1.0]}]}
        tables = to_tables(rows, read, f"run-{self.lives}", 1, datetime.now(UTC))
        self.living(lambda: self.box.put(Finished(read, tables)))

    @rule()
    def make_room(self):
        self.disk.heal()

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0, 40.0]))
    def wait(self, seconds):
        self.clock.sleep(seconds)
        self.living(self.box.flush)

    @rule()
    def drain(self):
        self.living(self.box.drain)

    @invariant()
    def what_is_not_told_still_waits(self):
        told_now = {read.identity() for read in self.left[: self.put]} & self.told
        assert len(self.box) == self.put - len(told_now)

    @invariant()
    def every_file_is_whole_and_nothing_is_twice(self):
        rows, spectra = (self.stored(table) for table in ("reads", "spectra"))
        assert max(rows.values(), default=1) == max(spectra.values(), default=1) == 1
        assert {key[1:] for key in rows} >= {identity[:-1] for identity in self.told}
        assert len({key[1:] for key in rows}) == len(rows), "a read that was finished is measured again"
        assert rows.keys() <= spectra.keys(), "a row without its spectrum"

    def stored(self, table):
        """How often each (run, key) is in a table."""
        found: Counter = Counter()
        for path in Path(self.folder.name, table).glob("*.parquet"):
            facts = path.stat()
            found.update(keys_of(path, facts.st_ino, facts.st_mtime_ns))
        return found

    def teardown(self):
        """In the end there is room, and everything is there once."""
        self.begin()
        while self.put < len(self.left):
            self.finish_a_read(None)
        self.drain()
        self.every_file_is_whole_and_nothing_is_twice()
        assert self.store.finished() == {read.identity() for read in self.reads}
        self.folder.cleanup()


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_twice_whatever_the_disk_does(world):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        lambda: Driver(world),
        settings=settings(max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=checks),
    )
