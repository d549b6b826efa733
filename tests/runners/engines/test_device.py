"""What a process makes of its device, with torch's words for one that is not there."""

import gc
import weakref

import pytest
import torch

from deadbench.runners.engines import device
from deadbench.runners.engines.device import WrongDeviceError, cause_of, check_assigned, free_bytes, settle
from deadbench.runners.jobs.events import Finished
from deadbench.runners.worker import run as worker
from tests.runners.sleepers import sleeping_jobs


@pytest.mark.parametrize(
    ("assigned", "found", "cuda", "told"),
    [
        (1, 0, None, r"Ray gave this process 1 GPUs and torch has 0: torch \S+ is a CPU build; install torch for"),
        (8, 0, "13.0", "the driver is too old for torch's CUDA 13.0, or not there; update it"),
        (1, 8, "13.0", "CUDA_VISIBLE_DEVICES is not set for it; unset RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus_that_torch_does_not_have_are_one_line_and_not_the_cpu(monkeypatch, assigned, found, cuda, told):
    monkeypatch.setattr(device, "usable_gpus", lambda: found)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(device, "assigned_gpus", lambda: assigned)
    with pytest.raises(WrongDeviceError, match=told) as raised:
        device.pick_device()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("assigned", "found"), [(None, 0), (None, 8), (0, 0), (1, 1), (8, 8)])
def test_those_that_were_assigned_are_taken(monkeypatch, assigned, found):
    monkeypatch.setattr(device, "usable_gpus", lambda: found)
    check_assigned(assigned)


def test_gpus_of_a_driver_that_is_too_old_are_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # NVML's, which needs no CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WrongDeviceError, match="Ray gave this process 8 GPUs and torch has 0"):
        check_assigned(8)


def test_outside_rays_workers_nothing_was_assigned():
    assert device.assigned_gpus() is None


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("CUDA error: out of memory"), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), "memory"),
        (ValueError("rank 1: OutOfMemoryError: CUDA out of memory"), "memory"),
        (RuntimeError("HIP error: an illegal memory access"), "device"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"), "device"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device"),
        (ValueError("no such file"), None),
    ],
)
def test_the_cause_of_an_error_is_told_by_type_or_by_the_libraries_words(error, cause):
    assert cause_of(error) == cause


def test_torchs_own_cache_is_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_bytes(torch.device("cuda")) == 60


def test_no_worker_rounds_to_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert device.rounds_to_tf32(), "as torch has it by default, for convolutions"
    settle()
    assert not device.rounds_to_tf32()


def test_a_model_of_one_read_is_gone_before_the_next(tmp_path, monkeypatch):
    (job,) = sleeping_jobs(tmp_path, 1)
    alive, models = [], []

    def read(each):
        alive.append([model() is not None for model in models])
        model = torch.nn.Linear(2, 2)
        model.closure = lambda: model  # as transformers' hooks hold on to the module
        models.append(weakref.ref(model))
        return {"reads": [{}]}
        yield

    monkeypatch.setattr(worker, "READ_FUNCTIONS", dict.fromkeys(worker.READ_FUNCTIONS, read))
    gc.disable()
    try:
        finished = [event for event in worker.run_model(job, "run", 1) if isinstance(event, Finished)]
    finally:
        gc.enable()
    assert [event.row["status"] for event in finished] == ["ok", "ok"]
    assert alive == [[], [False]]
