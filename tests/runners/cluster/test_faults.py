"""Causes of death in words, and what another attempt changes; no process has to die for it."""

import pytest
import ray

from deadbench.runners.cluster.faults import Attempts, Death, death_of
from deadbench.runners.cluster.processes import Ended, _read_box
from deadbench.runners.jobs.events import GroupBrokenError
from tests.runners.sleepers import sleeping_jobs


@pytest.fixture
def job(tmp_path):
    (job,) = sleeping_jobs(tmp_path, 1)
    return job


def died(message, **how):
    """Ray's own error, with what it would say."""
    error = ray.exceptions.ActorDiedError()
    error.error_msg = message
    vars(error).update(how)
    return error


# As Ray 2.60 has it: the import's own traceback inside that of the actor that stands in for what cannot be imported.
UNIMPORTED = """The actor died because of an error raised in its creation task, ray::ModelActor.__init__() (pid=1)
RuntimeError: The actor with name ModelActor failed to import on the worker. its node has died

ray::ModelActor.__init__() (pid=1)
  File "cloudpickle.py", line 469, in subimport
    __import__(name)
ModuleNotFoundError: No module named 'deadbench'"""


def failed_task(cause):
    """Ray's own error of a task that raised `cause`, as `ray.get` raises it."""
    return ray.exceptions.RayTaskError("run", "Traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ray.exceptions.OutOfMemoryError("x"), "memory", "the machine ran out of memory"),
        (failed_task(GroupBrokenError("rank 1 of 2 failed alone")), "broken", "the ranks are out of step"),
        (
            failed_task(ValueError("GroupBrokenError\nonly in words")),
            "crash",
            "the worker failed: GroupBrokenError only",
        ),
        (ray.exceptions.NodeDiedError("x"), "node", "its node was lost"),
        (ray.exceptions.ActorUnavailableError("Socket closed", bytes(16)), "node", "its node was lost"),
        (ray.exceptions.ActorUnschedulableError("no such node"), "unplaced", "before it began"),
        (
            died(UNIMPORTED, _actor_init_failed=True),
            "crash",
            "its process could not begin: ModuleNotFoundError: No module named 'deadbench'",
        ),
        (died("The actor died because its node has died. Node Id: 1"), "node", "its node was lost"),
        (died("its node has died. The actor never ran - it was cancelled"), "unplaced", "before it began"),
        (died("Worker exits with an exit code 3. More"), "crash", "it ended with exit code 3"),
        (died("connection error code 2. End of file"), "crash", "killed, or crashed"),
    ],
)
def test_what_ray_says_in_one_line(error, kind, words):
    death = death_of(ray, error)
    assert death.kind == kind
    assert words in death.cause
    assert "\n" not in death.cause


def test_what_no_rule_knows_is_told_by_its_kind_and_in_short():
    assert death_of(ray, ray.exceptions.RayError("a\n  b")) == Death("crash", "RayError: a b")
    failed = death_of(ray, ray.exceptions.RayTaskError("run", "traceback", ValueError("c\nd")))
    assert failed == Death("crash", "the worker failed: c d")
    for error, told in (
        (ray.exceptions.RayError("x" * 400), "RayError: "),
        (ray.exceptions.RayTaskError("run", "traceback", ValueError("x" * 400)), "the worker failed: "),
    ):
        beginning, _, end = death_of(ray, error).cause.partition(" … ")
        assert (beginning.rstrip("x"), end.strip("x")) == (told, "")
        assert 280 < len(beginning + end) < 300 + len(told)


def test_a_node_that_was_taken_away_is_a_lost_one():
    preempted = ray.exceptions.RayError("no more is known")
    preempted.preempted = True
    assert death_of(ray, preempted).kind == "node"


def test_what_was_found_where_it_died_is_told():
    crash = Death("crash", "the process of this model died: killed, or crashed")
    assert crash.explained(Ended(signal="segmentation fault")).cause.endswith("(segmentation fault)")
    killed = crash.explained(Ended(out_of_memory=True))
    assert (killed.kind, killed.cause[-34:]) == ("memory", "(the kernel's out-of-memory killer)"[-34:])
    assert crash.explained(Ended()) == crash
    assert crash.explained(Ended(last_line="a warning")) == crash
    untold = death_of(ray, died("connection error code 2. End of file")).explained(Ended(last_line="libmkl is missing"))
    assert untold.cause.endswith("killed, or crashed; the last line that it wrote: libmkl is missing")
    assert Death("node", "x").explained(Ended(signal="aborted")) == Death("node", "x")


