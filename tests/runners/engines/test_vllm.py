"""The vLLM engine on real vLLM: the rows of the torch engine, over architectures, and with two ranks."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time

import polars as pl
import psutil
import pytest
from polars.testing import assert_frame_equal

from deadbench.runners.engines.vllm_support import refusal, why_vllm_cannot
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import Overrides
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, TINY_NEOX, save_tiny
from tests.runners.engines.test_tensor_parallel import table

MARK = "DEADBENCH_TEST"
HAS_VLLM = importlib.util.find_spec("vllm") is not None
_SKIPPED = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make vllm")


def needs_vllm(test):
    """Skipped without vLLM, whose start is slow."""
    return pytest.mark.vllm(pytest.mark.timeout(1800)(_SKIPPED(test)))


_BASE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 256,
}  # fmt: skip
_WITH_KV = _BASE | {"num_key_value_heads": 2}
# Native and by vLLM's transformers backend; a stream of h and of h + r; scale and 1 + scale; pre- and parallel blocks.
ARCHITECTURES = {
    "llama": _WITH_KV | {"architectures": ["LlamaForCausalLM"]},
    "qwen2": _WITH_KV | {"architectures": ["Qwen2ForCausalLM"]},
    "gemma2": _WITH_KV
    | {"architectures": ["Gemma2ForCausalLM"], "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 256},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 2,
             "n_positions": 256},
    "opt": _BASE | {"architectures": ["OPTForCausalLM"], "ffn_dim": 128, "word_embed_proj_dim": 64},
    "stablelm": _WITH_KV | {"architectures": ["StableLmForCausalLM"]},
    "falcon": _BASE
    | {"architectures": ["FalconForCausalLM"], "alibi": False, "new_decoder_architecture": False, "multi_query": False,
       "parallel_attn": True, "bias": False},
    "cohere": _WITH_KV | {"architectures": ["CohereForCausalLM"]},
    "nemotron": _WITH_KV | {"architectures": ["NemotronForCausalLM"]},
    "gpt_neox": _BASE | {"architectures": ["GPTNeoXForCausalLM"]},
}  # fmt: skip
RANDOM = ("llama", "gpt2", "nemotron")
# No language model; and checkpoints that are not what their config.json says.
ALBERT = TINY_NEOX | {"model_type": "albert", "architectures": ["AlbertModel"]}
UNTRUE = {
    "wider": {"intermediate_size": 256}, "deeper": {"num_hidden_layers": 3}, "shallower": {"num_hidden_layers": 1},
}  # fmt: skip

# One process for all, so that vLLM starts once: its workers run in it. All torch reads come first, as vLLM's
# transformers backend puts layers of its own into transformers' classes.
READ_ALL = """
import sys
from pathlib import Path
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import load_registry
registry, out = Path(sys.argv[1]), Path(sys.argv[2])
for engine in ("torch", "vllm"):
    store = ResultStore(str(out / engine))
    for suite in ("some", "all", "refused"):
        for job in build_jobs(load_registry(registry), registry, [], suite, None, Overrides(engine=engine)):
            for event in run_model(job, "run", 1):
                if isinstance(event, Finished):
                    store.write(event.tables)
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    for name, config in ARCHITECTURES.items():
        save_tiny(folder / name, config | {"model_type": name})
    save_tiny(folder / "albert", ALBERT)
    for name, said in UNTRUE.items():
        config = save_tiny(folder / name, ARCHITECTURES["llama"] | {"model_type": "llama"}) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | said))
    refused = ["albert", *UNTRUE]
    models = [
        {"id": name, "source": name, "input": "tokens:random", "dtype": "float32"}
        for name in (*ARCHITECTURES, *refused)
    ]
    suites = {
        "refused": {"protocol": "few", "models": refused, "reads": ["trained"]},
        "all": {"protocol": "few", "models": list(ARCHITECTURES), "reads": ["trained"]},
        "some": {"protocol": "few", "models": list(RANDOM), "reads": ["random"]},
    }
    (folder / "models.yaml").write_text(
        json.dumps({"protocols": {"standard": {}, "few": {"tokens": "8D"}}, "suites": suites, "models": models})
    )
    return folder / "models.yaml"


def plain_environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | more


@pytest.fixture(scope="module")
def parity(registry, tmp_path_factory):
    out = tmp_path_factory.mktemp("parity")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ_ALL, str(registry), str(out)],
        env=plain_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"), cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "torch", out / "vllm"


def good(out, name):
    """Rows of the models that both engines read."""
    return table(out, name).filter(pl.col("model").is_in(list(ARCHITECTURES)))


