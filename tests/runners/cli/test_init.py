"""`deadbench init`, what is offered without a model, and a folder of checkpoints as one model everywhere."""

import shutil

import polars as pl
import pytest

from deadbench.analysis.results import scan
from deadbench.runners.cli.bisect import _series
from deadbench.runners.cli.console import model_named
from deadbench.runners.cli.run import _next_command
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import JobError, Overrides
from deadbench.runners.jobs.opening import which_are_meant
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import find_registry, load_registry
from tests.conftest import TWINS


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which somebody trained: a Trainer's run, and a model beside it."""
    folder = tmp_path_factory.mktemp("work")
    for step, twin in ((10, "step0"), (20, "step16"), (100, "step128")):
        shutil.copytree(TWINS / "layernorm" / twin, folder / "run0" / f"checkpoint-{step}")
    shutil.copytree(TWINS / "rmsnorm" / "step0", folder / "模型")
    return folder


@pytest.fixture
def here(work, monkeypatch):
    monkeypatch.chdir(work)
    yield work
    (work / "models.yaml").unlink(missing_ok=True)


def _jobs(*names):
    path = find_registry()
    return build_jobs(load_registry(path), path, list(names), None, ["parameters"], Overrides())


@pytest.mark.parametrize(
    "names", [["run0"], ["./run0/"], ["run0/checkpoint-10", "run0/checkpoint-100", "run0/checkpoint-20"]]
)
def test_a_folder_of_checkpoints_is_one_model_in_order(here, names):
    (job,) = _jobs(*names)
    assert (job.model_id, [read.revision for read in job.reads]) == (
        "run0", ["checkpoint-10", "checkpoint-20", "checkpoint-100"]
    )  # fmt: skip
    assert job.remarks == ("run0: a series of 3 checkpoints, by step: checkpoint-10, checkpoint-20, checkpoint-100",)
    assert all(read.error is None and read.fingerprint for read in job.reads)


def test_the_trend_of_a_folder_needs_no_registry(here, deadbench, tmp_path):
    (job,), store = _jobs("run0"), ResultStore(str(tmp_path / "out"))
    for event in run_model(job, "run", 1):
        if isinstance(event, Finished):
            store.write(event.tables)
    for name in ("run0", "run0/", str(here / "run0")):
        code, out, _ = deadbench("trend", tmp_path / "out", "--model", name, "--metric", "scale_harmonic")
        assert code == 0
        assert out.index("checkpoint-20 ") < out.index("checkpoint-100")
        assert [line.split()[0] for line in out.splitlines() if "checkpoint-" in line][:3] == ["10", "20", "100"]
    reads = scan(str(tmp_path / "out"))
    assert model_named(reads, "run1") == "run1"


def test_the_next_command_shows_what_was_read(here):
    assert _next_command(_jobs("run0"), "my out") == "deadbench trend 'my out' --model run0"
    for names in (["run0/checkpoint-10"], ["run0", "模型"]):
        assert _next_command(_jobs(*names), "out") == "deadbench leaderboard out"


def test_a_folder_can_be_bisected(here):
    assert [read.revision for read in _series("run0", None, None, "trained").reads] == [
        "checkpoint-10", "checkpoint-20", "checkpoint-100"
    ]  # fmt: skip
    with pytest.raises(JobError, match=r"--model 'run1' is not in .*models.yaml, nor a folder of checkpoints"):
        _series("run1", None, None, "trained")


def test_checkpoints_beside_weights_are_named(here, tmp_path, monkeypatch):
    shutil.copytree(here / "run0", tmp_path / "run1")
    shutil.copy(here / "run0" / "checkpoint-10" / "model.safetensors", tmp_path / "run1")
    monkeypatch.chdir(tmp_path)
    assert which_are_meant(load_registry(find_registry()), ["run1"]) == [
        "run1: its own weights are read; name the checkpoints in it to have them "
        "(run1/checkpoint-10 … run1/checkpoint-100)"
    ]


