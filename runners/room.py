"""Where a model can go: the room that a node has for it, and among how many devices it can be shared."""

import math
from dataclasses import dataclass

from runners.cluster import Cluster, Node
from runners.needs import ModelSize, Needs

PROCESS_BYTES = 0.6e9  # what an actor holds with torch and transformers imported and no model
_USABLE = 0.9  # of a device's memory; the rest is the allocator's, the driver's and other processes'


@dataclass(frozen=True)
class Room:
    """What there is on the largest node: bytes of the device that runs the model, and of the host that loads it."""

    node: Node
    device: float
    host: float

    @classmethod
    def of(cls, cluster: Cluster) -> "Room":
        """That of the largest node."""
        node = cluster.largest
        host = (node.host_bytes or math.inf) - PROCESS_BYTES
        return cls(node, _USABLE * (node.gpu_bytes if node.gpus else host), _USABLE * host)

    @property
    def on_gpu(self) -> bool:
        """Whether models run on GPUs."""
        return self.node.gpus > 0

    def label(self, loadable: bool) -> str:
        """The memory that is too small, in words: the host's where the model cannot even be loaded."""
        if self.on_gpu and loadable:
            return f"a GPU of {gigabytes(self.node.gpu_bytes)}"
        return f"{gigabytes(self.node.host_bytes or 0)} of memory"


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


def gigabytes(value: float) -> str:
    """`1.5 GB`."""
    return f"{value / 1e9:.1f} GB"
