"""The driver's loop without Ray, threads or waiting: actors are generators, and the clock moves when somebody waits."""

import importlib
import time
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
import ray

from deadbench.runners.cluster import actors
from deadbench.runners.cluster.head import LostClusterError
from deadbench.runners.cluster.processes import Ended
from deadbench.runners.driver.loop import Run, Settings
from deadbench.runners.driver.sharing import Sharing
from deadbench.runners.jobs.events import Finished, GroupBrokenError, Progress, Remark, failed_read, to_tables
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.reporting.run_record import RunRecord
from deadbench.runners.results.store import ResultStore
from tests.runners.sleepers import rows, sized, sleeping_jobs

NAMES = {name.encode().hex().ljust(56, "0"): name for name in ("here", "there", "yonder")}
SILENT = object()  # what a stream yields that says nothing any more


def identity(name):
    """Ray's id of the node of that name."""
    return next(each for each, known in NAMES.items() if known == name)


class Stream:
    """What an actor's method returns: its next event is known, or never will be."""

    def __init__(self, generator):
        self.generator, self.next = generator, []

    def peek(self):
        if not self.next:
            try:
                self.next = [next(self.generator)]
            except Exception as error:  # an end is a StopIteration
                self.next = [error]
        return self.next[0]

    def __next__(self):
        if isinstance(self.peek(), StopIteration):
            raise StopIteration
        return Reference(self.next.pop())


class Reference:
    def __init__(self, value):
        self.value = value

    def peek(self):
        return self.value


class Cluster:
    """What the loop sees of Ray: nodes, actors that `body` makes, time. Tests change it while the loop runs."""

    def __init__(self, body, gpus):
        self.body = body
        self.began = self.now = time.monotonic()
        self.gpus = dict(gpus)  # of each node that lives
        self.room = True  # whether actors find any
        self.ended = Ended()
        self.started, self.killed, self.said = [], [], []

    def monotonic(self):
        return self.now

    def elapsed(self):
        return self.now - self.began

    def sleep(self, seconds):
        self.now += seconds
        assert self.elapsed() < 1e5, "the loop has come to no end"

    def nodes(self):
        return [
            {
                "NodeID": identity(name),
                "Alive": True,
                "NodeManagerHostname": name,
                "Resources": {"CPU": 8.0, "GPU": float(gpus)},
            }
            for name, gpus in self.gpus.items()
        ]

    def wait(self, references, num_returns=1, timeout=None, fetch_local=True):
        ready = [each for each in references if each.peek() is not SILENT]
        if not ready and timeout:
            self.sleep(timeout)
        return ready, [each for each in references if each not in ready]

    def get(self, reference, timeout=None):
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def actor_class(self, options):
        node = NAMES.get(getattr(options["scheduling_strategy"], "node_id", None))
        return SimpleNamespace(remote=lambda token: self.actor(node))

    def actor(self, node):
        def run(job, run_id, attempt, place, meeting):
            rank = place[0]
            if rank == 0:
                self.started.append(SimpleNamespace(job=job, attempt=attempt, node=node))
            return Stream(self.body(job, run_id, attempt, rank, len(self.started)))

        home = Reference((identity("here"), 1, 0.0) if self.room else SILENT)
        actor = SimpleNamespace(run=SimpleNamespace(remote=run))
        actor.__ray_call__ = SimpleNamespace(remote=lambda function: home)
        return actor


class Beside:
    """A pool of which everything is done at once."""

    def submit(self, function, *arguments, **options):
        future = Future()
        future.set_result(function(*arguments, **options))
        return future


class Watching(Reporter):
    def __init__(self, cluster):
        super().__init__(0)
        self.cluster, self.retries = cluster, []

    def say(self, text):
        self.cluster.said.append(text)

    def progress(self, model_id, event):
        pass

    def finished(self, event):
        pass

    def retry(self, read, cause, attempt, changed):
        self.retries.append((read.read, cause, attempt, changed))


class Head:
    """The head of the cluster: silent for so many questions."""

    silent = 0

    def check(self):
        pass

    def answers(self):
        self.silent -= 1
        return self.silent < 0


