"""What vLLM is asked for, captured: a cache of two steps, and no more of the GPU."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from deadbench.runners.worker import vllm as ours
from deadbench.runners.worker.request import RandomWeights
from tests.runners.engines.fake_vllm import pretend_vllm

CONFIG = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
          "num_key_value_heads": 8, "architectures": ["LlamaForCausalLM"]}  # fmt: skip


@pytest.fixture
def arguments(monkeypatch):
    pretend_vllm(monkeypatch)
    given = {}

    def make(**options):
        given.update(options)
        return SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None)))

    sys.modules["vllm"].LLM = make
    assert isinstance(sys.modules["vllm"], ModuleType)

    def ask(tensor_parallel=2, stages=1):
        read = SimpleNamespace(tensor_parallel=tensor_parallel, stages=stages, seed=0)
        with ours._loaded(read, dict(CONFIG), RandomWeights(0, Path()), "bfloat16", 512):
            return given

    return ask


def test_the_cache_is_of_two_steps_and_the_rest_is_the_accumulators(arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    given = arguments()
    a_token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, KV heads, width, bytes
    assert given["max_num_batched_tokens"] * 2 * a_token <= given["kv_cache_memory_bytes"] < 2e9
    assert given["gpu_memory_utilization"] <= 0.5
    assert given["tensor_parallel_size"] == 2


@pytest.mark.parametrize(
    ("asked", "tensor_parallel", "stages", "backend"),
    [((1, 1), 1, 1, None), ((8, 1), 8, 1, "mp"), ((16, 2), 8, 2, "ray"), ((4, 4), 1, 4, "ray")],
)
def test_over_nodes_each_has_a_stage_that_its_gpus_share(arguments, asked, tensor_parallel, stages, backend):
    given = arguments(*asked)
    assert (given["tensor_parallel_size"], given["pipeline_parallel_size"]) == (tensor_parallel, stages)
    assert given["distributed_executor_backend"] == backend
    extra = given["model_loader_extra_config"]
    assert extra["config"]["architectures"] == ["LlamaForCausalLM"], "the folder with config.json is on one node alone"


def test_without_gpus_vllm_has_its_own_variable_for_that(arguments):
    assert "kv_cache_memory_bytes" not in arguments()


def test_vllm_waits_for_a_worker_as_long_as_the_driver_does():
    limits = {"VLLM_ENGINE_READY_TIMEOUT_S", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"}
    assert {int(ours.ENVIRONMENT[name]) for name in limits} == {12 * 3600}
