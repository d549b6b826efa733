"""What every engine of the registry must be, whatever it is; that their rows agree is in test_engines_agree.py."""

import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError
from importlib.util import find_spec
from typing import get_args

import pytest

from deadbench.runners.engines import base
from deadbench.runners.engines.registry import (
    AUTO,
    DEFAULT,
    ENGINES,
    EngineSpec,
    imported,
    make_engine,
    refused_together,
)
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import JobError, Overrides
from deadbench.suite.read_specs import READ_SPECS
from deadbench.suite.registry.entries import Engine, Model
from deadbench.suite.registry.loading import load_registry
from tests.conftest import TINY_NEOX
from tests.runners.engines.fake_vllm import pretend_vllm

FORWARD_READS = {name for name, spec in READ_SPECS.items() if spec.runs_model}
every_engine = pytest.mark.parametrize("name", ENGINES)


def asked_of(interface):
    """Names of the methods and of the attributes that a Protocol asks for."""
    methods = {name for name, value in vars(interface).items() if inspect.isfunction(value) and name[0] != "_"}
    return methods, set(interface.__annotations__)


def class_of(path, monkeypatch):
    """The class of an engine, whether what it needs is installed or not."""
    if path.startswith("deadbench.runners.engines.vllm"):
        pretend_vllm(monkeypatch)
    return imported(path)


@pytest.fixture
def registry(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text(
        f"protocols: {{standard: {{tokens: 64}}}}\nsuites: {{}}\nmodels:\n  - {{id: neox, input: 'tokens:random', "
        f"config: {TINY_NEOX!r}}}\n"
    )
    return path


def job_of(path, **overrides):
    (job,) = build_jobs(load_registry(path), path, ["neox"], None, ["random"], Overrides(**overrides))
    return job


@every_engine
def test_a_class_has_what_its_base_asks_for(name, monkeypatch):
    spec = ENGINES[name]
    interface = base.Engine if spec.in_process else base.WorkerExtension
    methods, attributes = asked_of(interface)
    assert len(methods) >= 4
    for path in filter(None, (spec.path, spec.rank_path)):
        engine = class_of(path, monkeypatch)
        assert attributes <= {*dir(engine), *getattr(engine, "__dataclass_fields__", ())}
        for method in methods:
            wanted = inspect.signature(getattr(interface, method)).parameters
            assert list(inspect.signature(getattr(engine, method)).parameters)[: len(wanted)] == list(wanted), method


@every_engine
def test_what_a_spec_says_hangs_together(name, monkeypatch):
    spec = ENGINES[name]
    assert {"random", "trained"} <= {*spec.reads} <= FORWARD_READS
    assert (spec.rank_path is not None) == (spec.tensor_parallel == "ranks")
    assert (spec.package is None) == (spec.install is None)
    assert spec.in_process or not (spec.resume or spec.replicas), "only passes in this process are cut or divided"
    if spec.in_process:
        assert imported(spec.path).tap_by_tap == spec.blockwise
    with pytest.raises(FrozenInstanceError):
        spec.replicas = True


def test_one_engine_does_every_read_and_auto_chooses_among_those_that_need_nothing_more():
    assert {*ENGINES[DEFAULT].reads} == FORWARD_READS
    assert AUTO[0] == DEFAULT
    assert all(ENGINES[name].package is None for name in AUTO)
    assert {"auto", *ENGINES} == {*get_args(Engine)}, "what models.yaml may say"


@every_engine
def test_an_engine_that_is_not_installed_names_its_pip_line(name, registry, deadbench, monkeypatch):
    spec = ENGINES[name]
    monkeypatch.setattr("deadbench.runners.engines.registry.find_spec", lambda package: None)
    if spec.package is None:
        assert (spec.missing(), job_of(registry, engine=name).engine) == (None, name)
        return
    assert spec.package in spec.install
    assert f"pip install 'deadbench[{spec.package}" in spec.install
    with pytest.raises(JobError) as refused:
        job_of(registry, engine=name)
    assert str(refused.value) == spec.missing()
    code, out, err = deadbench("run", "neox", "--registry", registry, "--engine", name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert spec.install in err


@every_engine
@pytest.mark.parametrize(("tensor_parallel", "replicas"), [(None, 1), (None, 2), (2, 1), (2, 2)])
def test_what_does_not_go_together_is_refused(name, registry, tensor_parallel, replicas, monkeypatch):
    monkeypatch.setattr("deadbench.runners.engines.registry.find_spec", lambda package: True)
    alone = tensor_parallel is not None and ENGINES[name].tensor_parallel is None
    if not alone and (replicas == 1 or (ENGINES[name].replicas and tensor_parallel is None)):
        job = job_of(registry, engine=name, tensor_parallel=tensor_parallel, replicas=replicas)
        assert (job.engine, job.replicas) == (name, replicas)
        return
    beside = f"--tensor-parallel {tensor_parallel}" if ENGINES[name].replicas else f"--engine {name}"
    with pytest.raises(JobError) as refused:
        job_of(registry, engine=name, tensor_parallel=tensor_parallel, replicas=replicas)
    if alone:
        told = f"--tensor-parallel 2 does not go with --engine {name}, which has a model on one device"
    else:
        told = f"--replicas 2 does not go with {beside}"
    assert str(refused.value) == f"neox: {told}; leave one out"
    assert refused_together(name, tensor_parallel, replicas) in str(refused.value)


def test_an_engine_may_refuse_an_architecture(monkeypatch):
    assert [ENGINES[name].why_not({}) for name in AUTO] == [None, None]
    refusing = EngineSpec("a:B", refuses="tests.runners.engines.test_registry:no_rabbits")
    assert (refusing.why_not({"model_type": "rabbit"}), refusing.why_not({"model_type": "hare"})) == (
        "no rabbits",
        None,
    )


def no_rabbits(raw_config):
    return "no rabbits" if raw_config["model_type"] == "rabbit" else None


def test_a_wish_falls_back_where_the_engine_lacks_the_architecture(tmp_path, monkeypatch):
    wish = EngineSpec("a:B", package="json", install="x", refuses="tests.runners.engines.test_registry:no_rabbits")
    monkeypatch.setitem(ENGINES, "vllm", wish)
    monkeypatch.setattr("deadbench.runners.engines.registry.find_spec", lambda package: True)
    from deadbench.runners.jobs.build import _wished

    def wished(model_type, engine="vllm"):
        return _wished(Model(id="m", engine=engine, config={"model_type": model_type}), tmp_path, False, Overrides())

    assert (wished("hare"), wished("rabbit"), wished("rabbit", "streaming"), wished("rabbit", "auto")) == (
        "vllm", "torch", "streaming", "torch",
    )  # fmt: skip
    monkeypatch.setattr("deadbench.runners.engines.registry.find_spec", lambda package: None)
    assert wished("hare") == "torch"


@pytest.mark.parametrize("name", [name for name, spec in ENGINES.items() if spec.in_process])
def test_an_engine_is_made_on_this_process_device(name):
    engine = make_engine(name)
    assert type(engine) is imported(ENGINES[name].path)
    assert (engine.ranks.size, engine.resolved) == (1, None)


@pytest.mark.subprocess
def test_the_registry_imports_nothing_heavy():
    heavy = ("torch", "transformers", "ray", "numpy", "vllm")
    code = f"import sys, deadbench.runners.engines.registry; sys.exit(', '.join({{*{heavy}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@every_engine
def test_what_is_installed_is_not_missing(name):
    package = ENGINES[name].package
    assert (ENGINES[name].missing() is None) == (package is None or find_spec(package) is not None)