def assert_same(torch_rows, vllm_rows):
    """Rows of two engines: equal to float32 rounding, and where rounding is all there is, equally deep."""
    assert vllm_rows["error"].drop_nulls().to_list() == []
    names = ["model", "read", "family", "num_tokens", "num_distinct_inputs", "kernel_exact", "protocol_hash"]
    assert_frame_equal(torch_rows.select(names), vllm_rows.select(names))
    exact = ["lambda_mean", "lambda_max", "lambda_second", "lambda_control", "worst_block_ratio", "scale_harmonic"]
    assert_frame_equal(torch_rows.select(exact), vllm_rows.select(exact), rel_tol=1e-4)
    assert_frame_equal(torch_rows.select("alignment"), vllm_rows.select("alignment"), abs_tol=1e-4)
    depths = torch_rows.select("depth", "depth_exact", "depth_as_executed") - vllm_rows.select(
        "depth", "depth_exact", "depth_as_executed"
    )
    assert depths.select(pl.all().abs().max()).row(0) < (0.4, 0.4, 0.4)
    rms = (torch_rows["family"] == "rmsnorm").to_list()
    assert depths.filter(rms).select(pl.all().abs().max()).row(0) < (1e-3, 1e-3, 1e-3)


@needs_vllm
def test_parity_with_the_torch_engine(parity):
    torch_rows, vllm_rows = (good(out, "reads") for out in parity)
    assert len(vllm_rows) == len(ARCHITECTURES) + len(RANDOM)
    assert_same(torch_rows, vllm_rows)
    assert set(vllm_rows["engine"]) == {"vllm"}
    detail = dict(zip(vllm_rows["model"], vllm_rows["engine_detail"], strict=True))
    assert "LlamaForCausalLM; hooked model.norm (RMSNorm) and 2 blocks, stream h + r" in detail["llama"]
    assert "replayed by transformers' LlamaRMSNorm" in detail["llama"]
    assert "TransformersForCausalLM" in detail["gpt_neox"]


@needs_vllm
def test_every_block_is_that_of_the_torch_engine(parity):
    torch_rows, vllm_rows = (good(out, "blocks") for out in parity)
    names = ["model", "read", "block", "state", "rank_limited", "preserved"]
    assert_frame_equal(torch_rows.select(names), vllm_rows.select(names))
    sigmas = ["sigma_min", "sigma_max"]
    assert_frame_equal(torch_rows.select(sigmas), vllm_rows.select(sigmas), rel_tol=1e-4)


def marked(mark):
    """Processes that descend from a command which was given `mark` in its environment.

    One that has named itself, as those of vLLM do, has written over the environment that others see; its parent tells.
    """
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    alive = []
    for process in found.values():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def is_rank(process):
    """Whether a process is one of vLLM's ranks, before it has named itself or after."""
    with contextlib.suppress(psutil.Error):
        command = " ".join(process.cmdline())
        return "spawn_main" in command or "VLLM::Worker" in command
    return False


def is_below_a_core(process):
    """Whether a process was started by vLLM's engine core, which too is spawned before it has named itself."""
    with contextlib.suppress(psutil.Error):
        command = " ".join(process.parent().cmdline())
        return "EngineCore" in command or "spawn_main" in command
    return False


def assert_all_gone(mark):
    deadline = time.monotonic() + 30
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [process.cmdline() for process in marked(mark)] == []


