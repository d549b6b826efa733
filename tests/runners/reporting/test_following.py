"""A run followed by its result set alone: rows as they come, where its driver is, and how it ends. Without Ray."""

import json
import math
from dataclasses import asdict

import pytest

from deadbench.runners.jobs.events import Finished, Progress, failed_read, to_tables
from deadbench.runners.reporting import following
from deadbench.runners.reporting.following import follow
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.reporting.run_record import RunRecord
from deadbench.runners.results.claims import LEASE_SECONDS, Claims
from deadbench.runners.results.store import ResultStore
from deadbench.suite.schema import KEY
from tests.runners.sleepers import sleeping_jobs


class Elsewhere:
    """A driver of two models of two reads each, which does a step whenever who follows it waits."""

    def __init__(self, folder, monkeypatch, run_id="20260101T000000Z-a"):
        self.out, self.run_id, self.now = str(folder / "out"), run_id, 1000.0
        self.store, self.jobs = ResultStore(self.out), sleeping_jobs(folder / "registry", 2)
        self.reads = [read for job in self.jobs for read in job.reads]
        self.record = RunRecord(self.store, run_id, self.jobs, print)
        self.record.started("none", [])
        self.claims, self.reporter, self.steps = Claims(self.store, run_id), Reporter(4), []
        self.claims.at = self.reporter.at
        self.claims.begin()
        monkeypatch.setattr(following.time, "sleep", self.wait)
        monkeypatch.setattr(following.time, "monotonic", lambda: self.now)

    def wait(self, seconds):
        self.now += seconds
        assert self.now < 5000, "whoever follows waits for ever"
        if self.steps:
            self.steps.pop(0)()

    def stores(self, read, run_id=None, error=None):
        from datetime import UTC, datetime

        event = failed_read(read, run_id or self.run_id, 1, error or "")
        if error is None:
            rows = {"reads": [{"status": "ok", "depth": 12.5}]}
            event = Finished(read, to_tables(rows, read, run_id or self.run_id, 1, datetime.now(UTC)))
        self.store.write(event.tables)
        if run_id is None:
            self.record.finished(event)
        else:
            self.record.elsewhere(read, event.row)

    def ends(self, status="finished", error=None):
        self.record.ended(status, error)
        self.claims.end()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    return Elsewhere(tmp_path, monkeypatch)


def test_rows_and_places_are_told_as_they_come(elsewhere, capsys):
    first, second, third, fourth = elsewhere.reads
    elsewhere.stores(first)

    def moves():
        elsewhere.reporter.progress("m", Progress("slow random", "forward", 10, 100))
        elsewhere.claims.beat()
        capsys.readouterr()

    def goes_on():
        elsewhere.stores(second, error="out of memory")
        elsewhere.stores(third, run_id="another")
        elsewhere.reporter.gone("m")
        elsewhere.claims.beat()

    elsewhere.steps = [moves, goes_on, lambda: (elsewhere.stores(fourth), elsewhere.ends())]
    found = follow(elsewhere.out, None)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "slow random: forward",
        *(f"[{n}/4] {read.label()}: {words}" for n, read, words in (
            (2, second, "failed: out of memory"), (3, third, "read by another run"), (4, fourth, "depth 12.50"),
        )),
    ]  # fmt: skip
    assert (found.ending, found.counts()) == ("finished", {"ok": 2, "failed": 1, "by_others": 1})


def test_nothing_is_written_where_a_run_is_followed(elsewhere, tmp_path):
    def there():
        return sorted((str(path), path.stat().st_size) for path in (tmp_path / "out").rglob("*") if path.is_file())

    before = []
    elsewhere.steps = [lambda: before.append(there()), lambda: (before.append(there()), elsewhere.ends("interrupted"))]
    assert follow(elsewhere.out, elsewhere.run_id).ending == "interrupted"
    assert before[0] == before[1]


def test_what_an_earlier_run_stored_is_no_row_of_this_one(elsewhere, capsys):
    read = elsewhere.reads[0]
    elsewhere.record._facts["started_at"] = "2999-01-01T00:00:00+00:00"
    elsewhere.record.started("none", [])
    elsewhere.stores(read, run_id="earlier")
    elsewhere.steps = [elsewhere.ends]
    follow(elsewhere.out, None)
    assert "[1/4]" not in capsys.readouterr().err


def test_a_driver_that_gives_no_sign_for_a_lease_is_gone(elsewhere):
    elsewhere.claims._sign_of_life = lambda: b'{"host": "far", "machine": "another"}'
    elsewhere.claims.beat()
    began = elsewhere.now
    assert follow(elsewhere.out, None).ending == "gone"
    assert LEASE_SECONDS < elsewhere.now - began < LEASE_SECONDS + 5


