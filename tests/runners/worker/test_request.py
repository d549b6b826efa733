"""Weights are drawn or stored; what is stored has a folder."""

import pytest

from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.jobs.resolved import Configuration
from deadbench.runners.worker.forward import read_forward
from deadbench.runners.worker.functional import read_functional
from deadbench.runners.worker.request import RandomWeights, StoredWeights
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, TINY_NEOX, save_tiny


@pytest.mark.parametrize(("folder", "error"), [(None, TypeError), ("gone", ValueError)])
def test_stored_weights_without_a_folder_are_refused(folder, error, tmp_path):
    with pytest.raises(error):
        StoredWeights(folder and tmp_path / folder, {})


@pytest.mark.parametrize("engine", ["torch", "streaming"])
def test_weights_that_are_gone_are_never_replaced_by_random_ones(engine, tmp_path):
    folder = save_tiny(tmp_path / "m")
    spec = Overrides(input="tokens:random", engine=engine)
    (job,) = build_jobs(
        load_registry(ROOT / "models.yaml"), ROOT / "models.yaml", [str(folder)], None, ["trained"], spec
    )
    weights = StoredWeights(folder, {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        list(read_forward(job.reads[0], Configuration(TINY_NEOX), weights))


def test_a_functional_read_of_weights_that_are_gone_fails_too(tmp_path):
    folder = save_tiny(tmp_path / "m")
    spec = Overrides(input="tokens:random", tokens=32)
    jobs = build_jobs(
        load_registry(ROOT / "models.yaml"), ROOT / "models.yaml", [str(folder)], None, ["functional"], spec
    )
    weights = StoredWeights(folder, {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        list(read_functional(jobs[0].reads[0], Configuration(TINY_NEOX), weights))
    *_, rows = drained(read_functional(jobs[0].reads[0], Configuration(TINY_NEOX), RandomWeights(0)))
    assert {row["weights"] for row in rows["functional"]} == {"random"}


def drained(reading):
    """What a read yields, and what it returns, last."""
    events = []
    while True:
        try:
            events.append(next(reading))
        except StopIteration as stop:
            return [*events, stop.value]
