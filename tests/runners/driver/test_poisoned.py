"""A process whose GPU is lost says so itself; the driver starts another, and stores no row that it could not help."""

from types import SimpleNamespace

import pytest

from deadbench.runners.cluster.faults import Attempts
from deadbench.runners.driver.loop import Run
from deadbench.runners.engines.device import WrongDeviceError
from deadbench.runners.jobs.events import Finished, RankMemoryError
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
        (RuntimeError("HIP error: invalid device ordinal"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnDsyevd`"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RankMemoryError("out of memory on H200 in one of 8 ranks"), True),
        (WrongDeviceError("Ray gave this process 1 GPUs and torch has 0: a CPU build"), True),
        (ValueError("no such file"), False),
    ],
)
def test_the_worker_says_whether_its_gpu_is_lost(error, poisoned, job, monkeypatch):
    events = finished(job, error, monkeypatch)
    assert [event.poisoned for event in events] == [poisoned] * len(job.reads)
    assert {event.row["status"] for event in events} == {"failed"}


def test_a_rank_without_memory_is_a_death_that_halves_the_batch(job, monkeypatch):
    event = finished(job, RankMemoryError("out of memory on H200 in one of 8 ranks"), monkeypatch)[0]
    stream, ended = iter([event]), []
    run = object.__new__(Run)
    run._ray = SimpleNamespace(get=lambda event: event, exceptions=SimpleNamespace(RayError=KeyError))
    monkeypatch.setattr(run, "_end", lambda group, death: ended.append(death))
    run._take_event(stream, SimpleNamespace(streams=[stream], job=job, done=[]))
    left, given_up = Attempts(max_retries=1).after(ended[0], job)
    assert (given_up, left.reads[0].half_batch) == (None, True)


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
