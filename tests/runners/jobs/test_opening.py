"""A name is settled once, where the command is given; a worker in another folder opens that and nothing else."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from deadbench.runners.census.worker import census_row
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished, Remark
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.jobs.opening import which_are_meant
from deadbench.runners.worker.run import run_model
from deadbench.suite.checkpoints.sources import locate
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, TINY_NEOX, save_tiny

REGISTRY = load_registry(ROOT / "models.yaml")
WIDTH = TINY_NEOX["hidden_size"]
COMMIT = "a" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub's cache that holds team/model with scales of 5, and no network."""
    cached = tmp_path / "hub" / "models--team--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    save_tiny(cached / "snapshots" / COMMIT, scales=np.full(WIDTH, 5.0, np.float32))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for folder in ("here", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def _jobs(*names):
    return build_jobs(REGISTRY, ROOT / "models.yaml", list(names), None, ["parameters"], Overrides())


def _row(job):
    (event,) = (each for each in run_model(job, "run", 1) if isinstance(each, Finished))
    return event.row


@pytest.mark.parametrize("name", ["team/model", "./team/model"])
def test_a_worker_elsewhere_reads_the_folder_that_was_meant(hub, monkeypatch, name):
    save_tiny(hub / "here/team/model", scales=np.ones(WIDTH, np.float32))
    (job,), place = _jobs(name), locate(name)
    monkeypatch.chdir(hub / "elsewhere")
    row = _row(job)
    assert (row["status"], row["scale_harmonic"], row["model"], row["revision"]) == ("ok", 1.0, name, None)
    row = census_row(name, place, "run")
    assert (row["status"], row["scale_harmonic"], row["model"], row["revision"]) == ("ok", 1.0, name, None)
    shutil.rmtree(hub / "here/team")
    for row in (_row(job), census_row(name, place, "run")):
        assert row["status"] == "failed"
        assert str(hub / "here/team/model") in row["error"]
        assert "no such directory on this node" in row["error"]


def test_a_model_that_is_read_from_the_hubs_cache_for_want_of_the_hub_says_so(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    (job,) = _jobs("team/model")
    (remark,) = job.remarks
    assert remark.startswith("team/model@main: the Hub cannot be reached: read from its cache, ")
    assert job.reads[0].error is None


@pytest.mark.parametrize(
    ("offline", "told"),
    [
        (True, "HF_HUB_OFFLINE is set: read from the Hub's cache, "),
        (False, "the Hub cannot be reached: read from its cache, "),
    ],
)
def test_a_worker_that_reads_its_cache_says_which_snapshot_and_takes_no_other_commit(hub, monkeypatch, offline, told):
    (job,) = _jobs("team/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    told += str(hub / "hub/models--team--model/snapshots" / COMMIT)
    listed = [replace(job, reads=(replace(job.reads[0], fingerprint=commit),)) for commit in (COMMIT, "b" * 40)]
    same, another = (list(run_model(each, "run", 1)) for each in listed)
    assert [event.text for event in same if isinstance(event, Remark)] == [told]
    assert same[-1].row["status"] == "ok"
    assert another[-1].row["status"] == "failed"
    assert f"commit {'b' * 40} is to be read and this node's cache of the Hub has {COMMIT}" in another[-1].row["error"]


@pytest.mark.parametrize("name", ["team/model", "hf://team/model"])
def test_a_worker_elsewhere_reads_the_hubs_model_although_a_folder_there_has_its_name(hub, monkeypatch, name):
    (job,), place = _jobs(name), locate(name)
    save_tiny(hub / "elsewhere/team/model", scales=np.ones(WIDTH, np.float32))
    monkeypatch.chdir(hub / "elsewhere")
    for row in (_row(job), census_row(name, place, "run")):
        assert row["status"] == "ok"
        assert row["scale_harmonic"] == pytest.approx(25.0)


def test_a_name_with_two_meanings_is_told(hub):
    for folder in ("gpt2", "team/model", "mine"):
        (hub / "here" / folder).mkdir(parents=True)
    here = hub / "here"
    assert which_are_meant(REGISTRY, ["gpt2", "team/model", "mine", "pythia-160m", "./gpt2", "gpt2"]) == [
        f"gpt2: the registry's model is read; give ./gpt2 for the folder {here}/gpt2",
        f"team/model: the folder {here}/team/model is read; give hf://team/model for the Hub's model",
    ]


def test_a_source_of_the_registry_is_settled_too(hub, monkeypatch):
    save_tiny(hub / "here/team/model", scales=np.ones(WIDTH, np.float32))
    path = hub / "here" / "mine.yaml"
    path.write_text("protocols: {standard: {tokens: 8D}}\nsuites: {}\nmodels: [{id: m, source: team/model}]\n")
    (job,) = build_jobs(load_registry(path), path, ["m"], None, ["parameters"], Overrides())
    monkeypatch.chdir(hub / "elsewhere")
    assert _row(job)["scale_harmonic"] == 1.0
