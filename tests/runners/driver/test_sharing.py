"""Several drivers of one result set, in one process and without Ray: each read once, whoever takes it over."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deadbench.runners.driver import in_process, sharing
from deadbench.runners.driver.loop import Settings
from deadbench.runners.driver.sharing import Sharing
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished, failed_read, to_tables
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.results.claims import FOLDER
from deadbench.runners.results.outbox import UnwritableError
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker import run as worker
from deadbench.suite.registry.loading import load_registry
from tests.runners.sleepers import rows, sleeping_jobs

LEASE = 30.0


@pytest.fixture
def clock(monkeypatch):
    """Time passes only where a test says so."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def series(tmp_path):
    """One model of five checkpoints with two reads each, and one of its random initialisation."""
    path = tmp_path / "models.yaml"
    path.write_text(
        "protocols: {standard: {tokens: 128}}\nsuites: {}\nmodels:\n  - {id: a, source: nowhere, parameters: 9, "
        "config: {model_type: gpt_neox, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
        "vocab_size: 97}, input: 'tokens:random', checkpoints: {pattern: 'step{step}', first: 0, last: 4, every: 1}}\n"
    )
    (job,) = build_jobs(load_registry(path), path, ["a"], None, None, Overrides())
    return job


@pytest.fixture
def driver(tmp_path):
    """`driver(name, jobs)`: another one on the same result set; it gives no signs of life but those that tests give."""

    def make(name, jobs, patience=600.0):
        said = []
        store = ResultStore(str(tmp_path / "out"))
        made = Sharing(store, jobs, name, said.append, patience, LEASE, beat=1e6)
        made._claims._clock = lambda: time.monotonic()
        made.__enter__()
        made.said, made.store = said, store
        return made

    return make


def finished(read, run_id, **columns):
    row = {"status": "ok", "depth": 1.0} | columns
    return Finished(read, to_tables({"reads": [row]}, read, run_id, 1, datetime.now(UTC)))


def store(driver, read, run_id, **columns):
    """As the books do."""
    event = finished(read, run_id, **columns)
    if not driver.still_ours(event):
        return False
    driver.store.write(event.tables)
    driver.stored(event)
    return True


def labels(*jobs):
    return [read.label() for job in jobs for read in job.reads]


def elsewhere(driver):
    return [(read.label(), row["status"], row["run_id"]) for read, row in driver.elsewhere()]


def test_alone_a_model_is_taken_whole(driver, series):
    a = driver("a", [series])
    mine, others = a.take(series)
    assert (mine, others.reads) == (series, ())
    assert len(mine.reads) == 11


def test_beside_others_a_fair_part_in_whole_checkpoints(driver, series):
    a, b, c = (driver(name, [series]) for name in "abc")
    parts, left = [], []
    for each in (a, b, c):
        mine, others = each.take(series)
        parts.append({read.revision for read in mine.reads})
        left.append(len(others.reads))
        assert {read.revision for read in others.reads}.isdisjoint(parts[-1])
    assert [len(part) for part in parts] == [2, 2, 1], "of 6, 4 and 2 groups that were free a third each"
    assert sum(map(len, parts)) == len(set().union(*parts)), "none in two"
    assert left[0] == 11 - sum(read.revision in parts[0] for read in series.reads)


def test_one_checkpoint_at_a_time_where_that_is_asked_for(driver, series):
    a = driver("a", [series])
    mine, others = a.take(series, checkpoints=1)
    assert len({read.revision for read in mine.reads}) == 1
    assert labels(mine, others) == labels(series)


def test_what_others_have_stored_is_in_neither_part_and_is_told_once(driver, tmp_path):
    jobs = sleeping_jobs(tmp_path / "jobs", 2)
    a, b = driver("a", jobs), driver("b", jobs)
    a.take(jobs[0])
    assert b.take(jobs[0]) == (jobs[0].without(r.identity() for r in jobs[0].reads), jobs[0])
    for read in jobs[0].reads:
        assert store(a, read, "a")
    mine, others = b.take(jobs[0])
    assert (mine.reads, others.reads) == ((), ())
    assert elsewhere(b) == [("m000 random", "ok", "a"), ("m000 functional", "ok", "a")]
    assert elsewhere(b) == elsewhere(a) == []


