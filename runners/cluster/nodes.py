"""The nodes of the Ray that the driver has joined: which live, their devices, what others use, their versions."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deadbench.runners.cluster.head import LostClusterError
from deadbench.runners.cluster.schedule import Demand, Node, Place, can_ever
from deadbench.runners.engines.registry import ENGINES
from deadbench.runners.jobs.job import ModelJob

_CPU_SLOTS = 2  # of a node without GPUs: while one model loads, the other computes
_SETTLED_SECONDS = 3.0  # after which Ray's view of what is free includes what we started
_SUSPECT_SECONDS = 30.0  # how long a node that lost an actor is left alone; by then Ray knows whether it lives


class PlacementError(ValueError):
    """A model that no node, or no set of nodes, can hold; one line."""


class Nodes:
    """What the cluster has, as the schedule wants it. A device is a GPU; without any, a slot of CPUs.

    Attributes:
        cpus_a_gpu: the CPUs that go with a GPU, of which a process makes its threads: of the nodes with GPUs that were
            seen, the fewest.
    """

    def __init__(
        self,
        num_jobs: int,
        to_come: Sequence[tuple[int, float]] = (),
        gpu_bytes: Mapping[str, float] | None = None,
    ):
        """Look at the cluster; `to_come`: (GPUs, bytes of each) of the nodes that an autoscaler may add.

        `gpu_bytes`: of a GPU of each node, by Ray's id, where they are known.
        """
        import ray

        self._ray = ray
        self._mine = ray.get_runtime_context().get_node_id()
        self._gpu_bytes, self._to_come = gpu_bytes or {}, tuple(to_come)
        self._suspects: dict[str, float] = {}
        self._foreign: dict[str, tuple[float, float]] = {}
        self._read()
        self.has_gpus = bool(to_come) or any(node.get("GPU", 0) for node in self._resources.values())
        self._slots = max(1, min(num_jobs, _CPU_SLOTS))
        self._at_first, self._fewest_cpus = self.alive(), math.inf
        self._count_cpus()
        self.largest = max((node.devices for node in self._planned()), default=0)
        self._total = sum(node.devices for node in self._planned())

    def _planned(self) -> list[Node]:
        """The nodes that were there at first, and those to come, whose CPUs are taken to be as many."""
        cpus = self.cpus_a_gpu
        come = [Node(f"to come {n}", gpus, gpus * cpus, 0.0, 0.0, size) for n, (gpus, size) in enumerate(self._to_come)]
        return [*self._at_first, *come]

    def _count_cpus(self) -> None:
        """Once more, since nodes may have come: where none with GPUs was there at first, the first one says it."""
        seen = [_cpus_a_gpu(node) for node in self.alive() if node.devices and self.has_gpus]
        self._fewest_cpus = min([self._fewest_cpus, *seen])
        self.cpus_a_gpu = self._fewest_cpus if math.isfinite(self._fewest_cpus) else 1.0

    def _read(self) -> None:
        found = self._ray.nodes()
        self._resources = {node["NodeID"]: dict(node["Resources"]) for node in found if node["Alive"]}
        self._names = {n["NodeID"]: f"{n['NodeManagerHostname']} {n['NodeID'][:6]}" for n in found}

    def refresh(self, places: Iterable[Place], seconds_unchanged: float, *, shared: bool) -> None:
        """Look again. Where others share the cluster, what they use is what is neither free nor in our `places`.

        Raises:
            LostClusterError: this driver's own node is no longer of the cluster.
        """
        self._read()
        if self._mine not in self._resources:
            raise LostClusterError("the node of this driver has left the cluster")
        self._count_cpus()
        if not shared or seconds_unchanged < _SETTLED_SECONDS:
            return
        from ray._private.state import available_resources_per_node  # no public call tells it by node

        ours: Counter[tuple[str, str]] = Counter()
        for place in places:
            for piece in place:
                options = self.options(piece.node, piece.share * len(piece.devices), piece.cpus)
                for key, name in (("num_gpus", "GPU"), ("num_cpus", "CPU")):
                    ours[piece.node, name] += options.get(key, 0)
        free = available_resources_per_node()
        foreign = {}
        for node, total in self._resources.items():
            used = {n: total.get(n, 0) - free.get(node, {}).get(n, 0) - ours[node, n] for n in ("GPU", "CPU")}
            slot = total.get("CPU", 0) / self._slots
            devices = used["GPU"] if self.has_gpus else used["CPU"] / slot if slot else 0.0
            foreign[node] = max(0.0, round(devices, 3)), max(0.0, round(used["CPU"], 3))
        self._foreign = foreign

    def alive(self) -> list[Node]:
        """The nodes that live."""
        found = []
        for node, has in self._resources.items():
            cpus = float(has.get("CPU", 0))
            devices = int(has.get("GPU", 0)) if self.has_gpus else min(self._slots, int(cpus))
            sizes = self._bytes_of_a_gpu(node, devices), float(has.get("memory", math.inf))
            found.append(Node(node, devices, cpus, *self._foreign.get(node, (0.0, 0.0)), *sizes))
        return found

    def _bytes_of_a_gpu(self, node: str, gpus: int) -> float:
        """As it was found; of a node that has come since, as was said of those that would."""
        of_its_shape = min((size for count, size in self._to_come if count == gpus), default=math.inf)
        return self._gpu_bytes.get(node, of_its_shape)

    def names(self, ids: Iterable[str]) -> list[str]:
        """What people call the nodes."""
        return sorted(self._names.get(each, each) for each in ids)

    def facts(self) -> list[dict[str, Any]]:
        """The nodes that live, for the record of the run."""
        return [{"name": self._names[n.id], "devices": n.devices, "cpus": n.cpus} for n in self.alive()]

    def usable(self) -> list[Node]:
        """The nodes that live and are under no suspicion."""
        now = time.monotonic()
        return [node for node in self.alive() if now >= self._suspects.get(node.id, 0.0)]

    def suspect(self, node: str) -> None:
        """Something was lost there: it may be dying, which Ray learns later."""
        self._suspects[node] = time.monotonic() + _SUSPECT_SECONDS

    def devices(self, job: ModelJob) -> int:
        """How many devices share the model, or divide its tokens: as asked, else, with GPUs, the registry's `gpus`.

        Raises:
            PlacementError: more than there are.
        """
        spec = ENGINES[job.engine] if job.engine else None
        if job.replicas == 1 and (spec is None or spec.tensor_parallel is None):
            return 1
        tensor_parallel = job.tensor_parallel or (job.gpus if self.has_gpus else 1)
        devices = job.replicas if job.replicas > 1 else tensor_parallel
        if self.has_gpus and devices > self._total:
            come = ", with those of nodes to come" if self._to_come else ""
            raise PlacementError(f"{job.model_id}: needs {devices} GPUs; the cluster has {self._total}{come}")
        if self.has_gpus and in_stages(job) and devices > self.largest and devices % self.largest:
            raise PlacementError(
                f"{job.model_id}: needs {devices} GPUs, and over nodes {job.engine} takes all {self.largest} of each"
            )
        return devices

    def demand(self, job: ModelJob, avoid: frozenset[str] = frozenset()) -> Demand:
        """What the model asks of the schedule.

        Raises:
            PlacementError: no node has that, or would have it.
        """
        count, planned = self.devices(job), self._planned()
        ganged = processes(job, count) > 1
        seconds = estimated_seconds(job, count, self.has_gpus)
        if not self.has_gpus:
            demand = Demand(min(count, max(1, self.largest)), 0.0, seconds, ganged, avoid)
        elif job.engine is None:
            demand = Demand(0, min(1.0, self.cpus_a_gpu), seconds, False, avoid)
        else:
            share = job.gpu_share if count == 1 else count
            host = min((node.host_bytes for node in planned if node.devices), default=math.inf)
            most = max([*self._gpu_bytes.values(), *(size for _, size in self._to_come)], default=math.inf)
            sizes = min(job.device_bytes, most), min(job.host_bytes, host)
            even = in_stages(job) and count > self.largest
            demand = Demand(share, self.cpus_a_gpu * share, seconds, ganged or even, avoid, *sizes, even)
        if not can_ever(demand, planned):
            what = f"{demand.devices:g} {'GPUs' if self.has_gpus else 'CPUs'} and {demand.cpus:g} CPUs"
            largest = max(planned, key=lambda node: (node.devices, node.cpus), default=None)
            has = f"{largest.devices} and {largest.cpus:g}" if largest else "nothing"
            raise PlacementError(f"{job.model_id}: needs {what}, which no node has; the largest has {has}")
        return demand

    def with_cpus(self, demand: Demand) -> Demand:
        """The same demand with the CPUs that go with its GPUs by now."""
        return replace(demand, cpus=self.cpus_a_gpu * demand.devices) if self.has_gpus and demand.devices else demand

    def options(self, node: str, devices: float, cpus: float, host_bytes: float = 0.0) -> dict[str, Any]:
        """Ray's resources for `devices`, `cpus` and memory of a node."""
        if self.has_gpus:
            memory = {"memory": int(host_bytes)} if host_bytes else {}
            return {"num_cpus": _amount(cpus)} | ({"num_gpus": _amount(devices)} if devices else {}) | memory
        slots = min(self._slots, int(self._resources.get(node, {}).get("CPU", 1))) or 1
        return {"num_cpus": _amount(self._resources.get(node, {}).get("CPU", 1) * devices / slots)}

    def ask_for(self, demands: Iterable[Demand]) -> None:
        """Tell the autoscaler what is needed, all at once; nothing: that no more is."""
        from ray.autoscaler.sdk import request_resources

        bundles = []
        for demand in demands:
            whole, rest = divmod(demand.devices, max(1, self.largest))
            bundles += [{"GPU": float(self.largest)}] * int(whole) + ([{"GPU": float(rest)}] if rest else [])
        request_resources(bundles=bundles)


def in_stages(job: ModelJob) -> bool:
    """Whether an engine shares the model by processes of its own: one of ours asks for the devices of all."""
    return job.replicas == 1 and job.engine is not None and ENGINES[job.engine].tensor_parallel == "stages"


def processes(job: ModelJob, devices: int) -> int:
    """How many processes of ours a job takes on `devices`: one for each replica or rank, all else one."""
    ranks = job.engine is not None and ENGINES[job.engine].tensor_parallel == "ranks"
    return devices if ranks or job.replicas > 1 else 1


def estimated_seconds(job: ModelJob, devices: int, on_gpu: bool) -> float:
    """What the schedule orders by: from 2 x parameters x tokens, at a rate that is right within a factor of a few."""
    return 5.0 + job.work / (devices * (5e13 if on_gpu else 5e10))


def _cpus_a_gpu(node: Node) -> float:
    """The CPUs that go with a GPU of the node: its threads are as many. One CPU is left for reads without a GPU."""
    return max(min(1.0, node.cpus / node.devices), (node.cpus - 1) // node.devices)


def _amount(value: float) -> float:
    """A quantity that Ray takes: whole above 1, a multiple of 1/10000 below."""
    return int(value) if value >= 1 else round(value, 4)
