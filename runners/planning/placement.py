"""Where one read fits: whole on one device, else shared by several, else block by block. Arithmetic on `Needs`."""

import math
from dataclasses import dataclass, replace
from typing import Any

from deadbench.runners.engines.registry import AUTO, BLOCKWISE, DEFAULT, ENGINES
from deadbench.runners.jobs.job import ReadJob
from deadbench.runners.planning.degree import shared_by
from deadbench.runners.planning.hardware import PROCESS_BYTES, SHARES, Cluster, Room, gigabytes
from deadbench.runners.planning.needs import Needs
from deadbench.runners.planning.sizes import ModelSize

_CONTEXT_BYTES = 0.7e9  # of a GPU, that each process on it takes beside its tensors
_ACCUMULATOR_SHARE = 4  # as the passes take it: one part in so many of what is free
_COUNTED = {"num_attention_heads": "heads", "num_key_value_heads": "KV heads"}


@dataclass(frozen=True)
class Placement:
    """One read of one model: how it would run. `problem` says why it cannot, and what would.

    `disk_bytes`: what its checkpoints take in the result set, and streams that wait in the temporary folder; `seconds`
    by arithmetic, the step that takes most of them (load, forward or spectra), and those of each.
    """

    order: int
    model: str
    revision: str | None
    read: str
    engine: str | None = None
    gpus: float = 0
    tensor_parallel: int | None = None
    dtype: str | None = None
    passes: int | None = None
    weight_bytes: int | None = None
    activation_bytes: int | None = None
    accumulator_bytes: int | None = None
    peak_bytes: int | None = None
    peak_host_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None
    most: str | None = None
    load_seconds: float | None = None
    forward_seconds: float | None = None
    spectrum_seconds: float | None = None
    note: str | None = None
    problem: str | None = None


def fit(
    row: Placement, size: ModelSize, need: Needs, read: ReadJob, cluster: Cluster, tensor_parallel: int | None
) -> Placement:
    """`row` with the first engine that has room; what is asked for is not passed over."""
    room, engines = Room.of(cluster), _engines(read)
    row = replace(
        row,
        weight_bytes=int(need.weights),
        activation_bytes=int(need.activations),
        gpus=int(room.on_gpu),
        tensor_parallel=1,
        engine=engines[0],
    )
    least = max(need.resident(1), 0 if room.on_gpu else need.resident_load)
    loadable = need.resident_load <= room.host
    spec = ENGINES[engines[0]]
    if not spec.blockwise:
        if tensor_parallel in (None, 1) and least <= room.device and loadable:
            return _resident(row, need, read, room)
        found = shared_by(size, need, cluster, spec, tensor_parallel)
        if isinstance(found, str):
            gpus = tensor_parallel if room.on_gpu and tensor_parallel else row.gpus
            return replace(row, gpus=gpus, tensor_parallel=tensor_parallel, problem=found)
        if found is not None and loadable:
            return _sharded(row, size, need, read, room, found)
    too_large = gigabytes(least if loadable else need.resident_load)
    ahead = room.on_gpu or read.read == "trained"  # as the engine does it
    beside = bool(room.on_gpu)
    parked = max(0.0, room.device - need.streamed(0.0, ahead=ahead, beside=beside)) / _ACCUMULATOR_SHARE
    smallest = need.streamed(parked, ahead=ahead, beside=beside)
    if not any(ENGINES[name].blockwise for name in engines):
        can = f"; --engine {BLOCKWISE} needs {gigabytes(smallest)}" if smallest <= room.device else ""
        peaks = _peak(least, need.resident_load, room.on_gpu)
        return replace(row, **peaks, problem=f"{too_large} do not fit in {room.label(loadable)}{can}")
    why = f"block streaming: resident needs {too_large}" if least > room.device or not loadable else None
    other = None if size.has_plan or tensor_parallel == 1 else _shared_otherwise(size, need, cluster)
    row = replace(row, note=joined(why, other), disk_bytes=int(need.swept(parked)))
    return _streamed(row, need, room, smallest, loadable)


def _engines(read: ReadJob) -> tuple[str, ...]:
    """The engines that may run a read, the first that fits."""
    assert read.engine is not None
    return AUTO if read.auto else (read.engine,)


def _resident(row: Placement, need: Needs, read: ReadJob, room: Room) -> Placement:
    at_once = _taps_at_once(read, need, room.device - need.weights)
    peak = max(need.resident(at_once), 0 if room.on_gpu else need.resident_load)
    spec = ENGINES[str(row.engine)]
    shared = room.on_gpu and spec.in_process and at_once >= need.num_taps
    return replace(
        row,
        gpus=_share(peak, room.device) if shared else row.gpus,
        passes=_passes(need, at_once),
        accumulator_bytes=int(need.held * at_once + need.decomposed),
        note=spec.on_top,
        disk_bytes=int(need.saved(at_once)) if spec.resume else None,
        **_peak(peak, need.resident_load, room.on_gpu),
    )


