"""Results that refuse: what has finished is kept, written when that is possible, never twice and never by half."""

import errno
import os

import polars as pl
import pytest

from deadbench.runners.jobs.events import failed_read
from deadbench.runners.results import outbox
from deadbench.runners.results.outbox import Outbox, UnwritableError
from deadbench.runners.results.store import ResultStore
from tests.runners.sleepers import sleeping_jobs


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time passes only in sleep."""
    now = [100.0]
    monkeypatch.setattr(outbox.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(outbox.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


@pytest.fixture
def reads(tmp_path):
    jobs = sleeping_jobs(tmp_path / "registry", 3)
    return [failed_read(read, "run", 1, "asleep") for job in jobs for read in job.reads]


class Refusing(ResultStore):
    """A store whose disk is full from the second file on, as long as `full` says so."""

    full = True
    files = 0

    def _write_whole(self, path, contents):
        self.files += 1
        if self.full and self.files > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super()._write_whole(path, contents)


def test_what_a_full_disk_refuses_is_written_when_there_is_room(tmp_path, reads, clock):
    store, said = Refusing(str(tmp_path / "out")), []
    box = Outbox(store, said.append, patience=600)
    written = [each for read in reads for each in box.put(read)]
    assert written == reads[:1]
    assert len(box) == len(reads) - 1
    assert said == [f"results in {tmp_path}/out cannot be written (No space left on device); kept and tried again"]
    assert store.files == 2, "not tried again before it is time"
    store.full = False
    assert box.drain() == reads[1:]
    assert clock[0] == 101.0
    frame = pl.scan_parquet(tmp_path / "out" / "reads" / "*.parquet").collect()
    assert frame.select("model", "read").is_unique().all()
    assert frame.height == len(reads)


def test_a_disk_that_stays_full_ends_in_one_line_with_what_was_written_kept(tmp_path, reads, clock):
    box = Outbox(Refusing(str(tmp_path / "out")), lambda text: None, patience=60)
    for read in reads:
        box.put(read)
    with pytest.raises(
        UnwritableError, match=r"60 s \(No space left on device\); 1 reads are written, 5 that"
    ) as error:
        box.drain()
    assert "\n" not in str(error.value)
    assert 160 <= clock[0] < 200
    assert pl.scan_parquet(tmp_path / "out" / "reads" / "*.parquet").collect().height == 1
    assert list((tmp_path / "out" / "_tmp").iterdir()) == [], "no half file"


def test_a_table_that_was_written_before_the_refusal_is_not_doubled(tmp_path, reads):
    spectra = pl.DataFrame({"model": ["m"]}).to_arrow()
    reads[0].tables["spectra"] = spectra
    store = Refusing(str(tmp_path / "out"))
    box = Outbox(store, lambda text: None, patience=60)
    assert box.put(reads[0]) == [], "its row, which comes last, was refused"
    store.full = False
    assert box.drain() == reads[:1]
    assert len(list((tmp_path / "out" / "spectra").iterdir())) == 1
    assert len(list((tmp_path / "out" / "reads").iterdir())) == 1
