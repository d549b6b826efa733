"""All checks of each node of a Ray, by a task on it, and of a group that has a rank on each."""

from collections.abc import Iterator
from typing import Any

from deadbench.runners.cluster.network import free_port
from deadbench.runners.doctor.before_run import free_gpus
from deadbench.runners.doctor.clock_check import clock_lines
from deadbench.runners.doctor.lines import Line, line_of
from deadbench.runners.doctor.node_checks import UnwellError
from deadbench.runners.doctor.one_process import Examined, examine_process
from deadbench.runners.doctor.rank_checks import agreed, reduced
from deadbench.suite.errors import message, one_line

_TASK_SECONDS = 300.0
_ACROSS_SECONDS = 60.0


def examine_nodes(address: str) -> Iterator[Examined]:
    """Each node by one task, which has the GPUs that are free there and CPUs as a model's actor has; then all together.

    Raises:
        ValueError: nobody answers at `address`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from deadbench.runners.cluster.joining import connect
    from deadbench.runners.cluster.node_versions import installed_versions
    from deadbench.runners.cluster.nodes import Nodes

    connection = connect(address)
    try:
        yield Examined(tuple(clock_lines([node for node in ray.nodes() if node["Alive"]])), None)
        nodes = Nodes(1)
        living = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)}
        free = free_gpus()
        asked: dict[str, Any] = {}
        for each in nodes.alive():
            if each.id not in living:
                continue  # a head that runs nothing
            gpus = each.devices if nodes.has_gpus else 0
            devices = max(1, free.get(each.id, 0)) if gpus else min(1, each.devices)
            options = nodes.options(each.id, devices, nodes.cpus_a_gpu if gpus else 1.0)
            where = NodeAffinitySchedulingStrategy(each.id, soft=False)
            task = ray.remote(max_retries=0, max_calls=1, scheduling_strategy=where, **options)(examine_process)
            ip = living[each.id]["NodeManagerAddress"]
            takes_models = bool(gpus) or not nodes.has_gpus
            asked[each.id] = task.remote(len(living), gpus, ip, installed_versions(), takes_models=takes_models)
        well = []
        for node, reference in asked.items():
            host = living[node]["NodeManagerHostname"]
            try:
                yield ray.get(reference, timeout=_TASK_SECONDS)
                well.append(living[node])
            except ray.exceptions.RayTaskError as error:
                yield Examined(
                    (Line(host, "reached", "wrong", f"cannot run deadbench ({message(error.cause)})"),), None
                )
            except ray.exceptions.GetTimeoutError:
                told = f"no room for a task within {_TASK_SECONDS:g} s; others use the node, or it hangs"
                yield Examined((Line(host, "reached", "wrong", told),), None)
            except ray.exceptions.RayError as error:
                yield Examined((Line(host, "reached", "wrong", one_line(error, 300)),), None)
        there = [each for each in well if each["Resources"].get("GPU", 0) or not nodes.has_gpus]
        if len(there) > 1:
            yield Examined((line_of("all", "reduce across nodes", lambda: _across(there, nodes.has_gpus)),), None)
    finally:
        connection.leave()


def _across(nodes: list[dict[str, Any]], on_gpus: bool) -> str:
    """A rank on each of `nodes`, of Ray's own words for them: they meet, and their sums agree.

    Raises:
        UnwellError: they do not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    size, addresses = len(nodes), [node["NodeManagerAddress"] for node in nodes]
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asks = {"max_retries": 0, "max_calls": 1}
    port = ray.remote(num_cpus=0, scheduling_strategy=places[0], **asks)(free_port)
    meeting = addresses[0], ray.get(port.remote(), timeout=_ACROSS_SECONDS)
    asks |= {"num_cpus": 0, "num_gpus": 1} if on_gpus else {"num_cpus": 1}
    ranks = [
        ray.remote(scheduling_strategy=place, **asks)(reduced).remote(rank, size, meeting, address)
        for rank, (place, address) in enumerate(zip(places, addresses, strict=True))
    ]
    try:
        return agreed(ray.get(ranks, timeout=_ACROSS_SECONDS), "on as many nodes")
    except ray.exceptions.GetTimeoutError as error:
        for rank in ranks:
            ray.cancel(rank, force=True)
        raise UnwellError(
            f"ranks on {', '.join(addresses)} have not met and summed within {_ACROSS_SECONDS:g} s; open the ports "
            "between the nodes, or name the interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise UnwellError(message(error.cause)) from error