def test_a_read_that_failed_is_not_tried_again_by_who_was_there(driver, tmp_path):
    (job,) = sleeping_jobs(tmp_path / "jobs", 1)
    a, b = driver("a", [job]), driver("b", [job])
    a.take(job)
    store(a, job.reads[0], "a", status="failed", depth=None, error="no")
    assert labels(b.take(job)[0]) == []
    a.__exit__(None, None, None)
    assert labels(b.take(job)[0]) == ["m000 functional"]
    c = driver("c", [job])  # comes later, and met b, which had met a
    assert elsewhere(c) == [("m000 random", "failed", "a")]
    assert labels(*c.take(job)) == ["m000 functional"]
    b.__exit__(None, None, None)
    c.__exit__(None, None, None)
    assert labels(driver("d", [job]).take(job)[0]) == labels(job), "the same command, given again, tries it again"


@pytest.fixture
def on(series):
    """`on(engine)`: the random read of the series, as a plan that may choose would run it, or one that was told."""

    def make(engine, *, auto=True, error=None):
        (read,) = [read for read in series.reads if read.read == "random"]
        return replace(series, reads=(replace(read, engine=engine, auto=auto, error=error),))

    return make


@pytest.mark.parametrize("first", ["torch", "streaming"])
def test_a_read_is_done_once_whichever_engines_the_plans_of_two_machines_take(driver, on, first):
    second = {"torch": "streaming", "streaming": "torch"}[first]
    one, other = on(first), on(second)
    a, b = driver("a", [one]), driver("b", [other])
    assert a.take(one) == (one, replace(one, reads=()))
    assert b.take(other) == (replace(other, reads=()), other)
    b.waiting([other])
    assert b.said == [f"waiting for 1 reads that are claimed by {b._claims.describe('a')}"]
    assert store(a, one.reads[0], "a")
    assert b.take(other) == (replace(other, reads=()),) * 2
    assert elsewhere(b) == [("a random", "ok", "a")]
    assert b.elsewhere() == []
    for each in (a, b):
        each.__exit__(None, None, None)
    assert not Path(a.store.location, FOLDER).exists()


@pytest.mark.parametrize(("named", "free"), [("streaming", False), ("torch", False), ("vllm", True)])
def test_an_engine_that_was_named_is_waited_for_where_the_plan_may_take_it(driver, on, named, free):
    told, chosen = on(named, auto=False), on("torch")
    a, b = driver("a", [told]), driver("b", [chosen])
    assert a.take(told)[0] == told
    assert bool(b.take(chosen)[0].reads) == free
    assert store(a, told.reads[0], "a")
    assert bool(b.take(chosen)[0].reads) == free
    assert elsewhere(b) == ([] if free else [("a random", "ok", "a")])


def test_a_named_engine_needs_a_row_of_its_own(driver, on):
    chosen, told = on("torch"), on("streaming", auto=False)
    a, b = driver("a", [chosen]), driver("b", [told])
    a.take(chosen)
    assert b.take(told)[0].reads == ()
    assert store(a, chosen.reads[0], "a")
    assert b.take(told)[0] == told


def test_a_driver_that_stood_still_loses_the_read_to_one_with_another_engine(driver, on, clock, monkeypatch):
    monkeypatch.setattr("deadbench.runners.results.claims.own_facts", lambda: {"host": "far"})
    one, other = on("torch"), on("streaming")
    a, b = driver("a", [one]), driver("b", [other])
    a.take(one)
    b.take(other)
    clock[0] += LEASE + 1
    assert b.take(other)[0] == other
    assert not store(a, one.reads[0], "a")
    assert store(b, other.reads[0], "b")
    assert a.take(a.lost()[0])[0].reads == ()
    assert elsewhere(a) == [("a random", "ok", "b")]


def test_what_one_machine_has_no_room_for_is_read_by_another(driver, on):
    small, large = on("torch", error="needs 9 GB"), on("torch")
    a, b, c = driver("a", [small]), driver("b", [large]), driver("c", [on("streaming", error="needs 8 GB")])
    a.take(small)
    event = failed_read(small.reads[0], "a", 0, "needs 9 GB")
    a.store.write(event.tables)
    a.stored(event)
    assert b.take(large)[0] == large, "it was never tried"
    assert store(b, large.reads[0], "b")
    c.take(on("streaming"))
    assert elsewhere(c) == [("a random", "ok", "b")]
    assert elsewhere(driver("d", [small])) == [("a random", "ok", "b")], "who has no room either"


