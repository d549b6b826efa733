"""What a cluster is to the plan: nodes, their GPUs and memory; assumed, found here, or asked of Ray."""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

PROCESS_BYTES = 0.6e9  # what an actor holds with torch and transformers imported and no model
NO_RAY = "none"  # the address of a run in one process
SHARES = (0.125, 0.25, 0.5)  # of one device that a small model may ask for
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, and either under WSL
_USABLE = 0.9  # of a device's memory; the rest is the allocator's, the driver's and other processes'


class PlanError(ValueError):
    """A cluster that cannot be understood or reached; one line."""


@dataclass(frozen=True)
class Machine:
    """One machine: its GPUs, bytes of each, and bytes of host memory (None: not known)."""

    gpus: int
    gpu_bytes: float
    host_bytes: float | None


@dataclass(frozen=True)
class Cluster:
    """Where models would run."""

    nodes: tuple[Machine, ...]
    label: str
    assumed: bool = False

    def with_node(self, node: Machine) -> "Cluster":
        """The same with one more node."""
        return Cluster((*self.nodes, node), self.label)

    @property
    def largest(self) -> Machine:
        """The node with the most GPU memory; without GPUs, with the most host memory."""
        return max(self.nodes, key=lambda node: (node.gpus * node.gpu_bytes, node.host_bytes or 0))


@dataclass(frozen=True)
class Room:
    """What there is on the largest node: bytes of the device that runs the model, and of the host that loads it."""

    node: Machine
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


def parse_cluster(text: str, option: str = "--assume") -> Cluster:
    """`8x80GB` (GPUs of one node) or `2x8x141GB` (nodes x GPUs); `0x16GB` is a node of that host memory without GPUs.

    Raises:
        PlanError: anything else.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+(?:\.\d+)?)GB", text.strip(), re.IGNORECASE)
    if match is None or match[1] == "0" or float(match[3]) == 0:
        raise PlanError(f"{option} {text!r}: give GPUs x memory, such as 1x24GB or 8x80GB, or nodes first: 2x8x141GB")
    nodes, gpus, size = int(match[1] or 1), int(match[2]), float(match[3]) * 1e9
    node = Machine(gpus, size if gpus else 0.0, None if gpus else size)
    return Cluster((node,) * nodes, text, assumed=True)


def this_machine(most_gpus: int | None = None) -> Cluster:
    """The memory and the GPUs that are here, or so many of them at most: the first ones."""
    import psutil

    sizes = _gpu_bytes()[:most_gpus] if _may_have_gpus() else []
    count = len(sizes)
    node = Machine(count, float(min(sizes, default=0)), float(psutil.virtual_memory().total))
    return Cluster((node,), f"this machine ({count} GPUs, {node.host_bytes / 1e9:.0f} GB)")  # type: ignore[operator]


def _may_have_gpus() -> bool:
    """Whether torch, which takes seconds to import, could find a GPU: Linux shows the driver of one as a device."""
    return sys.platform != "linux" or any(Path(device).exists() for device in _GPU_DEVICES)


def _gpu_bytes() -> list[int]:
    import torch

    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def ray_cluster(address: str) -> Cluster:
    """The nodes of the Ray at `address`, which is joined; GPU memory is asked of each node's driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(_smallest_gpu_bytes)
    found = []
    for node in (each for each in ray.nodes() if each["Alive"]):
        gpus = int(node["Resources"].get("GPU", 0))
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        size = ray.get(ask.options(scheduling_strategy=where).remote()) if gpus else 0.0
        found.append(Machine(gpus, size, float(node["Resources"].get("memory", 0)) or None))
    return Cluster(tuple(found), f"Ray at {address} ({len(found)} nodes)")


def _smallest_gpu_bytes() -> float:
    """Memory of the smallest GPU of this node, whatever CUDA_VISIBLE_DEVICES says."""
    import subprocess

    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return min(float(each) for each in listed) * 2**20


def gigabytes(value: float) -> str:
    """`1.5 GB`."""
    return f"{value / 1e9:.1f} GB"