def test_a_dead_process_of_this_machine_is_gone_at_once(elsewhere):
    facts = following.facts_of(elsewhere.claims._sign_of_life())
    elsewhere.claims._sign_of_life = lambda: json.dumps(facts | {"born": 1.0}).encode()
    elsewhere.claims.beat()
    assert (follow(elsewhere.out, None).ending, elsewhere.now) == ("gone", 1000.0)


def test_what_a_driver_stored_before_it_died_is_counted(elsewhere):
    """Its record says nothing of it: it is written at the start and at the end."""
    elsewhere.claims._sign_of_life = lambda: b'{"host": "far", "machine": "another"}'
    elsewhere.claims.beat()
    mine, failed, others, _ = elsewhere.reads
    elsewhere.steps = [
        lambda: elsewhere.stores(mine),
        lambda: elsewhere.stores(failed, error="no such norm"),
        lambda: elsewhere.stores(others, "20260101T000000Z-b"),
    ]
    followed = follow(elsewhere.out, None)
    assert (followed.ending, followed.counts()) == ("gone", {"ok": 1, "failed": 1, "by_others": 1})
    assert [each["status"] for each in followed.record["reads"]] == ["ok", "failed", "ok", "planned"]
    assert followed.record["reads"][1]["error"] == "no such norm"


def test_where_nothing_is_claimed_it_is_said_and_the_run_is_followed_to_its_end(elsewhere, capsys):
    elsewhere.claims.end()
    elsewhere.steps = [lambda: None] * 60 + [elsewhere.ends]
    assert follow(elsewhere.out, None).ending == "finished"
    assert capsys.readouterr().err.count("leaves no signs of life here") == 1


def test_the_run_that_goes_on_is_meant_else_the_newest(elsewhere, tmp_path, monkeypatch):
    store, reader = elsewhere.store, following.ResultReader(elsewhere.out)
    later = RunRecord(store, "20260102T000000Z-b", elsewhere.jobs, print)
    later.started("none", [])
    later.ended("finished")
    (tmp_path / "out" / "runs" / "notes").mkdir()
    assert following.latest_run(reader) == elsewhere.run_id
    elsewhere.ends()
    assert following.latest_run(reader) == "20260102T000000Z-b"


def test_a_place_that_does_not_answer_for_a_while_is_asked_again(elsewhere, monkeypatch, capsys):
    def refused(self):
        raise following.StoreError("s3://b: reads cannot be read (timed out)")

    come = following.ResultReader.come
    monkeypatch.setattr(following.ResultReader, "come", refused)
    elsewhere.steps = [lambda: (monkeypatch.setattr(following.ResultReader, "come", come), elsewhere.ends())]
    assert follow(elsewhere.out, None).ending == "finished"
    assert "timed out); tried again" in capsys.readouterr().err


def test_a_file_that_is_none_of_ours_is_told_at_once(elsewhere, tmp_path):
    (tmp_path / "out" / "reads").mkdir(exist_ok=True)
    (tmp_path / "out" / "reads" / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"0\.parquet cannot be read as parquet; move it away"):
        follow(elsewhere.out, None)
    assert elsewhere.now == 1000.0


def test_a_record_whose_time_has_no_zone_is_followed(elsewhere):
    elsewhere.record._facts["started_at"] = "2026-01-01T00:00:00"
    elsewhere.record._write()
    elsewhere.steps = [lambda: elsewhere.stores(elsewhere.reads[0], run_id="another"), elsewhere.ends]
    assert follow(elsewhere.out, None).ending == "finished"


_LISTED_KEY = json.dumps({"status": "running", "reads": [{key: [] for key in (*KEY, "status")}]})


@pytest.mark.parametrize(
    "text",
    [None, "{", "[]", '{"status": "running", "reads": [{}]}', '{"reads": []}', "[" * 5000, _LISTED_KEY],
)
def test_what_is_no_record_is_one_line(elsewhere, text):
    if text is not None:
        elsewhere.store.write_text("runs/x/run.json", text)
    with pytest.raises(ValueError, match="run x has no record of a run"):
        follow(elsewhere.out, "x")


@pytest.mark.parametrize(
    "at",
    [
        None,
        3,
        [3],
        [{"label": "m"}],
        [asdict(Progress("m", "x")) | {"label": []}],
        [asdict(Progress("m", "x", "many"))],
        [asdict(Progress("m", "x", math.inf, 10))],
        [asdict(Progress("m", "x", math.nan, -1))],
        [asdict(Progress("m", "x", 10**400, 10**400))],
    ],
)
def test_signs_of_another_version_say_nothing(elsewhere, at, capsys):
    elsewhere.claims.at = lambda: at
    elsewhere.steps = [elsewhere.claims.beat, elsewhere.ends]
    assert follow(elsewhere.out, None).ending == "finished"
    assert len(capsys.readouterr().err.splitlines()) == 1
