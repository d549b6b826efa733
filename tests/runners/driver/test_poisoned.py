"""A process whose GPU is lost says so itself; the driver starts another, and stores no row that it could not help."""

from types import SimpleNamespace

import pytest

from deadbench.runners.driver.loop import Run
from deadbench.runners.jobs.events import Finished
from deadbench.runners.worker import run as worker
from tests.runners.sleepers import sleeping_jobs


@pytest.fixture
def job(tmp_path):
    (job,) = sleeping_jobs(tmp_path, 1)
    return job


def finished(job, error, monkeypatch):
    def fail(read):
        raise error
        yield

    monkeypatch.setattr(worker, "READ_FUNCTIONS", dict.fromkeys(worker.READ_FUNCTIONS, fail))
    return [event for event in worker.run_model(job, "run", 1) if isinstance(event, Finished)]


@pytest.mark.parametrize(
    ("error", "poisoned"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (ValueError("rank 1: RuntimeError: NCCL error in: x"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (ValueError("no such file"), False),
    ],
)
def test_the_worker_says_whether_its_gpu_is_lost(error, poisoned, job, monkeypatch):
    events = finished(job, error, monkeypatch)
    assert [event.poisoned for event in events] == [poisoned] * len(job.reads)
    assert {event.row["status"] for event in events} == {"failed"}


@pytest.mark.parametrize("lost", [True, False])
def test_the_driver_ends_a_process_whose_gpu_is_lost_and_stores_any_other_failure(lost, job, monkeypatch):
    event = finished(job, RuntimeError("CUDA error: x" if lost else "no room"), monkeypatch)[0]
    stream = iter([event])
    group = SimpleNamespace(streams=[stream], job=job, done=[])
    ended, put = [], []
    run = object.__new__(Run)
    run._ray = SimpleNamespace(get=lambda event: event, exceptions=SimpleNamespace(RayError=KeyError))
    run._books = SimpleNamespace(put=put.append)
    monkeypatch.setattr(run, "_end", lambda group, death: ended.append((death.kind, death.cause)))
    run._take_event(stream, group)
    assert ended == ([("crash", "RuntimeError: CUDA error: x")] if lost else [])
    assert put == ([] if lost else [event])
