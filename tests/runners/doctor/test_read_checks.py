"""Reads that the doctor tries: memory that is more than was planned, and state-space models that come out otherwise."""

from types import SimpleNamespace

import pytest
import torch

from deadbench.runners.doctor import planned_memory as memory
from deadbench.runners.doctor import small_models
from deadbench.runners.doctor.node_checks import UnwellError
from deadbench.runners.doctor.planned_memory import planned_memory
from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.planning.hardware import parse_cluster
from deadbench.runners.worker import run as worker

HELD = 400_000_000


@pytest.fixture
def read(monkeypatch):
    """`read(host, gpu)`: what the check says of a read at whose end the system and torch count such peaks, in bytes."""

    def peaks(host, gpu=None, held=HELD):
        cuda = SimpleNamespace(max_memory_allocated=lambda device: gpu)
        place = torch.device("cpu" if gpu is None else "cuda")
        monkeypatch.setattr("deadbench.runners.engines.resident.torch", SimpleNamespace(cuda=cuda))
        monkeypatch.setattr(memory, "this_machine", lambda most_gpus: parse_cluster("1x141GB" if gpu else "0x64GB"))
        monkeypatch.setattr(memory, "_begin_peak", lambda: held)
        monkeypatch.setattr(memory, "peak_host_bytes", lambda: HELD + host)

        def random(each):
            return {"reads": [{"peak_device_bytes": TorchEngine.peak_device_bytes(SimpleNamespace(device=place))}]}
            yield

        monkeypatch.setitem(worker.READ_FUNCTIONS, "random", random)
        return planned_memory()

    return peaks


def test_peaks_within_the_plans_are_told_beside_them(read):
    assert read(150_000_000) == "150 of 166 MB planned of host memory, beside 0.40 GB that the process held"
    told = read(120_000_000, 150_000_000)
    assert told == (
        "120 of 136 MB planned of host memory, 150 of 166 MB planned of the GPU's, beside 0.40 GB that the process held"
    )


@pytest.mark.parametrize(
    ("host", "gpu", "said"),
    [
        (250_000_000, None, "^a read took 250 of 166 MB planned of host memory; plans are too low here"),
        (120_000_000, 400_000_000, "^a read took 400 of 166 MB planned of the GPU's; plans are too low here"),
    ],
)
def test_a_peak_beyond_the_plan_is_wrong(read, host, gpu, said):
    with pytest.raises(UnwellError, match=said):
        read(host, gpu)


def test_where_no_process_is_told_its_peak_the_gpus_alone_is_compared(read, monkeypatch):
    def refuse(*_, **__):
        raise OSError("Read-only file system")

    begin = memory._begin_peak
    monkeypatch.setattr(memory, "Path", lambda name: SimpleNamespace(write_text=refuse))
    assert begin() is None
    assert read(0, 150_000_000, held=None) == "150 of 166 MB planned of the GPU's"
    assert read(0, held=None) == "this system tells no process its peak"


@pytest.mark.parametrize("change", [{"lambda_min": 0.4}, {"status": "failed", "error": "no kernel"}])
@pytest.mark.parametrize("of", [("mamba", "torch"), ("granitemoehybrid", "streaming")])
def test_a_state_space_model_that_reads_otherwise_is_wrong_and_named(monkeypatch, change, of):
    known = {config["model_type"]: numbers for config, numbers in small_models._STATE_SPACES.values()}

    def row(config, engine):
        well = {"status": "ok"} | known[config["model_type"]]
        return well | (change if (config["model_type"], engine) == of else {})

    monkeypatch.setattr(small_models, "small_row", row)
    name = "a small Mamba" if of[0] == "mamba" else "a small hybrid of Mamba and attention"
    with pytest.raises(UnwellError, match=f"^{name} by --engine {of[1]}: (no kernel|lambda_min is 0.4)"):
        small_models.state_spaces()
