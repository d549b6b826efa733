"""The doctor's short round, before a run: facts of the nodes that have GPUs, by a task on each, and no model."""

import time
from typing import Any

from deadbench.runners.cluster.node_versions import installed_versions
from deadbench.runners.doctor.facts import Facts, facts, gpus_of_driver
from deadbench.runners.doctor.lines import node_lines
from deadbench.suite.errors import message, one_line

# Versions were compared when the cluster was joined, checkpoints may all be local, threads are an actor's, and vLLM not
# every run's.
_CHECKS = ("gpus", "gpu memory", "memory", "shared memory", "disk", "open files", "network")
_FATAL = "gpus"  # every read there would fail, or run on another's GPU
_SETTLED_SECONDS = 2.0
_SECONDS = 30.0  # of all nodes together; most of it the import of torch


def check_gpu_nodes() -> tuple[list[str], list[str]]:
    """(what no read survives, what may do harm), a line each, of the nodes of the Ray that was joined that have GPUs.

    A task on each looks at the GPUs that are free there: this process opens none.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    living = [node for node in ray.nodes() if node["Alive"]]
    with_gpus = [node for node in living if int(node["Resources"].get("GPU", 0))]
    free = free_gpus() if with_gpus else {}
    asked: list[tuple[str, Any]] = []
    fatal: list[str] = []
    doubtful: list[str] = []
    for node in with_gpus:
        host, gpus = node["NodeManagerHostname"], free.get(node["NodeID"], 0)
        if not gpus:
            doubtful.append(f"{host}: its GPUs are all in use, so they were not looked at")
            continue
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0, max_calls=1, scheduling_strategy=where)(facts)
        asked.append((host, task.remote(len(living), int(node["Resources"]["GPU"]), node["NodeManagerAddress"])))
    until = time.monotonic() + _SECONDS
    for host, reference in asked:
        try:
            found = ray.get(reference, timeout=max(0.0, until - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            ray.cancel(reference, force=True)
            doubtful.append(f"{host}: not looked at within {_SECONDS:g} s")
        except ray.exceptions.RayTaskError as error:
            doubtful.append(f"{host}: cannot be looked at ({message(error.cause)})")
        except ray.exceptions.RayError as error:
            doubtful.append(f"{host}: cannot be looked at ({one_line(error, 300)})")
        else:
            wrong, unlike = judged(found)
            fatal += wrong
            doubtful += unlike
    return fatal, doubtful


def free_gpus() -> dict[str, int]:
    """Whole GPUs that nobody has taken, of each node by Ray's id; what a task has just given back, Ray tells later."""
    import ray
    from ray._private.state import available_resources_per_node  # no public call tells it by node

    has = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]}
    until = time.monotonic() + _SETTLED_SECONDS
    while True:
        left = available_resources_per_node()
        free = {node: int(left.get(node, {}).get("GPU", 0)) for node in has}
        if free == has or time.monotonic() >= until:
            return free
        time.sleep(0.1)


def check_own_gpus() -> list[str]:
    """What may do harm where this process is the whole run: the lines of its own machine, if it has a GPU."""
    if not gpus_of_driver():
        return []
    fatal, doubtful = judged(facts())
    return [*fatal, *doubtful]


def judged(found: Facts) -> tuple[list[str], list[str]]:
    """(what no read survives, what may do harm) of one node, a line each."""
    lines = [line for line in node_lines(found, installed_versions(), _CHECKS) if line.verdict == "wrong"]
    told = [(line.check, f"{line.node}: {line.check}: {line.told}") for line in lines]
    return [text for check, text in told if check == _FATAL], [text for check, text in told if check != _FATAL]