@pytest.fixture
def cluster(monkeypatch):
    """Make a cluster whose actors run `body(job, run_id, attempt, rank, number of this start)`."""

    def make(body, **gpus):
        made = Cluster(body, gpus or {"here": 1})
        context = SimpleNamespace(get_node_id=lambda: identity("here"), gcs_address="")
        monkeypatch.setattr(time, "monotonic", made.monotonic)
        monkeypatch.setattr(time, "sleep", made.sleep)
        for name in ("nodes", "wait", "get"):
            monkeypatch.setattr(ray, name, getattr(made, name))
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(ray, "kill", made.killed.append)
        placement_groups = importlib.import_module("ray.util.placement_group")  # `ray.util` has a function of that name
        monkeypatch.setattr(placement_groups, "placement_group", lambda *arguments, **options: object())
        monkeypatch.setattr(placement_groups, "remove_placement_group", lambda group: None)
        monkeypatch.setattr(actors, "actor_class", made.actor_class)
        monkeypatch.setattr(actors, "_end_on", lambda node, token, known: made.ended)
        return made

    return make


@pytest.fixture
def driver(tmp_path):
    """Make the loop over `jobs`, by default one model of two reads."""

    def make(cluster, jobs=None, head=None, store=None, **settings):
        jobs = jobs or sleeping_jobs(tmp_path / "jobs", 1, [1.0])
        store = store or ResultStore(str(tmp_path / "out"))
        reporter = Watching(cluster)
        record = RunRecord(store, "run", jobs, reporter.say)
        sharing = Sharing(store, jobs, "run", reporter.say, 600.0)
        run = Run(
            jobs, store, sharing, Settings(**settings), reporter, record, head or Head(), Beside(), "run", shared=False
        )
        return run, reporter

    return make


def finished(read, attempt, *, poisoned=False, **columns):
    row = {"status": "ok", "depth": 1.0, "family": "layernorm", "alignment": 1.0} | columns
    return Finished(read, to_tables({"reads": [row]}, read, "run", attempt, datetime.now(UTC)), None, poisoned)


def well(job, run_id, attempt, rank, start):
    """As `run_model` does: progress and a row for every read."""
    for read in job.reads:
        yield Progress(read.label(), "asleep")
        yield finished(read, attempt)
        attempt = 1


def but(trouble, starts=(1,), before="random"):
    """An actor that has `trouble` when it comes to the read `before`, in these of its starts."""

    def body(job, run_id, attempt, rank, start):
        for read in job.reads:
            yield Progress(read.label(), "asleep")
            if start in starts and read.read == before:
                if isinstance(trouble, Exception):
                    raise trouble
                yield trouble(read) if callable(trouble) else trouble
            yield finished(read, attempt)
            attempt = 1

    return body


def outcomes(tmp_path):
    table = rows(tmp_path / "out")
    return sorted(table.select("model", "read", "status", "attempt", "error").rows())


def died(message="Worker exits with an exit code 3. More"):
    error = ray.exceptions.ActorDiedError()
    error.error_msg = message
    return error


def test_every_read_is_one_row_and_every_actor_is_ended(cluster, driver, tmp_path):
    made = cluster(well, here=2)
    run, reporter = driver(made, sleeping_jobs(tmp_path / "jobs", 3, [0.5, 1.0]))
    run.go()
    assert [(status, attempt) for _, _, status, attempt, _ in outcomes(tmp_path)] == [("ok", 1)] * 6
    assert (run.summary.ok, run.summary.failed, len(run.summary.reads)) == (6, 0, 6)
    assert len(made.started) == len(made.killed) == 3
    assert (reporter.retries, made.said) == ([], [])


def test_what_an_actor_died_at_is_tried_again_elsewhere_and_no_other_read(cluster, driver, tmp_path):
    made = cluster(but(died(), before="functional"), here=1, there=1)
    run, reporter = driver(made)
    run.go()
    first, second = made.started
    assert [read.read for read in second.job.reads] == ["functional"], "the read that had its row is not run again"
    assert (first.attempt, second.attempt) == (1, 2)
    assert {first.node, second.node} == {"here", "there"}
    assert outcomes(tmp_path) == [("m000", "functional", "ok", 2, None), ("m000", "random", "ok", 1, None)]
    assert not second.job.reads[0].half_batch
    ((read, cause, attempt, changed),) = reporter.retries
    assert (read, attempt, changed) == ("functional", 2, None)
    assert cause.endswith("it ended with exit code 3")


@pytest.mark.parametrize(
    ("error", "ended"),
    [(ray.exceptions.OutOfMemoryError("x"), Ended()), (died(), Ended(out_of_memory=True))],
)
def test_after_a_death_of_memory_the_read_has_half_the_batch(cluster, driver, tmp_path, error, ended):
    made = cluster(but(error))
    made.ended = ended
    run, reporter = driver(made)
    run.go()
    assert [[read.half_batch for read in start.job.reads] for start in made.started] == [[False, False], [True, False]]
    assert [(status, attempt) for _, _, status, attempt, _ in outcomes(tmp_path)] == [("ok", 1), ("ok", 2)]
    assert reporter.retries[0][2:] == (2, "half the batch")