def test_a_model_is_known_by_the_end_of_its_path():
    reads = pl.LazyFrame({"model": ["/data/sweep/run0", "/data/sweep/run1", "old/run1"]})
    assert model_named(reads, "run0") == "/data/sweep/run0"
    assert model_named(reads, "sweep/run1/") == "/data/sweep/run1"
    assert model_named(reads, "run1") == "run1", "two end so"
    assert model_named(reads, "un0") == "un0"


def test_classify_lists_each_checkpoint_in_order(here, deadbench):
    code, out, _ = deadbench("classify", "run0", "模型")
    assert code == 0
    found = [line.split()[0] for line in out.splitlines() if "norm" in line and "family" not in line]
    assert found == ["run0/checkpoint-10", "run0/checkpoint-20", "run0/checkpoint-100", "模型"]


@pytest.mark.parametrize("command", ["run", "plan"])
def test_without_a_model_what_lies_here_is_offered(here, deadbench, command):
    code, out, err = deadbench(command)
    assert (code, out) == (2, "")
    assert "deadbench run run0 --out results # 3 checkpoints, checkpoint-10 to checkpoint-100" in err
    assert "deadbench run '模型' --out results # a checkpoint" in err
    assert "deadbench run --suite quick" in err


def test_init_lists_what_lies_here_and_overwrites_nothing(here, deadbench):
    code, out, err = deadbench("init")
    assert (code, out) == (0, "models.yaml\n")
    assert "run0: 3 checkpoints, checkpoint-10 to checkpoint-100" in err
    registry = load_registry(find_registry())
    assert {model.id: model.source for model in registry.models} == {"run0": "run0", "模型": "模型"}
    series, alone = _jobs()
    assert [read.revision for read in series.reads] == ["checkpoint-10", "checkpoint-20", "checkpoint-100"]
    assert [read.revision for read in alone.reads] == [None]
    before = (here / "models.yaml").read_bytes()
    code, _, err = deadbench("init")
    assert code == 2
    assert err.startswith("deadbench: models.yaml: is there already")
    assert (here / "models.yaml").read_bytes() == before


def test_a_registry_elsewhere_names_sources_from_where_it_is(here, deadbench, tmp_path):
    code, _, _ = deadbench("init", "run0", "org/name", "--registry", tmp_path / "mine.yaml")
    assert code == 0
    registry = load_registry(tmp_path / "mine.yaml")
    assert [(tmp_path / registry.models[0].source).resolve(), registry.models[1].source] == [here / "run0", "org/name"]


def test_what_a_url_grants_is_no_part_of_a_model_s_name(here, deadbench, tmp_path):
    url = "https://me:Zq81hunter2@host/runs/a?sig=Zq81abcdef"
    code, out, err = deadbench("init", url, "--registry", tmp_path / "mine.yaml")
    assert code == 0
    (model,) = load_registry(tmp_path / "mine.yaml").models
    assert (model.id, model.source) == ("host/runs/a", url)
    assert "Zq81" not in out + err


def test_the_folder_itself_is_named_so_that_it_is_found_from_anywhere(here, deadbench, monkeypatch):
    monkeypatch.chdir(here / "run0")
    assert deadbench("init")[0] == 0
    try:
        (model,) = load_registry(find_registry()).models
        assert (model.id, model.source) == ("run0", "../run0")
        assert deadbench("init", here / "模型", "--registry", "other.yaml")[0] == 0
        (other,) = load_registry(here / "run0" / "other.yaml").models
        assert (other.id, other.source) == ("模型", str(here / "模型"))
    finally:
        for name in ("models.yaml", "other.yaml"):
            (here / "run0" / name).unlink(missing_ok=True)


def test_init_with_nothing_to_list(tmp_path, monkeypatch, deadbench):
    monkeypatch.chdir(tmp_path)
    for arguments, expected in (
        ([], "no checkpoint lies in this folder"),
        (["nothing"], "nothing: no such directory"),
        (["org/name", "--registry", "no/models.yaml"], "--registry no/models.yaml: no such directory"),
    ):
        code, _, err = deadbench("init", *arguments)
        assert code == 2
        assert err.startswith(f"deadbench: {expected}")
        assert not list(tmp_path.iterdir())
