"""Over how many devices a model is shared."""

from deadbench.runners.engines.registry import EngineSpec
from deadbench.runners.planning.hardware import Cluster, Room, gigabytes
from deadbench.runners.planning.needs import Needs
from deadbench.runners.planning.sizes import ModelSize


def shared_by(
    size: ModelSize, need: Needs, cluster: Cluster, engine: EngineSpec, asked: int | None
) -> int | str | None:
    """The tensor-parallel degree: `asked`, or the smallest that divides and fits; None: none; or why not, in words.

    Ranks take transformers' plan. Beyond one node only whole nodes are taken, of the largest's shape; in stages, each
    node's GPUs share its part of the blocks, and it is they that must divide.
    """
    node, ranks = cluster.largest, engine.tensor_parallel == "ranks"
    room, counts = Room.of(cluster).device, size.divisors
    if asked is not None and asked > 1:
        within = asked if ranks else min(asked, node.gpus or asked)
        uneven = [f"{count} ({name})" for name, count in counts.items() if not _divides(name, count, within, ranks)]
        if ranks and not size.has_plan:
            return "transformers has no tensor-parallel plan for this architecture; give --tensor-parallel 1"
        if uneven:
            each = "" if within == asked else f": {within} on each node"
            return f"--tensor-parallel {asked}{each} does not divide {', '.join(uneven)}"
        there = node.gpus * cluster.alike
        if node.gpus and asked > there:
            come = ", with those of nodes to come" if cluster.to_come else ""
            return f"--tensor-parallel {asked}: the cluster has {there} GPUs{come}"
        if refused := None if ranks else _no_stages(asked, node.gpus, size):
            return f"--tensor-parallel {asked}: {refused}"
        needed = need.sharded(asked) * (1 if node.gpus else asked)
        return asked if needed <= room else f"each of {asked} devices needs {gigabytes(need.sharded(asked))}; give more"
    if asked == 1 or not counts or not node.gpus or (ranks and not size.has_plan):
        return None
    degrees: list[int] = [*range(2, node.gpus + 1), *(node.gpus * nodes for nodes in range(2, cluster.alike + 1))]
    for degree in degrees:
        within = degree if ranks else min(degree, node.gpus)
        possible = all(_divides(name, count, within, ranks) for name, count in counts.items())
        if possible and (ranks or not _no_stages(degree, node.gpus, size)) and need.sharded(degree) <= room:
            return degree
    return None


def _no_stages(degree: int, gpus: int, size: ModelSize) -> str | None:
    """Why `degree` GPUs, beyond the `gpus` of a node, are no stages of the model; None if they are."""
    if not gpus or degree <= gpus:
        return None
    if degree % gpus:
        return f"over several nodes each gives all of its {gpus} GPUs; give {degree // gpus * gpus}"
    if degree // gpus > size.num_taps - 1:
        return f"{size.num_taps - 1} blocks are no {degree // gpus} stages; give {gpus * (size.num_taps - 1)}"
    return None


def _divides(name: str, count: int, degree: int, ranks: bool) -> bool:
    """Whether `degree` devices can share what there are `count` of; vLLM gives each a copy of too few KV heads."""
    replicated = not ranks and name == "num_key_value_heads" and degree > count
    return degree % count == 0 if replicated else count % degree == 0
