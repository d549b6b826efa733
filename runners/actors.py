"""One model's processes on the cluster: placed and started together, and gone before others take their place."""

import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from runners.events import Event
from runners.jobs import ModelJob

MARK = "DEADBENCH_GROUP"  # in the environment of whatever an actor starts, wherever that has got to
_POLITE_SECONDS, _PATIENT_SECONDS = 3.0, 30.0
_CPU_SLOTS = 2  # without GPUs: while one model loads, the other computes


class PlacementError(ValueError):
    """A model that no node, or no set of nodes, can hold; one line."""


@dataclass(frozen=True)
class Capacity:
    """What the cluster has, and how it is cut: with GPUs by GPU, without by slots of CPUs."""

    cpus: int
    gpus: int
    largest_node: int
    slots: int

    @classmethod
    def of_cluster(cls, num_jobs: int) -> "Capacity":
        """What Ray reports."""
        import ray

        total = ray.cluster_resources()
        cpus, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
        largest = max((int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"]), default=0)
        return cls(cpus, gpus, largest, gpus or max(1, min(num_jobs, _CPU_SLOTS, cpus)))

    def devices(self, job: ModelJob) -> int:
        """How many devices share the model: as asked, else the registry's `gpus` where there are GPUs.

        Raises:
            PlacementError: more than there are.
        """
        if job.replicas == 1 and job.engine not in ("torch", "vllm"):
            return 1
        degree = job.tensor_parallel or (job.num_gpus if self.gpus else 1)
        devices = job.replicas if job.replicas > 1 else degree
        room = self.largest_node if job.engine == "vllm" else self.gpus
        if self.gpus and devices > room:
            where = "on one node; the largest has" if job.engine == "vllm" else "; the cluster has"
            raise PlacementError(f"{job.model_id}: needs {devices} GPUs {where} {room}".replace(" ;", ";"))
        return devices

    def weight(self, job: ModelJob) -> int:
        """How many slots the model takes."""
        return min(self.devices(job), self.slots)

    def options(self, job: ModelJob, actors: int) -> dict[str, Any]:
        """The resources that each of the model's `actors` asks for."""
        if self.gpus:
            return {"num_cpus": 1, "num_gpus": self.devices(job) // actors}
        share = self.cpus * self.weight(job) / self.slots / actors
        return {"num_cpus": int(share) if share >= 1 else share}


@dataclass
class Group:
    """The actors of one model: one, or one for each rank. Rank 0's stream comes first."""

    job: ModelJob
    attempt: int
    weight: int
    token: str
    actors: list[Any]
    streams: list[Any]
    homes: list[Any]
    placement: Any = None
    done: list[tuple[Any, ...]] = field(default_factory=list)
    last_event: float = field(default_factory=time.monotonic)
    expired: bool = False

    def is_placed(self) -> bool:
        """Whether the cluster had room for it by now; until then it cannot be silent."""
        return self.placement is None or bool(self.placement.wait(0))

    def name(self, stream: Any) -> str:
        """`` or `rank 1 of 2: `, for messages."""
        return f"rank {self.streams.index(stream)} of {len(self.streams)}: " if len(self.streams) > 1 else ""


def start(job: ModelJob, capacity: Capacity, run_id: str, attempt: int) -> Group:
    """Start the actors of one model: one for each replica or rank of the torch engine, else one."""
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    devices = capacity.devices(job)
    job = job.over(1 if job.replicas > 1 else devices)
    ranks = devices if job.engine == "torch" or job.replicas > 1 else 1
    options = capacity.options(job, ranks)
    placement, token = None, uuid.uuid4().hex
    if ranks > 1:
        bundle = {"CPU": options["num_cpus"]} | ({"GPU": 1} if "num_gpus" in options else {})
        near = job.replicas == 1 and (devices <= capacity.largest_node or not capacity.gpus)
        strategy = "STRICT_PACK" if near else "PACK"
        placement = placement_group([bundle] * ranks, strategy=strategy)
    actors = []
    for rank in range(ranks):
        where = {"scheduling_strategy": PlacementGroupSchedulingStrategy(placement, rank)} if placement else {}
        actors.append(actor_class(options | where).remote(token))
    homes = [actor.__ray_call__.remote(_home) for actor in actors]
    meeting = actors[0].__ray_call__.remote(_meeting) if ranks > 1 else None
    streams = [actor.run.remote(job, run_id, attempt, (r, ranks), meeting) for r, actor in enumerate(actors)]
    return Group(job, attempt, capacity.weight(job), token, actors, streams, homes, placement)


def actor_class(options: dict[str, Any]) -> Any:
    """The actor, with the resources it asks for. It is neither restarted nor detached."""
    import ray

    class ModelActor:
        """Owns the resources of one model, or of one rank's part of it, for as long as its reads take."""

        def __init__(self, token: str):
            os.environ[MARK] = token

        @ray.method(num_returns="streaming")  # type: ignore[untyped-decorator]
        def run(
            self, job: ModelJob, run_id: str, attempt: int, place: tuple[int, int], meeting: tuple[str, int] | None
        ) -> Iterator[Event]:
            if meeting is None:
                from runners.worker import run_model

                yield from run_model(job, run_id, attempt)
            else:
                from runners.parallel import join_group, run_rank

                yield from run_rank(join_group(*place, meeting), job, run_id, attempt)

    return ray.remote(max_restarts=0, max_task_retries=0, **options)(ModelActor)


def release(group: Group) -> list[str]:
    """Kill a model's actors and all that they started, on every node; returns what is still there, in words.

    Memory of a device is free again when the processes that held it are gone, so that is waited for.
    """
    import ray
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ready, _ = ray.wait(group.homes, num_returns=len(group.homes), timeout=0)
    for actor in group.actors:
        ray.kill(actor)
    if group.placement is not None:
        remove_placement_group(group.placement)
    here, left = ray.get_runtime_context().get_node_id(), []
    for ref in ready:
        try:
            node, pid, born = ray.get(ref)
            if node == here:
                left += end_processes(group.token, pid, born)
            else:
                strategy = NodeAffinitySchedulingStrategy(node, soft=False)
                task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(end_processes)
                left += ray.get(task.remote(group.token, pid, born), timeout=2 * _PATIENT_SECONDS)
        except ray.exceptions.RayError:
            continue  # it never came to be, or its node is gone
    return left


def end_processes(token: str, pid: int, born: float) -> list[str]:
    """End what carries `token` in its environment, and the actor `pid` itself; returns what outlived that."""
    deadline = time.monotonic() + _PATIENT_SECONDS
    polite = time.monotonic() + _POLITE_SECONDS
    asked: set[int] = set()
    while left := _marked(token) + _same_process(pid, born):
        now = time.monotonic()
        if now > deadline:
            return [f"process {p.pid}" for p in left]
        for process in left:
            try:
                if now > polite:
                    process.kill()
                elif process.pid not in asked and process.pid != pid:
                    process.terminate()
                    asked.add(process.pid)
            except psutil.Error:
                continue
        time.sleep(0.05)
    return []


def _marked(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _same_process(pid: int, born: float) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        alive = process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return []
    return [process] if alive else []


def _home(actor: Any) -> tuple[str, int, float]:
    """(node, process id, when it began) of an actor, for `release`."""
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time()


def _meeting(actor: Any) -> tuple[str, int]:
    """An address of rank 0's node at which the ranks can meet."""
    import socket

    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]
