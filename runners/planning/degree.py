"""Over how many devices a model is shared."""

from deadbench.runners.planning.hardware import Cluster, Room, gigabytes
from deadbench.runners.planning.needs import Needs
from deadbench.runners.planning.sizes import ModelSize


def shared_by(size: ModelSize, need: Needs, cluster: Cluster, vllm: bool, asked: int | None) -> int | str | None:
    """The degree of tensor parallel: `asked`, or the smallest that divides and fits; None: none; or why not, in words.

    Beyond one node only by whole nodes, and by the torch engine.
    """
    node = cluster.largest
    room, counts = Room.of(cluster).device, size.divisors
    degrees: list[int] = [*range(2, node.gpus + 1)]
    if asked is not None and asked > 1:
        uneven = [f"{count} ({name})" for name, count in counts.items() if count % asked]
        if not size.has_plan and not vllm:
            return "transformers has no tensor-parallel plan for this architecture; give --tensor-parallel 1"
        if uneven:
            return f"--tensor-parallel {asked} does not divide {', '.join(uneven)}"
        there = node.gpus * (1 if vllm else len(cluster.nodes))
        if node.gpus and asked > there:
            return f"--tensor-parallel {asked}: {'the largest node' if vllm else 'the cluster'} has {there} GPUs"
        needed = need.sharded(asked) * (1 if node.gpus else asked)
        return asked if needed <= room else f"each of {asked} devices needs {gigabytes(need.sharded(asked))}; give more"
    if asked == 1 or not counts or not node.gpus or not (vllm or size.has_plan):
        return None
    if not vllm:
        degrees += [node.gpus * n for n in range(2, len(cluster.nodes) + 1)]
    for ranks in degrees:
        if all(count % ranks == 0 for count in counts.values()) and need.sharded(ranks) <= room:
            return ranks
    return None
