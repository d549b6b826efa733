"""Degrees on clusters whose nodes differ, and what Ray's nodes say of their GPUs."""

from types import SimpleNamespace

import pytest
import ray

from deadbench.runners.engines.registry import ENGINES
from deadbench.runners.planning.degree import shared_by
from deadbench.runners.planning.hardware import Cluster, Machine, PlanError, ray_cluster

HEAD, SMALL, LARGE = Machine(0, 0.0, 64e9), Machine(8, 24e9, 500e9), Machine(8, 80e9, 1e12)
HEAD_ID, BIG_ID = "aa" * 28, "bb" * 28
ONE = Machine(1, 80e9, 500e9)


def degree(nodes, engine="torch", asked=None, heads=32, kv_heads=8, needed=20e9, blocks=32):
    divisors = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    size = SimpleNamespace(has_plan=True, divisors=divisors, num_taps=blocks + 1)
    need = SimpleNamespace(sharded=lambda degree: needed if degree > 1 else 1e12)
    return shared_by(size, need, Cluster(tuple(nodes), "made"), ENGINES[engine], asked)


def test_a_head_without_gpus_shares_no_model():
    assert degree([HEAD, ONE]) is None
    assert degree([HEAD, ONE], asked=2) == "--tensor-parallel 2: the cluster has 1 GPUs"
    assert degree([HEAD, ONE, ONE]) == 2


def test_only_nodes_of_the_largests_shape_share_a_model():
    assert degree([LARGE, SMALL], asked=16, kv_heads=16) == "--tensor-parallel 16: the cluster has 8 GPUs"
    assert degree([LARGE, LARGE, SMALL], asked=16, kv_heads=16) == 16


def test_vllm_gives_each_gpu_a_copy_where_kv_heads_are_fewer():
    assert degree([LARGE], "vllm", asked=8, kv_heads=4) == 8
    assert degree([LARGE], "vllm", asked=8, kv_heads=1) == 8
    assert (
        degree([LARGE], "vllm", asked=8, heads=48, kv_heads=3)
        == "--tensor-parallel 8 does not divide 3 (num_key_value_heads)"
    )
    assert "does not divide 4 (num_key_value_heads)" in degree([LARGE], "torch", asked=8, kv_heads=4)


def test_over_nodes_vllm_takes_whole_ones_whose_gpus_must_divide_the_heads(monkeypatch):
    assert degree([LARGE] * 3, "vllm", asked=24) == 24, "three stages; 8, and not 24, divide 32 heads"
    assert degree([LARGE] * 2, "vllm", asked=16, kv_heads=3, heads=48) == (
        "--tensor-parallel 16: 8 on each node does not divide 3 (num_key_value_heads)"
    )
    assert degree([LARGE] * 2, "vllm", asked=12) == (
        "--tensor-parallel 12: over several nodes each gives all of its 8 GPUs; give 8"
    )
    assert degree([LARGE] * 4, "vllm", asked=32, blocks=3) == "--tensor-parallel 32: 3 blocks are no 4 stages; give 24"
    assert degree([LARGE, SMALL], "vllm", asked=16) == "--tensor-parallel 16: the cluster has 8 GPUs"
    assert degree([LARGE, SMALL], "vllm", asked=8) == 8
    assert "does not divide 32" in degree([LARGE] * 3, "torch", asked=24), "ranks share every block"


def test_a_model_that_one_node_does_not_hold_is_put_on_as_few_as_hold_it():
    size = SimpleNamespace(has_plan=False, divisors={"num_attention_heads": 64}, num_taps=81)
    need = SimpleNamespace(sharded=lambda degree: 1.2e12 / degree)
    assert shared_by(size, need, Cluster((LARGE,) * 4, "made"), ENGINES["vllm"], None) == 24


def test_nodes_to_come_are_stages_as_those_that_are_there_and_no_more_than_may_come():
    def asked(number, *come):
        size = SimpleNamespace(has_plan=True, divisors={"num_attention_heads": 32}, num_taps=33)
        need = SimpleNamespace(sharded=lambda degree: 1.2e12 / degree)
        there = Cluster((HEAD, LARGE), "Ray at auto")
        cluster = there.with_nodes(Cluster(come, "these")) if come else there
        return shared_by(size, need, cluster, ENGINES["vllm"], number)

    assert asked(24) == "--tensor-parallel 24: the cluster has 8 GPUs"
    assert asked(24, LARGE, LARGE) == 24
    assert asked(None, LARGE, LARGE) == 24, "the fewest that hold it"
    assert asked(None, LARGE) is None
    assert asked(32, LARGE, LARGE) == "--tensor-parallel 32: the cluster has 24 GPUs, with those of nodes to come"
    assert asked(16, SMALL) == "--tensor-parallel 16: the cluster has 8 GPUs, with those of nodes to come"


@pytest.fixture
def answers(monkeypatch):
    """Ray with a head and a node of 8 GPUs, whose task gives what the test says, and what the task asked for."""
    given = {"asked": []}
    nodes = [(HEAD_ID, {"CPU": 4.0}), (BIG_ID, {"CPU": 64.0, "GPU": 8.0, "memory": 1e11})]
    monkeypatch.setattr(ray, "nodes", lambda: [
        {"NodeID": name, "Alive": True, "NodeManagerHostname": name[:2], "Resources": has} for name, has in nodes
    ])  # fmt: skip
    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: "asked"))
    monkeypatch.setattr(ray, "remote", lambda **options: given["asked"].append(options) or (lambda function: task))

    def get(reference, timeout):
        if isinstance(given["told"], Exception):
            raise given["told"]
        return given["told"]

    monkeypatch.setattr(ray, "get", get)
    return given


def test_memory_of_gpus_is_what_torch_says_in_a_task_that_has_one(answers):
    answers["told"] = 20e9, "torch 2.13.0, CUDA 13.0"  # a MIG slice is as large as that
    cluster = ray_cluster("auto")
    assert cluster.nodes == (Machine(0, 0.0, None, HEAD_ID), Machine(8, 20e9, 1e11, BIG_ID))
    assert cluster.gpu_bytes() == {BIG_ID: 20e9}
    assert answers["asked"][0]["num_gpus"] > 0


def test_a_node_whose_torch_has_none_of_its_gpus_is_one_line(answers):
    answers["told"] = None, "torch 2.13.0+cpu, a CPU build"
    with pytest.raises(PlanError, match="node bb: Ray has 8 GPUs there and torch finds none .torch 2.13.0.cpu, a CPU"):
        ray_cluster("auto")
    answers["told"] = ray.exceptions.GetTimeoutError("x")
    with pytest.raises(PlanError, match="none was free to be asked"):
        ray_cluster("auto")