def _sharded(
    row: Placement, size: ModelSize, need: Needs, read: ReadJob, room: Room, tensor_parallel: int
) -> Placement:
    one = need.sharded(tensor_parallel)
    at_once = tensor_parallel * _taps_at_once(read, need, room.device - one)
    across = room.on_gpu and tensor_parallel > room.node.gpus
    stages = tensor_parallel // room.node.gpus if across and ENGINES[str(row.engine)].tensor_parallel == "stages" else 1
    counts = ", ".join(f"{count} {_COUNTED[name]}" for name, count in size.divisors.items() if name in _COUNTED)
    peak = one if room.on_gpu else tensor_parallel * (one + PROCESS_BYTES) - PROCESS_BYTES
    note = (
        f"{stages} stages, each on a node whose {room.node.gpus} GPUs share its blocks: {room.node.gpus} divides "
        if stages > 1
        else f"tensor parallel{' across nodes' if across else ''}: {tensor_parallel} divides "
    ) + (counts or "its heads")
    return replace(
        row,
        gpus=tensor_parallel if room.on_gpu else 0,
        tensor_parallel=tensor_parallel,
        passes=_passes(need, at_once),
        accumulator_bytes=int(need.held * min(at_once, need.num_taps) / tensor_parallel + need.decomposed),
        note=joined(note, ENGINES[str(row.engine)].on_top),
        disk_bytes=int(need.saved(min(at_once, need.num_taps))) if ENGINES[str(row.engine)].resume else None,
        **_peak(peak, need.outside + need.drawing * tensor_parallel, room.on_gpu),
    )


def _streamed(row: Placement, need: Needs, room: Room, smallest: float, loadable: bool) -> Placement:
    """Block by block in `smallest` bytes; `loadable`: whether the host at least could load the whole model."""
    row = replace(
        row,
        engine=BLOCKWISE,
        passes=1,
        accumulator_bytes=int(need.compared(beside=bool(room.on_gpu)) + need.decomposed),
        **_peak(smallest, need.outside + need.drawing, room.on_gpu),
    )
    if smallest <= room.device:
        return row
    problem = (
        f"block streaming still needs {gigabytes(smallest)} ({gigabytes(need.outside)} outside the blocks, "
        f"{gigabytes(need.block)} a block), more than {room.label(loadable)}; give {_remedy(row.dtype, need)}"
    )
    return replace(row, problem=problem)


def fit_whole(row: Placement, need: Needs, room: Room) -> Placement:
    """A read that moves parameters in place and has no taps: the model is whole, on one device."""
    peak = need.weights + need.activations
    row = replace(
        row,
        engine=DEFAULT,
        gpus=int(room.on_gpu),
        tensor_parallel=1,
        passes=1,
        weight_bytes=int(need.weights),
        activation_bytes=int(need.activations),
        **_peak(peak, need.resident_load, room.on_gpu),
    )
    if need.resident_load <= room.host and peak <= room.device:
        return row
    problem = f"a functional read holds the whole model, {gigabytes(max(peak, need.resident_load))} in {row.dtype}"
    return replace(row, problem=f"{problem}, which does not fit; give more memory or --dtype float32")


def replicated(row: Placement, replicas: int, cluster: Cluster) -> Placement:
    """The same on `replicas` devices, each with the whole model and a part of the tokens."""
    each, there = math.ceil(row.gpus), sum(node.gpus for node in cluster.nodes)
    gpus = each * replicas
    problem = row.problem
    if not problem and (row.tensor_parallel or 1) > 1:
        problem = f"{row.tensor_parallel} devices must share the model: give --engine {BLOCKWISE}, or --replicas 1"
    elif not problem and gpus > there:
        problem = f"{replicas} replicas need {gpus} GPUs and there are {there}; give --replicas {there // each}"
    return replace(row, gpus=gpus, note=joined(row.note, f"{replicas} replicas divide the tokens"), problem=problem)


def joined(*remarks: str | None) -> str | None:
    """The remarks that there are, in one line."""
    return "; ".join(remark for remark in remarks if remark) or None


def _share(peak: float, budget: float) -> float:
    """The part of one GPU of `budget` bytes that holds `peak`."""
    return next((share for share in SHARES if peak + _CONTEXT_BYTES <= share * budget), 1)


def _taps_at_once(read: ReadJob, need: Needs, free: float) -> int:
    share = read.accumulator_gb * 1e9 if read.accumulator_gb is not None else free / _ACCUMULATOR_SHARE
    return min(need.num_taps, max(1, int(share // need.decomposed)))


def _passes(need: Needs, at_once: int) -> int:
    """Over the tokens: one is always made, for the final norm."""
    return max(1, -(-need.num_taps // max(1, at_once)))


def _peak(value: float, host: float, on_gpu: bool) -> dict[str, Any]:
    """Columns of the peaks: `value` where the model runs, `host` in host memory beside a GPU."""
    if on_gpu:
        return {"peak_bytes": int(value), "peak_host_bytes": int(PROCESS_BYTES + host)}
    return {"peak_bytes": None, "peak_host_bytes": int(value + PROCESS_BYTES)}


def _shared_otherwise(size: ModelSize, need: Needs, cluster: Cluster) -> str | None:
    """The engine that would share over several GPUs what transformers has no plan for, if there is one."""
    for name, spec in ENGINES.items():
        found = shared_by(size, need, cluster, spec, None) if spec.tensor_parallel == "stages" else None
        if isinstance(found, int):
            return f"--engine {name} shares it over {found} GPUs"
    return None


def _remedy(dtype: str | None, need: Needs) -> str:
    remedies = ["more memory"]
    if dtype in ("float32", "float64"):
        remedies.append("--dtype bfloat16")
    if need.stream > need.block:
        remedies.append("fewer --tokens")
    return " or ".join(remedies)