def test_a_read_that_is_given_up_is_a_failed_row_and_the_next_one_goes_on(cluster, driver, tmp_path):
    made = cluster(but(died(), starts=(1, 2, 3)))
    run, reporter = driver(made, max_retries=2)
    run.go()
    assert [[read.read for read in start.job.reads] for start in made.started[-1:]] == [["functional"]]
    assert [start.attempt for start in made.started] == [1, 2, 3, 1]
    (functional, random) = outcomes(tmp_path)
    assert functional[1:4] == ("functional", "ok", 1)
    assert random[1:4] == ("random", "failed", 3)
    assert "exit code 3" in random[4]
    assert (run.summary.ok, run.summary.failed) == (1, 1)
    assert len(reporter.retries) == 2


def test_an_actor_that_ends_before_its_reads_do_has_died(cluster, driver, tmp_path):
    made = cluster(lambda job, run_id, attempt, rank, start: iter([finished(job.reads[0], attempt)]))
    run, reporter = driver(made, max_retries=1)
    run.go()
    assert [start.job.reads[0].read for start in made.started] == ["random", "functional"]
    assert [row[1:4] for row in outcomes(tmp_path)] == [("functional", "ok", 2), ("random", "ok", 1)]
    assert [retry[:2] for retry in reporter.retries] == [("functional", "the actor ended")]


def ranks(tmp_path, count=2):
    """One model of the torch engine over so many GPUs."""
    (job,) = sleeping_jobs(tmp_path / "jobs", 1, [1.0])
    return [replace(job, tensor_parallel=count)]


def test_ranks_that_are_out_of_step_are_all_begun_anew_and_nothing_is_charged(cluster, driver, tmp_path):
    broken = ray.exceptions.RayTaskError("run", "traceback", GroupBrokenError("rank 0 is elsewhere"))

    def body(job, run_id, attempt, rank, start):
        if rank == 0:
            yield finished(job.reads[0], attempt, **({"status": "failed", "error": "not finite"} if start == 1 else {}))
        if start == 1:
            if rank == 1:
                raise broken
            yield SILENT
        if rank == 0:
            yield from (finished(read, attempt) for read in job.reads[1:])

    made = cluster(body, here=2)
    run, reporter = driver(made, ranks(tmp_path), max_retries=0)
    run.go()
    assert len(made.killed) == 4, "both ranks of both groups"
    assert [read.read for read in made.started[1].job.reads] == ["functional"]
    assert [start.attempt for start in made.started] == [1, 1]
    assert [row[1:] for row in outcomes(tmp_path)] == [
        ("functional", "ok", 1, None), ("random", "failed", 1, "not finite"),
    ]  # fmt: skip
    assert reporter.retries == []


def test_what_one_rank_died_of_is_told_with_its_number(cluster, driver, tmp_path):
    def body(job, run_id, attempt, rank, start):
        yield Progress(job.reads[0].label(), "asleep")
        if rank == 1:
            raise died()
        yield SILENT

    run, _ = driver(cluster(body, here=2), ranks(tmp_path), max_retries=0)
    run.go()
    assert {error for *_, error in outcomes(tmp_path)} == {
        "rank 1 of 2: the process of this model died: it ended with exit code 3"
    }


def test_another_rank_may_end_before_the_first_does(cluster, driver, tmp_path):
    def body(job, run_id, attempt, rank, start):
        yield Remark(job.reads[0].label(), "here")
        if rank == 0:
            yield from well(job, run_id, attempt, rank, start)

    made = cluster(body, here=2)
    run, _ = driver(made, ranks(tmp_path))
    run.go()
    assert len(made.started) == 1
    assert {status for _, _, status, _, _ in outcomes(tmp_path)} == {"ok"}
    assert [text.partition(": ")[0] for text in made.said] == ["rank 0 of 2", "rank 1 of 2"]


def test_silence_beyond_the_timeout_ends_a_model(cluster, driver, tmp_path):
    made = cluster(but(SILENT, starts=(1, 2)))
    run, reporter = driver(made, timeout=50.0, max_retries=1)
    run.go()
    assert 2 * 50 < made.elapsed() < 2 * 50 + 10, "and no earlier"
    functional, random = outcomes(tmp_path)
    assert random[1:] == ("random", "failed", 2, "no progress for 50 s (--timeout)")
    assert functional[1:4] == ("functional", "ok", 1)
    assert len(reporter.retries) == 1