def test_the_black_box_is_read_for_a_signal_and_for_the_kernels_killer(monkeypatch):
    monkeypatch.setattr("deadbench.runners.cluster.processes._oom_kills", lambda: 4)
    assert _read_box("oom kills before: 4\n") == (None, False, None)
    assert _read_box("oom kills before: 3\n") == (None, True, None)
    assert _read_box("oom kills before: None\n") == (None, False, None)
    dump = "oom kills before: 4\nFatal Python error: Segmentation fault\n\nCurrent thread"
    assert _read_box(dump) == ("segmentation fault", False, None)


def test_the_read_that_it_was_at_is_charged_and_the_others_go_on(job):
    attempts = Attempts(max_retries=1)
    first, second = job.reads
    again, given_up = attempts.after(Death("crash", "x"), job)
    assert (again.reads, given_up, attempts.number(first), attempts.number(second)) == (job.reads, None, 2, 1)
    again, given_up = attempts.after(Death("silence", "x"), again)
    assert (again.reads, given_up) == ((second,), first)
    assert attempts.number(second) == 1


def test_after_want_of_memory_the_next_attempt_takes_half_the_batch(job):
    again, _ = Attempts(max_retries=1).after(Death("memory", "x"), job)
    assert [read.half_batch for read in again.reads] == [True, False]
    assert again.reads[0].identity() == job.reads[0].identity(), "it is the same read"


def test_a_lost_node_uses_up_no_retry_but_there_is_an_end(job):
    attempts = Attempts(max_retries=0)
    for number in range(2, 7):
        again, given_up = attempts.after(Death("node", "x"), job)
        assert (again, given_up, attempts.number(job.reads[0])) == (job, None, number)
    assert attempts.after(Death("node", "x"), job)[1] == job.reads[0]


def test_what_never_began_is_no_attempt(job):
    attempts = Attempts(max_retries=0)
    assert attempts.after(Death("unplaced", "x"), job) == (job, None)
    assert attempts.after(Death("broken", "x"), job) == (job, None)
    assert attempts.number(job.reads[0]) == 1


def test_crash_memory_and_silence_use_up_the_same_retries_and_nodes_do_not(job):
    attempts, left = Attempts(max_retries=3), job
    for number, kind in enumerate(("crash", "node", "memory", "silence"), 2):
        left, given_up = attempts.after(Death(kind, "x"), left)
        assert given_up is None
        assert attempts.number(job.reads[0]) == number
    assert left.reads[0].half_batch, "and it stays so"
    left, given_up = attempts.after(Death("crash", "x"), left)
    assert given_up.identity() == job.reads[0].identity()
    assert left.reads == job.reads[1:]


def test_a_place_that_others_take_again_and_again_is_given_up(job):
    attempts = Attempts(max_retries=0)
    for _ in range(20):
        assert attempts.after(Death("unplaced", "x"), job) == (job, None)
    again, given_up = attempts.after(Death("unplaced", "x"), job)
    assert (again.reads, given_up) == (job.reads[1:], job.reads[0])
    assert attempts.number(job.reads[0]) == 1


def test_the_last_line_of_a_log_is_the_processs_own(tmp_path):
    log = tmp_path / "worker 1.err"
    log.write_text("of the process before\n")
    box = f"oom kills before: None\nstderr: {log} from {log.stat().st_size}\n"
    assert _read_box(box)[2] is None
    with log.open("a") as file:
        file.write(":actor_name:ModelActor\na warning\nMKL FATAL: cannot load libmkl.so\n\n")
        file.write(
            "[2026-11-28 23:25:17,603 E 6366 6366] logging.cc:474: *** SIGTERM\n    @     0x7f4f8305a050  (unknown)\n"
        )
    assert _read_box(box)[2] == "MKL FATAL: cannot load libmkl.so"
    log.unlink()
    assert _read_box(box)[2] is None
    assert _read_box("oom kills before: None\nstderr: \n")[2] is None
