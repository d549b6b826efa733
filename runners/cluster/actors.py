"""One model's processes on the cluster: placed and started together, and gone before others take their place."""

import contextlib
import hashlib
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from deadbench.runners.cluster.faults import Death
from deadbench.runners.cluster.network import free_port, use_interface_of
from deadbench.runners.cluster.nodes import Nodes, in_stages, processes
from deadbench.runners.cluster.processes import Ended, end_processes, mark_process, together
from deadbench.runners.cluster.schedule import Piece, Place
from deadbench.runners.jobs.events import Event, Progress
from deadbench.runners.jobs.job import ModelJob
from deadbench.suite.idle_threads import let_idle_threads_sleep
from deadbench.suite.secrets import shown_place

_REMOTE_SECONDS = 60.0  # for the end of processes on another node


@dataclass
class Group:
    """The actors of one model: one, or one for each rank. Rank 0's stream comes first."""

    job: ModelJob
    attempt: int
    place: Place
    token: str
    actors: list[Any]
    streams: list[Any]
    homes: list[Any]
    placement: Any = None
    done: list[tuple[Any, ...]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    last_event: float = field(default_factory=time.monotonic)
    death: Death | None = None
    _placed: bool = False

    def is_placed(self) -> bool:
        """Whether the cluster had room for it by now; until then it cannot be silent."""
        if not self._placed:
            import ray

            ready, _ = ray.wait(self.homes, num_returns=len(self.homes), timeout=0)
            self._placed = len(ready) == len(self.homes)
            self.last_event = time.monotonic()
        return self._placed

    def name(self, stream: Any) -> str:
        """`` or `rank 1 of 2: `, for messages."""
        return f"rank {self.streams.index(stream)} of {len(self.streams)}: " if len(self.streams) > 1 else ""

    def nodes(self) -> frozenset[str]:
        """The nodes that it is on."""
        return frozenset(piece.node for piece in self.place)


def start(job: ModelJob, nodes: Nodes, place: Place, run_id: str, attempt: int) -> Group:
    """Start the actors of one model at `place`."""
    devices = nodes.devices(job)
    job = job.over(1 if job.replicas > 1 else devices, len(place) if in_stages(job) else 1)
    ranks = processes(job, devices)
    token = uuid.uuid4().hex
    placement, options = _options(nodes, place, ranks)
    actors = []
    for rank, each in enumerate(options):
        name = _named(job.model_id) + (f":rank{rank}" if ranks > 1 else "") + f":{token[:6]}"
        actors.append(actor_class(each | {"name": name}).remote(token))
    homes = [actor.__ray_call__.remote(_home) for actor in actors]
    meeting = actors[0].__ray_call__.remote(_meeting) if ranks > 1 else None
    streams = [actor.run.remote(job, run_id, attempt, (r, ranks), meeting) for r, actor in enumerate(actors)]
    return Group(job, attempt, place, token, actors, streams, homes, placement)


def _named(model_id: str) -> str:
    """What an actor is called in Ray's logs and pages: a hash tells models apart, and of the name the end is enough."""
    label = re.sub(r"[^\w.-]+", "-", shown_place(model_id).rstrip("/").rpartition("/")[2])[-40:]
    return f"deadbench:{hashlib.sha256(model_id.encode(errors='replace')).hexdigest()[:8]}:{label}"


def _options(nodes: Nodes, place: Place, ranks: int) -> tuple[Any, list[dict[str, Any]]]:
    """(placement group or None, options of each rank's actor) at `place`, on just those nodes."""
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

    if ranks == 1 and len(place) > 1:
        return _in_stages(nodes, place)
    if ranks == 1:
        (piece,) = place
        where = NodeAffinitySchedulingStrategy(piece.node, soft=False)
        return None, [_resources(nodes, piece, 1) | {"scheduling_strategy": where}]
    # Without GPUs more ranks than slots may share a node.
    homes = [piece for piece in place for _ in range(len(piece.devices) if nodes.has_gpus else ranks)]
    parts = [_resources(nodes, piece, homes.count(piece)) for piece in homes]
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    bundles = [{names[key]: amount for key, amount in part.items()} for part in parts]
    group = placement_group(
        bundles,
        strategy="STRICT_PACK" if len(place) == 1 else "PACK",
        bundle_label_selector=[{"ray.io/node-id": piece.node} for piece in homes],
    )
    strategies = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(ranks)]
    return group, [part | {"scheduling_strategy": each} for part, each in zip(parts, strategies, strict=True)]


