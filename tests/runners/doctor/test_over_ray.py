"""A rank on each node, without Ray: what each task is asked, and what is said where they do not meet."""

from types import SimpleNamespace

import pytest
import ray

from deadbench.runners.doctor import over_ray
from deadbench.runners.doctor.node_checks import UnwellError
from deadbench.runners.doctor.rank_checks import Reduced, reduced

NODES = [{"NodeID": name * 28, "NodeManagerAddress": f"10.0.0.{at}"} for at, name in enumerate(("aa", "bb", "cc"), 1)]


@pytest.fixture
def tasks(monkeypatch):
    """Ray, as far as it is asked: `.ranks` that were started, as (options, arguments), `.told` by them."""
    seen = SimpleNamespace(ranks=[], told=[Reduced("a", 1e9)] * len(NODES), cancelled=[])
    monkeypatch.setattr("ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy", lambda node, soft: node[:2])

    def remote(**options):
        def task(function):
            def start(*arguments):
                if function is not reduced:
                    return ("port", options["scheduling_strategy"])
                seen.ranks.append((options, arguments))
                return len(seen.ranks) - 1

            return SimpleNamespace(remote=start)

        return task

    def get(reference, timeout):
        if reference == ("port", "aa"):
            return 4711
        if isinstance(seen.told, Exception):
            raise seen.told
        return seen.told

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "cancel", lambda reference, force: seen.cancelled.append(reference))
    return seen


@pytest.mark.parametrize("on_gpus", [True, False])
def test_ranks_meet_at_the_first_and_each_takes_its_own_interface(tasks, on_gpus):
    assert over_ray._across(NODES, on_gpus) == "3 ranks on as many nodes sum at 1 GB/s, to the same bits"
    assert [options["scheduling_strategy"] for options, _ in tasks.ranks] == ["aa", "bb", "cc"]
    assert {options.get("num_gpus") for options, _ in tasks.ranks} == {1 if on_gpus else None}
    assert [given for _, given in tasks.ranks] == [
        (rank, 3, ("10.0.0.1", 4711), node["NodeManagerAddress"]) for rank, node in enumerate(NODES)
    ]


def test_ranks_that_do_not_meet_are_one_line_and_end(tasks):
    tasks.told = ray.exceptions.GetTimeoutError("x")
    with pytest.raises(UnwellError, match=r"^ranks on 10.0.0.1, 10.0.0.2, 10.0.0.3 have not met .* open the ports"):
        over_ray._across(NODES, False)
    assert tasks.cancelled == [0, 1, 2]


def test_sums_that_differ_between_nodes_are_wrong(tasks):
    tasks.told = [Reduced("a", 1e9), Reduced("a", 1e9), Reduced("b", 1e9)]
    with pytest.raises(UnwellError, match="sums of rank 2 are not those of rank 0"):
        over_ray._across(NODES, False)
