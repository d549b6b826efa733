"""Options that several commands share are the same everywhere, and become jobs and a cluster in one place."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from deadbench.runners.cli.main import app
from deadbench.runners.cli.options import jobs_and_cluster, overridden
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.planning.hardware import PlanError
from deadbench.suite.registry.entries import RegistryError
from tests.conftest import save_tiny

NOTHING = {
    "engine": "auto", "tokens": None, "input_spec": None, "dtype": None, "seed": 0, "accumulator_gb": None,
    "tensor_parallel": None, "replicas": 1, "config": None, "model_type": None, "taps": None,
}  # fmt: skip


def test_run_and_plan_share_their_options():
    """But for three, which mean another thing to a plan: no Ray is started, nothing is written, no device is there."""
    run, plan = (
        {option.name: (option.opts, option.help, option.default) for option in get_command(app).commands[name].params}
        for name in ("run", "plan")
    )
    shared = run.keys() & plan.keys()
    assert len(shared) == 22
    assert {name for name in shared if run[name] != plan[name]} == {"address", "out", "tensor_parallel"}


def test_no_flag_is_no_override():
    assert overridden(**NOTHING) == Overrides()
    assert overridden(**NOTHING | {"engine": "torch", "tokens": 5}) == Overrides(tokens=5, engine="torch")


def test_a_mistake_in_the_cluster_is_told_before_anything_is_opened(monkeypatch):
    monkeypatch.setattr("deadbench.runners.jobs.build.build_jobs", lambda *arguments, **named: pytest.fail("opened"))
    with pytest.raises(PlanError, match="--assume '8x'"):
        jobs_and_cluster(["gpt2"], None, None, None, Overrides(), assume="8x")


@pytest.mark.parametrize(("address", "expected"), [(None, "here"), ("local", "here"), ("auto", "Ray at auto")])
def test_ray_is_asked_for_its_nodes_only_where_one_is_named(monkeypatch, address, expected):
    monkeypatch.setattr("deadbench.runners.planning.hardware.this_machine", lambda most_gpus: "here")
    monkeypatch.setattr("deadbench.runners.planning.hardware.ray_cluster", lambda named: f"Ray at {named}")
    monkeypatch.setattr("deadbench.runners.cluster.joining.connect", lambda named: False)
    jobs, cluster, _ = jobs_and_cluster(["gpt2", "pythia-160m"], None, None, " random ", Overrides(), address=address)
    assert cluster == expected
    assert [(job.model_id, [read.read for read in job.reads]) for job in jobs] == [
        ("gpt2", ["random"]),
        ("pythia-160m", ["random"]),
    ]


FOREIGN = "models:\n  - name: llama\n    path: /srv/llama.gguf\n"


@pytest.mark.parametrize("text", [FOREIGN, "models: [", "- 1", "\x00"])
def test_a_registry_that_nobody_named_is_passed_over_for_a_source(tmp_path, monkeypatch, text):
    save_tiny(tmp_path / "m")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "models.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "project")
    ask = lambda models, suite=None, registry=None: jobs_and_cluster(  # noqa: E731
        models, suite, registry, "parameters", Overrides(), assume="1x8GB"
    )
    (job,), _, (remark,) = ask(["../m"])
    assert job.model_id == "../m"
    assert remark.startswith("models.yaml")
    assert remark.endswith("; passed over, since a SOURCE needs no registry")
    for needed in (([],), (["gpt2"],), (["../m"], "quick"), (["../m"], None, Path("models.yaml"))):
        with pytest.raises(RegistryError, match=r"^models\.yaml"):
            ask(*needed)


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize("command", [None, *get_command(app).commands])
def test_no_terminal_cuts_the_help(deadbench, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", width)
    code, out, _ = deadbench(*([command] if command else []), "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= width
    group = get_command(app)
    options = group.commands[command].params if command else group.params
    words, joined = out.split(), re.sub(r"[\s│]", "", out)
    whole = [name for each in options for name in each.opts if name.startswith("--")] if command else [*group.commands]
    assert [name for name in whole if name not in words] == []
    said = [re.sub(r"\s|\\(?=\[)", "", each.help or "") for each in options]
    assert [text for text in said if text not in joined] == []