def _in_stages(nodes: Nodes, place: Place) -> tuple[Any, list[dict[str, Any]]]:
    """As `_options`, of one actor without GPUs, whose engine starts its own workers: each takes a bundle of one GPU."""
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    gpus = [(piece, _resources(nodes, piece, len(piece.devices))) for piece in place for _ in piece.devices]
    cpus = [part["num_cpus"] for _, part in gpus]
    own = cpus[0] // 2 or cpus[0] / 2  # of those that go with the first GPU; whole where Ray wants it
    cpus[0] -= own
    bundles = [{"CPU": own}, *({"CPU": each, "GPU": 1} for each in cpus)]
    homes = [place[0].node, *(piece.node for piece, _ in gpus)]
    group = placement_group(
        bundles, strategy="PACK", bundle_label_selector=[{"ray.io/node-id": node} for node in homes]
    )
    where = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    return group, [{"num_cpus": own, "scheduling_strategy": where}]


def _resources(nodes: Nodes, piece: Piece, parts: int) -> dict[str, Any]:
    return nodes.options(
        piece.node, piece.share * len(piece.devices) / parts, piece.cpus / parts, piece.host_bytes / parts
    )


def actor_class(options: dict[str, Any]) -> Any:
    """The actor, with the resources it asks for. It is neither restarted nor detached."""
    import ray

    class ModelActor:
        """Owns the resources of one model, or of one rank's part of it, for as long as its reads take."""

        def __init__(self, token: str):
            let_idle_threads_sleep()
            mark_process(token)
            use_interface_of(ray.util.get_node_ip_address())

        @ray.method(num_returns="streaming")  # type: ignore[untyped-decorator]
        def run(
            self, job: ModelJob, run_id: str, attempt: int, place: tuple[int, int], meeting: tuple[str, int] | None
        ) -> Iterator[Event]:
            if meeting is None:
                from deadbench.runners.worker.run import run_model

                events = run_model(job, run_id, attempt)
            else:
                from deadbench.runners.worker.group import join_group, run_rank

                events = run_rank(join_group(*place, meeting), job, run_id, attempt)
            for event in events:  # no `yield from`: Ray sends its own statistics into the generator
                yield _observed(event)

    return ray.remote(max_restarts=0, max_task_retries=0, **options)(ModelActor)


def release(group: Group) -> Ended:
    """Kill a model's actors and all that they started, on every node; says what is still there and what is known.

    Memory of a device is free again when the processes that held it are gone, so that is waited for; not where the
    node itself is lost.
    """
    import ray
    from ray.util.placement_group import remove_placement_group

    ready, _ = ray.wait(group.homes, num_returns=len(group.homes), timeout=0)
    for actor in group.actors:
        ray.kill(actor)
    if group.placement is not None:
        remove_placement_group(group.placement)
    if group.death is not None and group.death.kind in ("node", "unplaced"):
        return Ended()
    began = bool(ready) or group.death is not None
    actors: dict[str, list[tuple[int, float]]] = {node: [] for node in group.nodes()} if began else {}
    for ref in ready:
        with contextlib.suppress(ray.exceptions.RayError):  # it died before it said where it is
            node, pid, born = ray.get(ref)
            actors.setdefault(node, []).append((pid, born))
    ended = list[Ended]()
    for node, known in actors.items():
        with contextlib.suppress(ray.exceptions.RayError):  # the node is gone
            ended.append(_end_on(node, group.token, known))
    return together(ended)


def _end_on(node: str, token: str, known: list[tuple[int, float]]) -> Ended:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if node == ray.get_runtime_context().get_node_id():
        return end_processes(token, known)
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(end_processes)
    return ray.get(task.remote(token, known), timeout=_REMOTE_SECONDS)  # type: ignore[no-any-return]


def _observed(event: Event) -> Event:
    """The event, with the memory of the GPU that this process uses."""
    torch = sys.modules.get("torch")
    if not isinstance(event, Progress) or torch is None or not torch.cuda.is_initialized():
        return event
    return replace(event, device_bytes=torch.cuda.memory_reserved())


def _home(actor: Any) -> tuple[str, int, float]:
    """(node, process id, when it began) of an actor, for `release`."""
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time()


def _meeting(actor: Any) -> tuple[str, int]:
    """An address of rank 0's node at which the ranks can meet."""
    import ray

    return ray.util.get_node_ip_address(), free_port()
