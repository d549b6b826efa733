"""Over how many devices a model is shared."""

from deadbench.runners.engines.registry import EngineSpec
from deadbench.runners.planning.hardware import Cluster, Room, gigabytes
from deadbench.runners.planning.needs import Needs
from deadbench.runners.planning.sizes import ModelSize


def shared_by(
    size: ModelSize, need: Needs, cluster: Cluster, engine: EngineSpec, asked: int | None
) -> int | str | None:
    """The tensor-parallel degree: `asked`, or the smallest that divides and fits; None: none; or why not, in words.

    Ranks take transformers' plan, and beyond one node only whole nodes, of the largest's shape.
    """
    node, ranks = cluster.largest, engine.tensor_parallel == "ranks"
    room, counts = Room.of(cluster).device, size.divisors
    if asked is not None and asked > 1:
        uneven = [f"{count} ({name})" for name, count in counts.items() if not _divides(name, count, asked, ranks)]
        if ranks and not size.has_plan:
            return "transformers has no tensor-parallel plan for this architecture; give --tensor-parallel 1"
        if uneven:
            return f"--tensor-parallel {asked} does not divide {', '.join(uneven)}"
        there = node.gpus * (cluster.alike if ranks else 1)
        if node.gpus and asked > there:
            return f"--tensor-parallel {asked}: {'the cluster' if ranks else 'the largest node'} has {there} GPUs"
        needed = need.sharded(asked) * (1 if node.gpus else asked)
        return asked if needed <= room else f"each of {asked} devices needs {gigabytes(need.sharded(asked))}; give more"
    if asked == 1 or not counts or not node.gpus or (ranks and not size.has_plan):
        return None
    degrees: list[int] = [*range(2, node.gpus + 1)]
    if ranks:
        degrees += [node.gpus * nodes for nodes in range(2, cluster.alike + 1)]
    for degree in degrees:
        if all(_divides(name, count, degree, ranks) for name, count in counts.items()) and need.sharded(degree) <= room:
            return degree
    return None


def _divides(name: str, count: int, degree: int, ranks: bool) -> bool:
    """Whether `degree` devices can share what there are `count` of; vLLM gives each a copy of too few KV heads."""
    replicated = not ranks and name == "num_key_value_heads" and degree > count
    return degree % count == 0 if replicated else count % degree == 0