def two_ranks(registry, out, *models):
    return subprocess.Popen(
        [sys.executable, "-m", "deadbench", "run", *models, "--registry", str(registry), "--suite", "all", "--engine",
         "vllm", "--tensor-parallel", "2", "--out", str(out)],
        env=plain_environment(**{MARK: str(out)}), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@needs_vllm
@pytest.mark.ray
@pytest.mark.parametrize("models", [("llama",), pytest.param(tuple(ARCHITECTURES), marks=pytest.mark.full, id="all")])
def test_two_ranks_through_the_command_line(registry, parity, tmp_path, models):
    command = two_ranks(registry, tmp_path, *models)
    _, err = command.communicate(timeout=3600)
    assert command.returncode == 0, err[-3000:]
    rows = table(tmp_path, "reads")
    one_rank = table(parity[0], "reads").filter(pl.col("model").is_in(models), read="trained")
    assert_same(one_rank, rows)
    assert rows["tensor_parallel"].to_list() == [2] * len(models)
    assert_all_gone(str(tmp_path))


@needs_vllm
@pytest.mark.ray
@pytest.mark.full  # alone: beside other tests the read is over before both of its ranks are seen
def test_a_rank_of_vllm_that_dies_is_a_failed_row_and_nothing_is_left(registry, tmp_path):
    for attempt in range(3):  # on a busy machine both may come and go between two looks
        tmp_path = tmp_path / str(attempt)
        command, ranks = two_ranks(registry, tmp_path, "llama"), []
        while len(ranks) < 2 and command.poll() is None:
            time.sleep(0.1)
            ours = marked(str(tmp_path))
            ranks = [each for each in ours if is_rank(each) and is_below_a_core(each)]
        if command.returncode is None:
            break
    assert command.returncode is None, command.communicate()[1][-3000:]
    ranks[1].kill()
    killed = time.monotonic()
    command.communicate(timeout=600)
    assert command.returncode == 1
    assert time.monotonic() - killed < 60
    (row,) = table(tmp_path, "reads").to_dicts()
    assert row["status"] == "failed"
    assert "vLLM cannot load it" in row["error"] or "died" in row["error"]
    assert_all_gone(str(tmp_path))


@needs_vllm
def test_what_vllm_cannot_do_is_a_failed_row_that_says_what_can(parity):
    of_torch, of_vllm = (table(out, "reads").filter(model="albert").to_dicts() for out in parity)
    assert [row["status"] for row in of_torch] == ["ok"]
    assert [row["status"] for row in of_vllm] == ["failed"]
    assert "'albert' is none; give --engine torch" in of_vllm[0]["error"]


def registry_that_wishes_vllm(folder, models):
    content = [{"id": name, "engine": "vllm", "input": "tokens:random", "config": config} for name, config in models]
    (folder / "models.yaml").write_text(json.dumps({"protocols": {"standard": {}}, "suites": {}, "models": content}))
    return folder / "models.yaml"


def engines_of(path, **overrides):
    registry = load_registry(path)
    jobs = build_jobs(registry, path, [m.id for m in registry.models], None, ["random"], Overrides(**overrides))
    return {job.model_id: job.engine for job in jobs}


@needs_vllm
def test_a_checkpoint_that_is_not_what_its_config_says_is_a_failed_row(parity):
    for out in parity:
        rows = table(out, "reads").filter(pl.col("model").is_in(list(UNTRUE)))
        assert dict(zip(rows["model"], rows["status"], strict=True)) == dict.fromkeys(UNTRUE, "failed")
        assert not any("\n" in error for error in rows["error"])
    errors = dict(zip(rows["model"], rows["error"], strict=True))
    assert errors["wider"].startswith("vLLM cannot load it (")
    assert "of a block that the configuration does not have" in errors["shallower"], (
        "which the headers tell before vLLM is asked"
    )


@needs_vllm
def test_under_auto_what_vllm_lacks_is_read_by_torch(tmp_path):
    models = [
        ("llama", ARCHITECTURES["llama"] | {"model_type": "llama"}),
        ("gpt_neox", ARCHITECTURES["gpt_neox"] | {"model_type": "gpt_neox"}),  # by vLLM's transformers backend
        ("mpt", {"model_type": "mpt", "architectures": ["MptForCausalLM"], "d_model": 64, "n_heads": 2, "n_layers": 2}),
        ("albert", {"model_type": "albert", "architectures": ["AlbertModel"]}),  # no language model at all
    ]
    path = registry_that_wishes_vllm(tmp_path, models)
    assert engines_of(path) == {"llama": "vllm", "gpt_neox": "vllm", "mpt": "torch", "albert": "torch"}
    assert set(engines_of(path, engine="vllm").values()) == {"vllm"}, "the command line is no wish"
    reason = why_vllm_cannot(dict(models)["mpt"])
    assert "MptForCausalLM was supported in vLLM until v0.28.0" in reason
    assert len(reason) < 300


def test_without_vllm_the_command_says_how_to_install_it(deadbench, monkeypatch):
    monkeypatch.setattr("deadbench.runners.engines.registry.find_spec", lambda package: None)
    code, out, err = deadbench("run", "gpt2", "--engine", "vllm")
    assert (code, out) == (2, "")
    assert "pip install 'deadbench[vllm]' (CUDA)" in err
    assert err.count("\n") == 1


def test_the_registrys_wish_for_vllm_falls_back_to_torch_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr("deadbench.runners.engines.registry.find_spec", lambda package: None)
    path = registry_that_wishes_vllm(tmp_path, [("neox", TINY_NEOX)])
    assert engines_of(path) == {"neox": "torch"}


def test_what_vllm_says_is_cut_to_its_reason():
    long = ValueError(
        "1 validation error for ModelConfig\n  Value error, Model architectures ['XGLMForCausalLM'] are not supported "
        "for now. Supported architectures: dict_keys(['AfmoeForCausalLM', 'ApertusForCausalLM'"
    )
    assert refusal(long) == "Model architectures ['XGLMForCausalLM'] are not supported for now."
    assert refusal(RuntimeError("Engine core\ninitialization failed")) == "Engine core initialization failed"