def test_an_event_a_little_before_the_timeout_is_progress(cluster, driver, tmp_path):
    def body(job, run_id, attempt, rank, start):
        for read in job.reads:
            yield Progress(read.label(), "asleep")
            made.sleep(49.0)
            yield finished(read, attempt)

    made = cluster(body)
    run, _ = driver(made, timeout=50.0)
    run.go()
    assert len(made.started) == 1


def test_an_actor_that_finds_no_room_is_not_silent_but_taken_back(cluster, driver, tmp_path):
    def body(job, run_id, attempt, rank, start):
        if start == 1:
            made.room = True
            yield SILENT
        yield from well(job, run_id, attempt, rank, start)

    made = cluster(body)
    made.room = False
    run, reporter = driver(made, timeout=5.0, max_retries=0)
    run.go()
    assert made.elapsed() > 600
    assert [row[1:4] for row in outcomes(tmp_path)] == [("functional", "ok", 1), ("random", "ok", 1)]
    assert reporter.retries[0][1:3] == ("its place was taken by others", 1)


def test_a_process_whose_gpu_is_poisoned_is_replaced_and_its_row_not_taken(cluster, driver, tmp_path):
    poisoned = "RuntimeError: CUDA error: an illegal memory access was encountered"
    made = cluster(but(lambda read: finished(read, 1, status="failed", error=poisoned, poisoned=True)))
    run, _ = driver(made)
    run.go()
    assert [row[1:] for row in outcomes(tmp_path)] == [("functional", "ok", 1, None), ("random", "ok", 2, None)]


def test_a_read_that_failed_of_itself_is_its_row_and_is_not_tried_again(cluster, driver, tmp_path):
    made = cluster(lambda job, *rest: iter([finished(read, 1, status="failed", error="no") for read in job.reads]))
    run, _ = driver(made)
    run.go()
    assert len(made.started) == 1
    assert (run.summary.ok, run.summary.failed) == (0, 2)


def test_what_could_not_be_opened_is_a_failed_row_without_an_actor(cluster, driver, tmp_path):
    (job,) = sleeping_jobs(tmp_path / "jobs", 1, [1.0])
    job = replace(job, reads=tuple(replace(read, error="no such folder") for read in job.reads))
    made = cluster(well)
    run, _ = driver(made, [job])
    run.go()
    assert made.started == []
    assert {row[2:] for row in outcomes(tmp_path)} == {("failed", 0, "no such folder")}


def test_what_has_no_room_asks_for_none_when_another_had_taken_it_over_meanwhile(
    cluster, driver, tmp_path, monkeypatch
):
    (job,) = sleeping_jobs(tmp_path / "jobs", 1, [1.0])
    job = replace(job, reads=tuple(replace(read, error="needs 9 GB") for read in job.reads))
    made = cluster(well)
    run, _ = driver(made, [job])
    lost = [[job], []]
    monkeypatch.setattr(run._sharing, "lost", lambda: lost.pop(0) if lost else [])
    run.go()
    assert made.started == []
    assert {row[2:] for row in outcomes(tmp_path)} == {("failed", 0, "needs 9 GB")}


def test_nothing_is_started_while_the_head_does_not_answer(cluster, driver, tmp_path):
    made, head = cluster(well), Head()
    head.silent = 40
    run, _ = driver(made, head=head)
    run.go()
    assert head.silent < 0 < made.elapsed()
    assert run.summary.ok == 2


def test_a_lost_node_is_no_fault_of_the_read(cluster, driver, tmp_path):
    def body(job, run_id, attempt, rank, start):
        if start == 1:
            lost = made.started[-1].node
            del made.gpus[lost]
            made.gpus["here"] = made.gpus.get("here", 1)  # the driver's own stays
            yield SILENT
        yield from well(job, run_id, attempt, rank, start)

    made = cluster(body, here=0, there=1, yonder=1)
    run, reporter = driver(made, max_retries=0)
    run.go()
    first, second = made.started
    assert first.node != second.node
    assert second.attempt == 2
    assert {status for _, _, status, _, _ in outcomes(tmp_path)} == {"ok"}
    assert reporter.retries[0][1] == "its node was lost"


