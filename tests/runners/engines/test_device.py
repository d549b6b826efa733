"""What a process makes of its device, with torch's words for one that is not there."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from deadbench.runners.engines import device
from deadbench.runners.engines.base import BATCH_TOKENS, batches_in_one
from deadbench.runners.engines.device import Moment, WrongDeviceError, cause_of, check_assigned, free_bytes, settle
from deadbench.runners.jobs.events import Finished
from deadbench.runners.worker import forward
from deadbench.runners.worker import run as worker
from deadbench.suite.ranks import Ranks
from tests.fake_gpu import GPU, fake_gpu
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


def test_a_process_that_has_a_part_of_a_gpu_takes_no_more_of_its_memory(monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    settle(0.25)
    settle()
    assert shares == [0.25]


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


def test_the_peak_of_a_read_is_its_own(tmp_path, monkeypatch):
    (job,) = sleeping_jobs(tmp_path, 1)
    used, peaks = [5, 3], [0]

    def read(each):
        peaks[-1] = max(peaks[-1], used.pop(0))
        return {"reads": [{"peak_device_bytes": peaks[-1]}]}
        yield

    cuda = SimpleNamespace(
        device_count=lambda: 0,
        set_per_process_memory_fraction=lambda share: None,
        is_available=lambda: True,
        is_initialized=lambda: True,
        empty_cache=lambda: None,
        reset_peak_memory_stats=lambda: peaks.append(0),
    )
    monkeypatch.setattr(device, "torch", SimpleNamespace(**vars(torch) | {"cuda": cuda}))
    monkeypatch.setattr(worker, "READ_FUNCTIONS", dict.fromkeys(worker.READ_FUNCTIONS, read))
    finished = [event for event in worker.run_model(job, "run", 1) if isinstance(event, Finished)]
    assert [event.row["peak_device_bytes"] for event in finished] == [5, 3], [event.row["error"] for event in finished]


@pytest.mark.parametrize(
    ("on_device", "parameters", "free", "wanted", "expected"),
    [
        (True, 1e9, 2**36, 10**6, 16384),
        (True, 6.9e9, 2**36, 10**6, 16384),
        (True, 7e9, 2**36, 10**6, 4096),
        (True, 1e9, 2**33, 10**6, 8192),  # of memory for less
        (True, 1e9, 2**30, 10**6, 4096),
        (True, 1e9, 2**36, 12288, 8192),  # of a read that is no longer
        (False, 1e9, 2**36, 10**6, 4096),
    ],
)
def test_small_models_pass_more_tokens_at_once_where_a_device_has_the_memory(
    on_device, parameters, free, wanted, expected
):
    assert BATCH_TOKENS * batches_in_one(on_device, parameters, 2**17, free, wanted) == expected


@pytest.mark.parametrize(
    ("place", "others", "expected"), [(GPU, None, 16384), (GPU, 2, 8192), (torch.device("cpu"), None, 4096)]
)
def test_the_batches_of_ranks_are_of_one_size(place, others, expected, monkeypatch):
    monkeypatch.setattr(forward, "free_bytes", lambda device: 2**37)
    ranks = Ranks(0, 2, lambda mine: [mine, (None, others)]) if others else Ranks()
    read = SimpleNamespace(protocol=SimpleNamespace(tap_stride=1))
    final = SimpleNamespace(hidden_size=2048, num_blocks=16)
    engine = SimpleNamespace(device=place, ranks=ranks)
    assert forward._per_batch(engine, read, torch.nn.Linear(2, 2), 10**9, final, 10**6) == expected


def test_a_moment_of_a_device_is_waited_for_by_who_asks_for_seconds(monkeypatch):
    with fake_gpu(monkeypatch) as gpu, gpu.counting() as counted:
        x = torch.ones(3).to(GPU)
        begun = Moment.on(GPU)
        (x + 1) * 2
        ended = Moment.on(GPU)
        assert not ended.has_come()
        assert counted.syncs == []
        assert begun.seconds_to(ended) == pytest.approx(0.002)
        assert ended.has_come()
        assert len(counted.syncs) == 1


def test_a_moment_of_the_cpu_is_now():
    begun = Moment.on(torch.device("cpu"))
    assert begun.has_come()
    assert 0 <= begun.seconds_to(Moment.on(torch.device("cpu"))) < 10
