"""The doctor's round: each node's facts, then its devices and a read; every check a line, whatever the others say."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deadbench.runners.doctor.device_checks import DEVICE_CHECKS, Bench
from deadbench.runners.doctor.facts import facts
from deadbench.runners.doctor.lines import Line, line_of, node_lines
from deadbench.runners.doctor.rates import keep
from deadbench.runners.doctor.read_checks import twin
from deadbench.runners.planning.seconds import Rates, Work, projected
from deadbench.suite.errors import message, one_line

_TASK_SECONDS = 300.0
# (name, parameters, hidden size, blocks): what times are projected for.
_SIZES = (("8B", 8e9, 4096, 32), ("70B", 70e9, 8192, 80))
_NOT_COVERED = "a group of ranks, vLLM started, and peaks against the plan are not tried"


@dataclass(frozen=True)
class Examined:
    """What one process found of its node: lines, and the rates of its device."""

    lines: tuple[Line, ...]
    rates: Rates | None


def examine_here(address: str | None = None) -> Iterator[Line]:
    """The lines of this machine, or of each node of the Ray at `address`, as they come; rates are stored here.

    Raises:
        ValueError: nobody answers at `address`.
    """
    found = [examine_process()] if address is None else _over_ray(address)
    rates = []
    for each in found:
        yield from each.lines
        rates += [each.rates] if each.rates is not None else []
    for rate in {each.device: each for each in rates}.values():
        for name, parameters, hidden_size, num_blocks in _SIZES:
            tokens = 8 * hidden_size
            work = Work(tokens, tokens, 2 * parameters, num_blocks + 1, hidden_size, 0, 0, "bfloat16", 1)
            taken = projected(work, rate)
            told = (
                f"about {taken.total:.3g} s on one {rate.device} once it is loaded, most of it {taken.most} "
                f"({taken.forward:.2g} s forward)"
            )
            yield Line("all", f"projected {name}", "ok", told)
    if rates:
        yield Line("all", "rates kept", "ok", str(keep(rates)))
    yield Line("all", "ranks and vLLM", "skipped", _NOT_COVERED)


def examine_process(
    num_nodes: int = 1,
    num_gpus: int | None = None,
    address: str | None = None,
    here: dict[str, str | None] | None = None,
) -> Examined:
    """All checks of the node and the device of this process; `here`: the driver's versions, if it is another's."""
    import torch

    found = facts(num_nodes, num_gpus, address)
    lines = [*node_lines(found, found.versions if here is None else here)]
    bench = Bench(torch.device("cuda" if found.gpus else "cpu"))
    lines += [*device_lines(found.node, bench), line_of(found.node, "twin", twin)]
    return Examined(tuple(lines), bench.rates)


def device_lines(node: str, bench: Bench) -> Iterator[Line]:
    """A line for each of `DEVICE_CHECKS`."""
    for name, check in DEVICE_CHECKS.items():
        yield line_of(node, name, lambda check=check: check(bench))  # type: ignore[misc]


def _over_ray(address: str) -> Iterator[Examined]:
    """Each node by one task, which has one GPU of it where there are any, and the CPUs of a model's actor."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from deadbench.runners.cluster.joining import connect
    from deadbench.runners.cluster.node_versions import installed_versions
    from deadbench.runners.cluster.nodes import Nodes

    connection = connect(address)
    try:
        nodes = Nodes(1)
        living = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)}
        asked: dict[str, Any] = {}
        for each in nodes.alive():
            if each.id not in living:
                continue  # a head that runs nothing
            gpus = each.devices if nodes.has_gpus else 0
            options = nodes.options(each.id, min(1, each.devices), nodes.cpus_a_gpu if gpus else 1.0)
            where = NodeAffinitySchedulingStrategy(each.id, soft=False)
            task = ray.remote(max_retries=0, max_calls=1, scheduling_strategy=where, **options)(examine_process)
            ip = living[each.id]["NodeManagerAddress"]
            asked[each.id] = task.remote(len(living), gpus, ip, installed_versions())
        for node, reference in asked.items():
            host = living[node]["NodeManagerHostname"]
            try:
                yield ray.get(reference, timeout=_TASK_SECONDS)
            except ray.exceptions.RayTaskError as error:
                yield Examined(
                    (Line(host, "reached", "wrong", f"cannot run deadbench ({message(error.cause)})"),), None
                )
            except ray.exceptions.GetTimeoutError:
                told = f"no room for a task within {_TASK_SECONDS:g} s; others use the node, or it hangs"
                yield Examined((Line(host, "reached", "wrong", told),), None)
            except ray.exceptions.RayError as error:
                yield Examined((Line(host, "reached", "wrong", one_line(error, 300)),), None)
    finally:
        connection.leave()
