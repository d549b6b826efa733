"""What starts where and when: a decision over demands, nodes and what runs. Pure: no Ray, no clock.

The line: first what alone takes over half of the time that is left for all, longest first (started last it would end
last, alone); then the widest, the longest of them first. The first demand that finds no room is the head of the line:
it gets the place that is free first by the estimates, and the others are let by only where they leave that place alone,
because they are through by then or fit beside it. So small models fill what large ones leave, and no stream of them
keeps an 8-GPU model waiting; an estimate that was too short only makes the line stricter. The very first to start is
the shortest of all, where it is a small part of the whole: who waits sees a result early, and the end is hardly later.

A device is a GPU; on a cluster without GPUs it is a slot, an equal part of a node's CPUs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

_WHOLE = 1.0 - 1e-9
_LONG = 0.5  # of the time that is left for all
_EARLY = 0.2  # of the same: how long the one that goes first may take


@dataclass(frozen=True)
class Demand:
    """What one model asks for.

    `devices`: a whole number, a share of one, or 0; `cpus` beside them; `seconds` estimated; `ganged`: several
    processes that need a placement group; `avoid`: nodes on which it died; `device_bytes` of each device and
    `host_bytes` of its nodes together, as far as they are known; `even`: over several nodes all give as many devices.
    """

    devices: float
    cpus: float = 0.0
    seconds: float = 0.0
    ganged: bool = False
    avoid: frozenset[str] = frozenset()
    device_bytes: float = 0.0
    host_bytes: float = 0.0
    even: bool = False


@dataclass(frozen=True)
class Node:
    """One machine: what it has, and how much of it others use. Bytes that nobody told are taken to be enough."""

    id: str
    devices: int
    cpus: float
    foreign_devices: float = 0.0
    foreign_cpus: float = 0.0
    device_bytes: float = math.inf
    host_bytes: float = math.inf


@dataclass(frozen=True)
class Piece:
    """A part of a place: which devices of a node (by position), how much of each, CPUs, and bytes of host memory."""

    node: str
    devices: tuple[int, ...]
    share: float
    cpus: float
    host_bytes: float = 0.0


Place = tuple[Piece, ...]


@dataclass(frozen=True)
class Running:
    """Something that occupies a place, for `seconds` more by the estimate."""

    place: Place
    seconds: float = 0.0


@dataclass
class Free:
    """What is free now: by node, the free share of each device, CPUs, and bytes of host memory."""

    devices: dict[str, list[float]] = field(default_factory=dict)
    cpus: dict[str, float] = field(default_factory=dict)
    host_bytes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, nodes: Iterable[Node], running: Iterable[Running] = ()) -> "Free":
        """The nodes, less what others use and what runs."""
        free = cls()
        for node in nodes:
            free.devices[node.id] = [1.0] * node.devices
            free.cpus[node.id] = node.cpus
            free.host_bytes[node.id] = node.host_bytes
        for each in running:
            free.take(each.place)
        for node in nodes:  # Ray gives others what we do not have
            free.cpus[node.id] -= node.foreign_cpus
            left = node.foreign_devices
            for index in sorted(range(node.devices), key=lambda i: -free.devices[node.id][i]):
                part = min(left, free.devices[node.id][index])
                free.devices[node.id][index] -= part
                left -= part
        return free

    def take(self, place: Place, sign: int = 1) -> None:
        """Occupy `place`; with sign -1 give it back. A node that is gone has nothing to give."""
        for piece in place:
            if piece.node not in self.devices:
                continue
            self.cpus[piece.node] -= sign * piece.cpus
            self.host_bytes[piece.node] -= sign * piece.host_bytes
            for index in piece.devices:
                self.devices[piece.node][index] -= sign * piece.share

    def copy(self) -> "Free":
        """Another one that changes by itself."""
        devices = {node: list(shares) for node, shares in self.devices.items()}
        return Free(devices, dict(self.cpus), dict(self.host_bytes))

    def both(self, other: "Free") -> "Free":
        """What is free in this one and in `other`."""
        devices = {n: [min(a, b) for a, b in zip(s, other.devices[n], strict=True)] for n, s in self.devices.items()}
        cpus = {node: min(cpus, other.cpus[node]) for node, cpus in self.cpus.items()}
        return Free(devices, cpus, {node: min(each, other.host_bytes[node]) for node, each in self.host_bytes.items()})


def decide(
    queue: Sequence[Demand], nodes: Sequence[Node], running: Sequence[Running], *, opening: bool = False
) -> list[tuple[int, Place]]:
    """What to start now: (position in `queue`, place) each, in the order of the line. `opening`: nothing ran yet."""
    free = Free.of(nodes, running)
    shadow: Free | None = None  # what is free when the head of the line starts, and beside it
    until = 0.0
    started: list[tuple[int, Place]] = []
    known: set[Demand] = set()  # found no room in this round
    for position in _line(queue, nodes, running, opening):
        demand = queue[position]
        alike = replace(demand, seconds=float(shadow is None or demand.seconds <= until), ganged=False)
        if alike in known:
            continue
        if shadow is None:
            place = find_place(demand, free, nodes)
        else:
            room = free if demand.seconds <= until else free.both(shadow)
            place = find_place(demand, room, nodes)
        if place is not None:
            free.take(place)
            if shadow is not None and demand.seconds > until:
                shadow.take(place)
            started.append((position, place))
            continue
        known.add(alike)
        if shadow is None and can_ever(demand, nodes):
            now = [*running, *(Running(at, queue[number].seconds) for number, at in started)]
            until, shadow = _reserve(demand, free, nodes, now)
            known.clear()
    return started


def _line(queue: Sequence[Demand], nodes: Sequence[Node], running: Sequence[Running], opening: bool) -> list[int]:
    """Positions in `queue`, in the order in which they are served."""
    total = sum(node.devices for node in nodes)
    area = sum(each.devices * each.seconds for each in queue)
    area += sum(each.seconds * len(piece.devices) * piece.share for each in running for piece in each.place)
    share = area / total if total else 0.0
    shortest = min(range(len(queue)), key=lambda position: queue[position].seconds, default=None)
    early = shortest if opening and shortest is not None and queue[shortest].seconds <= _EARLY * share else None

    def key(position: int) -> tuple[bool, bool, float, float, int]:
        demand = queue[position]
        first = demand.seconds > _LONG * share
        return position != early, not first, 0.0 if first else -demand.devices, -demand.seconds, position

    return sorted(range(len(queue)), key=key)


def can_ever(demand: Demand, nodes: Sequence[Node]) -> bool:
    """Whether the nodes could hold it if nothing else ran."""
    empty = [replace(node, foreign_devices=0.0, foreign_cpus=0.0) for node in nodes]
    return find_place(demand, Free.of(empty), empty) is not None


def find_place(demand: Demand, free: Free, nodes: Sequence[Node]) -> Place | None:
    """Room for `demand`, where it leaves the least behind; None if there is none.

    Nodes to avoid are avoided where another could ever hold it.
    """
    largest = max((node.devices for node in nodes), default=0)
    nodes = [node for node in nodes if node.device_bytes >= demand.device_bytes]
    candidates = [node for node in nodes if node.id not in demand.avoid]
    if len(candidates) < len(nodes) and not (candidates and can_ever(replace(demand, avoid=frozenset()), candidates)):
        candidates = nodes
    if demand.devices > max(1, largest):
        return _over_nodes(demand, free, candidates)
    places = [place for node in candidates if (place := _on_node(demand, free, node)) is not None]
    return min(places, key=lambda place: _left_behind(place[0], free), default=None)


def _on_node(demand: Demand, free: Free, node: Node) -> Place | None:
    shares, cpus = free.devices[node.id], free.cpus[node.id]
    if demand.cpus > cpus + 1e-9 or demand.host_bytes > free.host_bytes[node.id]:
        return None
    beside = demand.cpus, demand.host_bytes
    if demand.devices < 1:
        if not demand.devices:
            return (Piece(node.id, (), 0.0, *beside),)
        fitting = [index for index, share in enumerate(shares) if share >= demand.devices - 1e-9]
        if not fitting:
            return None
        fullest = min(fitting, key=lambda index: shares[index])
        return (Piece(node.id, (fullest,), demand.devices, *beside),)
    whole = [index for index, share in enumerate(shares) if share >= _WHOLE]
    count = int(demand.devices)
    return (Piece(node.id, tuple(whole[:count]), 1.0, *beside),) if len(whole) >= count else None


def _over_nodes(demand: Demand, free: Free, nodes: Sequence[Node]) -> Place | None:
    """Whole nodes, the last one in part; where they are to be even, those of the largest's size."""
    pieces, left, largest = [], int(demand.devices), max((node.devices for node in nodes), default=0)
    for node in sorted(nodes, key=lambda node: -node.devices):
        count = 0 if demand.even and node.devices < largest else min(left, node.devices)
        cpus, host_bytes = demand.cpus * count / demand.devices, demand.host_bytes * count / demand.devices
        whole = [index for index, share in enumerate(free.devices[node.id]) if share >= _WHOLE]
        enough = free.cpus[node.id] + 1e-9 >= cpus and free.host_bytes[node.id] >= host_bytes
        if count and len(whole) >= count and enough:
            pieces.append(Piece(node.id, tuple(whole[:count]), 1.0, cpus, host_bytes))
            left -= count
    return tuple(pieces) if not left else None


def _left_behind(piece: Piece, free: Free) -> tuple[float, float, float]:
    """What stays free on the node that `piece` goes to: first on its device, then on the node, then CPUs."""
    shares = free.devices[piece.node]
    beside = shares[piece.devices[0]] - piece.share if piece.devices else 0.0
    return beside, sum(shares), -free.cpus[piece.node]


def _reserve(demand: Demand, free: Free, nodes: Sequence[Node], running: Sequence[Running]) -> tuple[float, Free]:
    """When the head of the line can start by the estimates, and what is free then beside it."""
    then = free.copy()
    for each in sorted(running, key=lambda r: r.seconds):
        then.take(each.place, -1)
        place = find_place(demand, then, nodes)
        if place is not None:
            then.take(place)
            return each.seconds, then
    return 0.0, then  # others have the room: nothing of ours is in its way