def test_what_a_dead_driver_had_is_taken_over_and_its_row_is_stored_once(driver, tmp_path, clock, monkeypatch):
    monkeypatch.setattr("deadbench.runners.results.claims.own_facts", lambda: {"host": "far"})  # not this machine
    (job,) = sleeping_jobs(tmp_path / "jobs", 1)
    a, b = driver("a", [job]), driver("b", [job])
    a.take(job)
    assert b.take(job)[0].reads == ()
    b.waiting([job])
    b.waiting([job])
    assert b.said == ["waiting for 2 reads that are claimed by run a on far"]
    clock[0] += LEASE + 1
    assert b.take(job)[0] == job
    for read in job.reads:
        assert store(b, read, "b")
    assert not store(a, job.reads[0], "a"), "it stood still, and is too late"
    assert a.said == ["m000 random: another run has taken it over meanwhile; its row counts"]
    (lost,) = a.lost()
    assert labels(lost) == ["m000 random"]
    assert a.lost() == []
    assert a.take(lost)[0].reads == ()
    assert elsewhere(a) == [("m000 random", "ok", "b"), ("m000 functional", "ok", "b")]
    assert rows(tmp_path / "out")["run_id"].to_list() == ["b", "b"]


def test_a_place_that_refuses_claims_is_asked_again_and_then_given_up(driver, tmp_path, clock, monkeypatch):
    (job,) = sleeping_jobs(tmp_path / "jobs", 1)
    a = driver("a", [job])
    with monkeypatch.context() as patched:
        patched.setattr(
            sharing.Claims, "take", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        assert a.take(job) == (job.without(r.identity() for r in job.reads), job)
        clock[0] += 599
        a.take(job)
        assert a.said == [f"reads cannot be claimed in {tmp_path}/out (No space left on device); tried again"]
        clock[0] += 2
        with pytest.raises(UnwritableError, match="cannot be claimed for 600 s \\(No space left on device\\)"):
            a.take(job)
    assert a.take(job)[0] == job


def test_four_drivers_beside_each_other_read_everything_once(tmp_path, monkeypatch):
    """As threads with real claims; two of them begin when the others are at work, and all end when all is there."""
    monkeypatch.setattr(in_process, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(in_process, "_quiet", contextlib.nullcontext)  # which is of a process
    monkeypatch.setattr(worker, "_quieten", lambda: None)

    def read(job):
        yield from ()
        time.sleep(0.02)
        if job.model.id == "m003":
            raise ValueError("no such norm")
        return {"reads": [{"depth": 3.0, "alignment": 1.0, "family": "layernorm"}]}

    monkeypatch.setattr(worker, "READ_FUNCTIONS", dict.fromkeys(worker.READ_FUNCTIONS, read))
    jobs, out, summaries = sleeping_jobs(tmp_path / "jobs", 6), tmp_path / "out", {}

    def drive(name):
        reporter = Reporter(12)
        monkeypatch.setattr(reporter, "say", lambda text: None)
        store = ResultStore(str(out))
        done = store.finished()
        left = [job for job in (job.without(done) for job in jobs) if job.reads]
        summaries[name] = in_process.execute_in_process(left, store, Settings("none"), reporter, name)
        summaries[name].skipped += len(done)

    with ThreadPoolExecutor(4) as pool:
        futures = []
        for number, name in enumerate("abcd"):
            futures.append(pool.submit(drive, name))
            time.sleep(0.08 * (number == 1))
    for future in futures:
        future.result()
    table = rows(out)
    assert table.height == 12
    assert table.select("model", "read").is_unique().all()
    assert table.filter(status="failed")["model"].to_list() == ["m003"] * 2
    assert len(set(table["run_id"])) >= 2, "the work was divided"
    assert {(s.ok + s.skipped, s.failed) for s in summaries.values()} == {(10, 2)}
    assert not (out / "_claims").exists()


def test_the_loop_without_anything_to_fail_twice(driver, tmp_path):
    """What the preflight could not open is one failed row, of whoever was first."""
    (job,) = sleeping_jobs(tmp_path / "jobs", 1)
    a, b = driver("a", [job]), driver("b", [job])
    mine, _ = a.take(job)
    for read in mine.reads:
        event = failed_read(read, "a", 1, "no such folder")
        assert a.still_ours(event)
        a.store.write(event.tables)
        a.stored(event)
    assert labels(*b.take(job)) == []