def test_a_model_that_no_node_can_hold_any_more_fails_after_a_while(cluster, driver, tmp_path):
    def body(job, run_id, attempt, rank, start):
        if job.model_id == "m000":
            made.gpus.pop("there")
            yield SILENT
        yield from well(job, run_id, attempt, rank, start)

    made = cluster(body, here=1, there=2)
    (job,) = sleeping_jobs(tmp_path / "jobs", 1, [2.0])
    run, _ = driver(made, [job])
    run.go()
    assert made.elapsed() > 60
    assert {(status, error) for _, _, status, _, error in outcomes(tmp_path)} == {
        ("failed", "needs 2 devices, and no node that is left has them")
    }
    assert len(made.started) == 1


def test_a_node_that_comes_back_in_time_gives_hope(cluster, driver, tmp_path):
    def body(job, run_id, attempt, rank, start):
        if start == 1:
            made.gpus.pop("there")
            yield SILENT
        yield from well(job, run_id, attempt, rank, start)

    class Returning(Head):
        def check(self):
            if made.elapsed() > 30 and "there" not in made.gpus:
                made.gpus["there"] = 2

    made = cluster(body, here=1, there=2)
    run, _ = driver(made, [sized(*sleeping_jobs(tmp_path / "jobs", 1, [1.0]), 2.0)], head=Returning())
    run.go()
    assert {status for _, _, status, _, _ in outcomes(tmp_path)} == {"ok"}


def test_an_interrupt_keeps_what_finished_and_ends_what_runs(cluster, driver, tmp_path):
    made = cluster(but(SILENT, starts=(1, 2), before="functional"), here=2)
    wait = made.wait

    def interrupted(references, **options):
        if made.elapsed() > 5:
            raise KeyboardInterrupt
        return wait(references, **options)

    run, _ = driver(made, sleeping_jobs(tmp_path / "jobs", 2, [1.0]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.go()
    run.stop(lost=False)
    assert [row[:3] for row in outcomes(tmp_path)] == [("m000", "random", "ok"), ("m001", "random", "ok")]
    assert len(made.killed) == 2


class Refusing(ResultStore):
    """A store on a disk that is full until it is told otherwise."""

    full = True

    def write(self, tables, stamp=None):
        if self.full:
            raise OSError(28, "No space left on device")
        super().write(tables, stamp)


def test_with_a_lost_cluster_what_finished_is_written_and_ray_is_not_asked(cluster, driver, tmp_path, monkeypatch):
    class Lost(Head):
        def check(self):
            if made.elapsed() > 5:
                raise LostClusterError("the head answers no more")

    made, store = cluster(but(SILENT, before="functional")), Refusing(str(tmp_path / "out"))
    run, _ = driver(made, head=Lost(), store=store)
    with pytest.raises(LostClusterError):
        run.go()
    assert "cannot be written" in made.said[0]
    store.full = False
    monkeypatch.setattr(ray, "kill", None)
    monkeypatch.setattr(ray, "wait", None)
    run.stop(lost=True)
    assert [row[1:3] for row in outcomes(tmp_path)] == [("random", "ok")]
    assert run.summary.ok == 1


def test_what_another_run_has_claimed_is_waited_for_and_then_counted(cluster, driver, tmp_path):
    """The other has one model of two; it stores one read of it and lets go of the second."""
    jobs = sleeping_jobs(tmp_path / "jobs", 2, [1.0])
    other = Sharing(ResultStore(str(tmp_path / "out")), jobs, "other", print, 600.0)
    made = cluster(well, here=2)
    with other:
        theirs, _ = other.take(jobs[0])
        run, _ = driver(made, jobs)
        sleep = made.sleep

        def meanwhile(seconds):
            sleep(seconds)
            if made.elapsed() > 20 and not stored:
                stored.append(failed_read(theirs.reads[0], "other", 1, "no"))
                ResultStore(str(tmp_path / "out")).write(stored[0].tables)
                other.__exit__(None, None, None)

        stored = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(made, "sleep", meanwhile)
            patched.setattr(time, "sleep", meanwhile)
            run.go()
    assert [[read.label() for read in start.job.reads] for start in made.started] == [
        ["m001 random", "m001 functional"],
        ["m000 functional"],
    ]
    assert (run.summary.ok, run.summary.failed, run.summary.skipped) == (3, 1, 0)
    assert made.elapsed() > 20
    assert sorted(row[:3] for row in outcomes(tmp_path)) == [
        ("m000", "functional", "ok"), ("m000", "random", "failed"),
        ("m001", "functional", "ok"), ("m001", "random", "ok"),
    ]  # fmt: skip


def test_processes_that_would_not_end_are_named(cluster, driver, tmp_path):
    made = cluster(well)
    made.ended = Ended(survivors=("process 17",))
    run, _ = driver(made)
    run.go()
    assert made.said == ["m000: process 17 would not end; its memory is not free"]
