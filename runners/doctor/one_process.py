"""All checks of one node and its device, by one process on it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from deadbench.runners.doctor.device_checks import DEVICE_CHECKS, Bench
from deadbench.runners.doctor.facts import facts
from deadbench.runners.doctor.hub_check import hub
from deadbench.runners.doctor.lines import Line, line_of, node_lines
from deadbench.runners.doctor.planned_memory import planned_memory
from deadbench.runners.doctor.rank_checks import rank_lines
from deadbench.runners.doctor.read_checks import twin
from deadbench.runners.doctor.small_models import state_spaces
from deadbench.runners.doctor.vllm_check import vllm_start, vllm_state_space
from deadbench.runners.planning.seconds import Rates

# By the name of its line; where reads get their checkpoints from is the first.
READ_CHECKS: dict[str, Callable[[], str]] = {
    "hub": hub,
    "twin": twin,
    "state space": state_spaces,
    "planned memory": planned_memory,
}


@dataclass(frozen=True)
class Examined:
    """What one process found of its node: lines, and the rates of its device."""

    lines: tuple[Line, ...]
    rates: Rates | None


def examine_process(
    num_nodes: int = 1,
    num_gpus: int | None = None,
    address: str | None = None,
    here: dict[str, str | None] | None = None,
    *,
    takes_models: bool = True,
) -> Examined:
    """All checks of the node and the device of this process; `here`: the driver's versions, if it is another's.

    `takes_models`: a head without GPUs takes none where others have some: neither ranks nor vLLM run there.
    """
    import torch

    found = facts(num_nodes, num_gpus, address)
    lines = [*node_lines(found, found.versions if here is None else here)]
    bench = Bench(torch.device("cuda" if found.gpus else "cpu"))
    lines += device_lines(found.node, bench)
    lines += [line_of(found.node, name, read) for name, read in READ_CHECKS.items()]
    if takes_models and len(found.gpus) == found.given:
        lines += rank_lines(found.node, len(found.gpus))
        lines.append(line_of(found.node, "vllm start", lambda: vllm_start(len(found.gpus))))
        lines.append(line_of(found.node, "vllm state space", vllm_state_space))
    return Examined(tuple(lines), bench.rates)


def device_lines(node: str, bench: Bench) -> Iterator[Line]:
    """A line for each of `DEVICE_CHECKS`."""
    for name, check in DEVICE_CHECKS.items():
        yield line_of(node, name, lambda check=check: check(bench))  # type: ignore[misc]
