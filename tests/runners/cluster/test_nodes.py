"""What the driver makes of the nodes that Ray tells of: devices, refusals, others' use, versions."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray

from deadbench.runners.cluster import actors, nodes
from deadbench.runners.cluster.head import HeadWatch, LostClusterError
from deadbench.runners.cluster.node_versions import differences
from deadbench.runners.cluster.nodes import Nodes, PlacementError, processes
from deadbench.runners.cluster.schedule import Piece, decide
from tests.runners.sleepers import sized, sleeping_jobs


def node(name, **resources):
    return {"NodeID": name, "Alive": True, "NodeManagerHostname": f"host-{name}", "Resources": resources}


@pytest.fixture
def told(monkeypatch):
    """What Ray tells of its nodes; a test may change it."""
    found = [node("a", CPU=4.0), node("b", CPU=16.0, GPU=8.0), node("c", CPU=16.0, GPU=4.0)]
    monkeypatch.setattr(ray, "nodes", lambda: list(found))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    return found


@pytest.fixture
def job(tmp_path):
    return sleeping_jobs(tmp_path, 1, (1.0,))[0]


def test_devices_are_gpus_where_there_are_any(told, job):
    seen = Nodes(5)
    assert {each.id: each.devices for each in seen.alive()} == {"a": 0, "b": 8, "c": 4}
    assert (seen.demand(sized(job, 0.25)).devices, seen.demand(sized(job, 4)).devices) == (0.25, 4)
    assert seen.options("b", 0.25, 0.25) == {"num_cpus": 0.25, "num_gpus": 0.25}
    assert seen.options("b", 4.0, 4.0) == {"num_cpus": 4, "num_gpus": 4}
    parameters = replace(job, reads=tuple(replace(read, engine=None) for read in job.reads))
    assert seen.demand(parameters).devices == 0, "headers and norms need no GPU"


def test_the_threads_of_an_actor_are_its_part_of_the_node(told, job):
    told[:] = [node("head", CPU=8.0), node("a", CPU=192.0, GPU=8.0)]
    seen = Nodes(1)
    assert seen.demand(sized(job, 1)).cpus == 23, "Ray makes OMP_NUM_THREADS of it"
    assert seen.options("a", 1.0, seen.demand(sized(job, 1)).cpus) == {"num_cpus": 23, "num_gpus": 1}
    told[:] = [node("a", CPU=4.0, GPU=8.0)]
    assert Nodes(1).demand(sized(job, 1)).cpus == 0.5


def test_a_model_goes_where_a_gpu_is_large_enough_and_its_host_memory_is_claimed(told, job):
    told[:] = [node("a", CPU=16.0, GPU=8.0, memory=100e9), node("b", CPU=16.0, GPU=8.0, memory=200e9)]
    seen = Nodes(1, gpu_bytes={"a": 24e9, "b": 80e9})
    large = seen.demand(replace(sized(job, 1), device_bytes=30e9, host_bytes=60e9))
    ((_, (piece,)),) = decide([large], seen.usable(), [])
    assert piece.node == "b"
    assert seen.options("b", 1.0, 1.0, piece.host_bytes) == {"num_cpus": 1, "num_gpus": 1, "memory": 60_000_000_000}
    assert len(decide([large] * 8, seen.usable(), [])) == 3, "of 200 GB"
    assert len(decide([replace(large, device_bytes=20e9)] * 8, seen.usable(), [])) == 4, "and one of 100 GB"


def test_without_gpus_a_node_is_cut_into_slots(told, job):
    told[:] = [node("a", CPU=4.0), node("b", CPU=1.0), node("c", CPU=0.0)]
    seen = Nodes(5)
    assert {each.id: each.devices for each in seen.alive()} == {"a": 2, "b": 1, "c": 0}
    assert seen.options("a", 1.0, 0.0) == {"num_cpus": 2}
    assert seen.options("b", 1.0, 0.0) == {"num_cpus": 1}
    assert Nodes(1).options("a", 1.0, 0.0) == {"num_cpus": 4}, "one model has the machine"


def test_what_no_node_can_hold_is_refused(told, job):
    with pytest.raises(PlacementError, match="m000: needs 16 GPUs; the cluster has 12"):
        Nodes(1).demand(sized(job, 16))
    with pytest.raises(PlacementError, match="m000: needs 12 GPUs, and over nodes vllm takes all 8 of each"):
        Nodes(1).demand(sized(job, 12))
    ranks = replace(job, tensor_parallel=13)
    with pytest.raises(PlacementError, match="m000: needs 13 GPUs; the cluster has 12"):
        Nodes(1).demand(ranks)
    assert Nodes(1, [(16, 8e10)]).demand(sized(job, 16)).devices == 16, "an autoscaler may add such a node"
    with pytest.raises(PlacementError, match="m000: needs 32 GPUs; the cluster has 28, with those of nodes to come"):
        Nodes(1, [(16, 8e10)]).demand(sized(job, 32))


def test_stages_are_on_nodes_that_give_as_many_gpus(told, job):
    told[:] = [node("a", CPU=16.0, GPU=8.0), node("b", CPU=16.0, GPU=4.0), node("c", CPU=16.0, GPU=4.0)]
    with pytest.raises(PlacementError, match="m000: needs 16 GPUs"):
        Nodes(1).demand(sized(job, 16))  # 8, 4 and 4 are as many, and no two stages
    told.append(node("d", CPU=16.0, GPU=8.0))
    seen = Nodes(1)
    demand = seen.demand(sized(job, 16))
    assert (demand.even, demand.ganged) == (True, True)
    ((_, place),) = decide([demand], seen.usable(), [])
    assert [(piece.node, len(piece.devices)) for piece in place] == [("a", 8), ("d", 8)]
    busy = [node for node in seen.usable() if node.id != "d"]
    assert decide([demand], busy, []) == [], "it waits for the other large one"
    assert not seen.demand(sized(job, 8)).even


def test_an_engine_over_nodes_is_one_actor_without_gpus_and_a_bundle_for_each_gpu(told, job, monkeypatch):
    told[:] = [node("a", CPU=8.0, GPU=2.0), node("b", CPU=8.0, GPU=2.0)]
    asked = {}

    def group(bundles, **options):
        asked.update(options, bundles=bundles)
        return "group"

    monkeypatch.setattr(importlib.import_module("ray.util.placement_group"), "placement_group", group)
    monkeypatch.setattr(
        "ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy", lambda *given, **more: (given, more)
    )
    seen = Nodes(1)
    demand = seen.demand(sized(job, 4))
    ((_, place),) = decide([demand], seen.usable(), [])
    made, (options,) = actors._options(seen, place, processes(sized(job, 4), 4))
    assert made == "group"
    assert options == {
        "num_cpus": 1,
        "scheduling_strategy": (("group", 0), {"placement_group_capture_child_tasks": True}),
    }
    assert asked["bundles"] == [{"CPU": 1}, {"CPU": 2, "GPU": 1}, *[{"CPU": 3, "GPU": 1}] * 3]
    homes = [each["ray.io/node-id"] for each in asked["bundle_label_selector"]]
    assert homes == ["a", "a", "a", "b", "b"], "the actor is beside the first stage"


def test_an_autoscaler_is_asked_for_all_at_once(told, job, monkeypatch):
    asked = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    seen = Nodes(2, [(8, 8e10)])
    seen.ask_for([seen.demand(sized(job, 0.5)), seen.demand(sized(job, 8)), seen.demand(sized(job, 16))])
    seen.ask_for(())
    assert asked == [[{"GPU": 0.5}, *[{"GPU": 8.0}] * 3], []]


def test_stages_are_on_nodes_that_have_yet_to_come_and_start_when_they_have(told, job):
    told[:] = [node("a", CPU=192.0, GPU=8.0)]
    with pytest.raises(PlacementError, match="m000: needs 24 GPUs; the cluster has 8$"):
        Nodes(1).demand(sized(job, 24))
    seen = Nodes(1, [(8, 8e10)] * 2)
    demand = seen.demand(sized(job, 24))
    assert (demand.even, demand.cpus) == (True, 23 * 24)
    assert decide([demand], seen.usable(), []) == [], "they are not there"
    told.extend([node("b", CPU=96.0, GPU=8.0), node("c", CPU=192.0, GPU=8.0)])
    seen.refresh([], 0.0, shared=False)
    demand = seen.with_cpus(demand)
    assert demand.cpus == 11 * 24, "of those that have come one has fewer CPUs"
    ((_, place),) = decide([demand], seen.usable(), [])
    assert [(piece.node, len(piece.devices)) for piece in place] == [("a", 8), ("b", 8), ("c", 8)]


def test_the_first_node_that_comes_says_how_many_cpus_go_with_a_gpu(told, job):
    told[:] = [node("a", CPU=8.0)]
    seen = Nodes(1, [(8, 8e10)])
    demand = seen.demand(sized(job, 2))
    assert demand.cpus == 2, "nobody knows yet"
    told.append(node("b", CPU=192.0, GPU=8.0))
    seen.refresh([], 0.0, shared=False)
    assert seen.with_cpus(demand).cpus == 46, "threads of two processes"
    assert seen.demand(sized(job, 2)) == seen.with_cpus(demand)
    parameters = replace(job, reads=tuple(replace(read, engine=None) for read in job.reads))
    assert seen.with_cpus(seen.demand(parameters)).cpus == 1


def test_a_model_waits_for_the_larger_gpus_that_are_to_come(told, job):
    told[:] = [node("a", CPU=16.0, GPU=8.0)]
    seen = Nodes(1, [(4, 8e10)], {"a": 24e9})
    demand = seen.demand(replace(sized(job, 1), device_bytes=30e9))
    assert decide([demand], seen.usable(), []) == []
    told.append(node("b", CPU=16.0, GPU=4.0))
    seen.refresh([], 0.0, shared=False)
    ((_, (piece,)),) = decide([demand], seen.usable(), [])
    assert piece.node == "b"


def test_what_others_use_is_not_ours_to_give(told, monkeypatch):
    free = {"a": {"CPU": 4.0}, "b": {"CPU": 13.0, "GPU": 5.0}, "c": {"CPU": 16.0, "GPU": 4.0}}
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: free)
    seen = Nodes(3)
    ours = [(Piece("b", (0, 1), 1.0, 2.0),)]
    seen.refresh(ours, seconds_unchanged=10.0, shared=True)
    assert {n.id: (n.foreign_devices, n.foreign_cpus) for n in seen.alive()} == {"a": (0, 0), "b": (1, 1), "c": (0, 0)}
    free["b"] = {"CPU": 8.0, "GPU": 0.0}
    seen.refresh(ours, seconds_unchanged=1.0, shared=True)
    assert seen.alive()[1].foreign_devices == 1, "what has just changed is not yet told apart"


def test_a_node_that_lost_something_is_left_alone_for_a_while(told, monkeypatch):
    seen, now = Nodes(3), [1000.0]
    monkeypatch.setattr(nodes.time, "monotonic", lambda: now[0])
    seen.suspect("b")
    assert [each.id for each in seen.usable()] == ["a", "c"]
    now[0] += 31
    assert [each.id for each in seen.usable()] == ["a", "b", "c"]


def test_without_its_own_node_the_driver_cannot_go_on(told):
    seen = Nodes(3)
    told[0]["Alive"] = False
    with pytest.raises(LostClusterError, match="the node of this driver"):
        seen.refresh([], 0.0, shared=False)


def test_versions_that_differ_are_refused_or_told():
    here = {"python": "3.11", "ray": "2.60.0", "deadbench": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"}
    assert differences("h", here, here) == ([], [])
    assert differences("h", here, here | {"torch": "2.12.0"}) == ([], ["node h has torch 2.12.0 (here 2.13.0)"])
    refused, told = differences("h", here, here | {"python": "3.12", "torch": "2.12.0"})
    assert refused == ["node h has python 3.12 (here 3.11)"]
    assert told == ["node h has torch 2.12.0 (here 2.13.0)"]
    assert differences("h", here, here | {"torch": None})[0] == ["node h has torch missing (here 2.13.0)"]


def test_a_head_that_is_silent_for_a_while_is_lost_and_one_that_pauses_is_not(monkeypatch):
    import socket

    now = [1000.0]
    monkeypatch.setattr(nodes.time, "monotonic", lambda: now[0])
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        with HeadWatch() as watch:
            now[0] += 3600  # as after a laptop's sleep
            watch.check()
            assert watch.answers()
            server.close()
            assert wait_for(lambda: not watch.answers())
            watch.check()
            now[0] += 21
            with pytest.raises(LostClusterError, match=f"the head of the cluster .{address}. answers no more"):
                watch.check()


def wait_for(condition, seconds=30.0):
    import threading

    pause = threading.Event()
    return any(condition() or pause.wait(0.05) for _ in range(int(seconds / 0.05)))
