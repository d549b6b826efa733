"""What a cluster is to the plan: nodes, their GPUs and memory; assumed, found here, or asked of Ray."""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deadbench.suite.errors import first_line

PROCESS_BYTES = 0.6e9  # what an actor holds with torch and transformers imported and no model
_ASK_SECONDS = 120.0
NO_RAY = "none"  # the address of a run in one process
SHARES = (0.125, 0.25, 0.5)  # of one device that a small model may ask for
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, and either under WSL
_MOST_DIGITS = 5  # of a shape's counts and sizes: each node that is assumed is one that is gone through
_USABLE = 0.9  # of a device's memory; the rest is the allocator's, the driver's and other processes'


class PlanError(ValueError):
    """A cluster that cannot be understood or reached; one line."""


@dataclass(frozen=True)
class Machine:
    """One machine: its GPUs, bytes of each, bytes of host memory (None: not known), and Ray's id for it."""

    gpus: int
    gpu_bytes: float
    host_bytes: float | None
    id: str | None = None


@dataclass(frozen=True)
class Cluster:
    """Where models would run; the last `to_come` of its nodes are those that an autoscaler may add."""

    nodes: tuple[Machine, ...]
    label: str
    assumed: bool = False
    to_come: int = 0

    def gpu_bytes(self) -> dict[str, float]:
        """Bytes of a GPU of each node that is one of Ray's, by Ray's id."""
        return {node.id: node.gpu_bytes for node in self.nodes if node.id is not None and node.gpus}

    def with_nodes(self, added: "Cluster") -> "Cluster":
        """The same with those that an autoscaler may add."""
        label = f"{self.label}, and {added.label} to come"
        return Cluster((*self.nodes, *added.nodes), label, self.assumed, len(added.nodes))

    def here(self) -> "Cluster":
        """The same without those to come."""
        return Cluster(self.nodes[: len(self.nodes) - self.to_come], self.label, self.assumed)

    @property
    def alike(self) -> int:
        """How many nodes have the largest's GPUs, of its size or more: a head without any shares no model."""
        top = self.largest
        return sum(node.gpus == top.gpus and node.gpu_bytes >= 0.95 * top.gpu_bytes for node in self.nodes)

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
    if any(len(count) > _MOST_DIGITS for count in (match[1] or "", match[2], match[3].partition(".")[0])):
        raise PlanError(f"{option}: a number of more than {_MOST_DIGITS} digits; no cluster is so large")
    nodes, gpus, size = int(match[1] or 1), int(match[2]), float(match[3]) * 1e9
    node = Machine(gpus, size if gpus else 0.0, None if gpus else size)
    return Cluster((node,) * nodes, text, assumed=True)


def parse_nodes(text: str, option: str) -> Cluster:
    """As `parse_cluster`, of nodes with GPUs.

    Raises:
        PlanError: they have none, or it is no shape.
    """
    cluster = parse_cluster(text, option)
    if not cluster.largest.gpus:
        raise PlanError(f"{option} {text!r}: nodes without GPUs are not asked for; give GPUs x memory, such as 8x80GB")
    return cluster


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

    from deadbench.runners.engines.device import usable_gpus

    return [torch.cuda.get_device_properties(i).total_memory for i in range(usable_gpus())]


def ray_cluster(address: str) -> Cluster:
    """The nodes of the Ray at `address`, which is joined; GPU memory is what torch says of it in a task there.

    Raises:
        PlanError: torch finds no GPU on a node where Ray has some, or none could be asked.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A thousandth: also where GPUs are in use. By torch: what the driver's own tools list need not be what it can use.
    ask = ray.remote(num_cpus=0, num_gpus=0.001, max_retries=0, max_calls=1)(_torch_gpu_bytes)
    found = []
    for node in (each for each in ray.nodes() if each["Alive"]):
        gpus = int(node["Resources"].get("GPU", 0))
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        size = _told(ray, ask.options(scheduling_strategy=where).remote(), node) if gpus else 0.0
        found.append(Machine(gpus, size, float(node["Resources"].get("memory", 0)) or None, node["NodeID"]))
    return Cluster(tuple(found), f"Ray at {address} ({len(found)} nodes)")


def _told(ray: Any, reference: Any, node: dict[str, Any]) -> float:
    where = f"node {node['NodeManagerHostname']}: Ray has {node['Resources']['GPU']:g} GPUs there and"
    try:
        size, built = ray.get(reference, timeout=_ASK_SECONDS)
    except ray.exceptions.GetTimeoutError as error:
        raise PlanError(f"{where} none was free to be asked for its memory within {_ASK_SECONDS:g} s") from error
    except ray.exceptions.RayError as error:
        raise PlanError(f"{where} torch cannot be asked ({first_line(error)})") from error
    if size is None:
        raise PlanError(f"{where} torch finds none ({built}); `deadbench doctor --address …` says more")
    return float(size)


def _torch_gpu_bytes() -> tuple[float | None, str]:
    """(memory of the GPU of this task, None where torch finds none; what torch was built for)."""
    import torch

    built = f"torch {torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build")
    if not torch.cuda.is_available():
        return None, built
    return float(torch.cuda.get_device_properties(0).total_memory), built


def gigabytes(value: float) -> str:
    """`1.5 GB`."""
    return f"{value / 1e9:.1f} GB"
