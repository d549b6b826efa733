"""The plan: which engine reads each model, on how many devices, in how many passes; and what cannot fit, and why.

Arithmetic on `Needs` against a `Cluster`; nothing is loaded. Resident on one device comes first (on a part of one where
a GPU has room for several), then tensor parallel (a degree that divides attention heads and KV heads), then block
streaming.
"""

import json
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from deadbench.runners.jobs.job import ModelJob, ReadJob, Unreached
from deadbench.runners.planning.degree import shared_by
from deadbench.runners.planning.hardware import PROCESS_BYTES, SHARES, Cluster, Room, gigabytes
from deadbench.runners.planning.needs import Needs, needs
from deadbench.runners.planning.sizes import ModelSize, measure
from deadbench.suite.architectures.build import build_config
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.tensors import read_headers, stored_dtype
from deadbench.suite.errors import CheckpointError

_CONTEXT_BYTES = 0.7e9  # of a GPU, that each process on it takes beside its tensors
_ACCUMULATOR_SHARE = 4  # as the passes take it: one part in so many of what is free
_COUNTED = {"num_attention_heads": "heads", "num_key_value_heads": "KV heads"}
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Placement:
    """One read of one model: how it would run. `problem` says why it cannot, and what would."""

    order: int
    model: str
    revision: str | None
    read: str
    engine: str | None
    gpus: float
    tensor_parallel: int | None
    dtype: str | None
    passes: int | None
    weight_bytes: int | None
    activation_bytes: int | None
    accumulator_bytes: int | None
    peak_bytes: int | None
    peak_host_bytes: int | None
    note: str | None = None
    problem: str | None = None


def make_plan(jobs: list[ModelJob], cluster: Cluster, done: Collection[tuple[Any, ...]] = ()) -> list[Placement]:
    """A placement for every read of `jobs`, in the order in which the models would start: largest first.

    `done`: identities of reads that are finished (`ResultStore.finished`), which would be skipped.
    """
    rows = []
    for job in jobs:
        asked = asked_degree(job, cluster)
        rows.append([_unless_done(read, place(read, cluster, asked), done) for read in job.reads])
    rows.sort(key=lambda each: max((r.gpus, r.weight_bytes or 0) for r in each), reverse=True)
    return [replace(row, order=order) for order, each in enumerate(rows, 1) for row in each]


def _unless_done(read: ReadJob, row: Placement, done: Collection[tuple[Any, ...]]) -> Placement:
    identities = {read.identity(), replace(read, engine=row.engine).identity()}
    return replace(row, note="already there", problem=None) if identities & {*done} else row


def asked_degree(job: ModelJob, cluster: Cluster) -> int | None:
    """The degree that the command line or, where there are GPUs, the registry asks for; None: the plan chooses."""
    if job.replicas > 1:
        return None
    return job.tensor_parallel or (job.num_gpus if job.num_gpus > 1 and cluster.largest.gpus else None)


def place(read: ReadJob, cluster: Cluster, asked: int | None = None) -> Placement:
    """How one read would run, over `asked` devices where a number is given."""
    row = Placement(0, read.model.id, read.revision, read.read, None, 0, *[None] * 8)
    problem, remark = read.error, None
    if isinstance(problem, Unreached) and cluster.assumed:  # which says nothing of the cluster that is assumed
        problem, remark = None, "its source cannot be reached from here"
    if read.read == "parameters":
        return replace(row, note=_joined("headers and norms only", remark), problem=problem)
    try:
        size, dtype, num_tokens, inline = _facts(read)
    except ValueError as error:
        return replace(row, problem=problem or str(error))
    if inline:
        remark = "sized by the registry's configuration"
    share = num_tokens if read.read == "functional" else -(-num_tokens // read.replicas)
    row, need = replace(row, dtype=dtype), needs(size, read.read, _ITEM_BYTES[dtype], share)
    if read.read == "functional":
        found = _place_functional(row, need, Room.of(cluster))
    else:
        found = _place(row, size, need, read, cluster, asked)
        found = found if read.replicas == 1 else _replicated(found, read.replicas, cluster)
    return replace(found, note=_joined(found.note, remark), problem=problem or found.problem)


def _facts(read: ReadJob) -> tuple[ModelSize, str, int, bool]:
    """(size, dtype, tokens) of a read by forward pass, and whether the registry's word stands for the checkpoint's."""
    config, dtype = read.model.config, read.dtype
    entries, inline = None, False
    if config is None or read.read == "trained":
        checkpoint = Checkpoint(read.model.source or "", read.revision or read.model.main_checkpoint(), read.base)
        try:
            config = checkpoint.config()
            entries = read_headers(checkpoint) if read.read == "trained" else None
        except CheckpointError as error:
            config, inline = read.model.config, True
            if config is None:
                raise ValueError(str(error)) from error
    built = build_config(config)
    if dtype == "auto":
        declared = str(getattr(built, "dtype", None) or "float32").removeprefix("torch.")
        dtype = (stored_dtype(entries) if entries else None) or declared
    shape = (read.protocol.sequence_length, read.model.modality, read.model.stack)
    size = _measure(json.dumps(config, sort_keys=True), *shape)
    rule = read.protocol.tokens
    return size, dtype, rule if isinstance(rule, int) else int(rule[:-1]) * size.hidden_size, inline


@cache
def _measure(config_json: str, sequence_length: int, modality: str, stack: str) -> ModelSize:
    """`measure`, once for the reads of one architecture."""
    return measure(build_config(json.loads(config_json)), sequence_length, modality, stack)


def _place(
    row: Placement, size: ModelSize, need: Needs, read: ReadJob, cluster: Cluster, asked: int | None
) -> Placement:
    """Resident on one device, else shared by several, else streamed; what is asked for is not passed over."""
    room = Room.of(cluster)
    wanted = read.engine if read.engine != "torch" or read.model.engine == "torch" else "auto"
    if read.read == "functional":  # by the torch engine, whole, whatever the others run on
        wanted, asked = "torch", 1
    row = replace(
        row,
        weight_bytes=int(need.weights),
        activation_bytes=int(need.activations),
        gpus=int(room.on_gpu),
        tensor_parallel=1,
        engine="vllm" if wanted == "vllm" else "torch",
    )
    least = max(need.resident(1), 0 if room.on_gpu else need.resident_load)
    loadable = need.resident_load <= room.host
    if wanted != "streaming":
        if asked in (None, 1) and least <= room.device and loadable:
            return _resident(row, need, read, room)
        ranks = shared_by(size, need, cluster, wanted == "vllm", asked)
        if isinstance(ranks, str):
            return replace(row, gpus=asked if room.on_gpu and asked else row.gpus, tensor_parallel=asked, problem=ranks)
        if ranks is not None and loadable:
            return _sharded(row, size, need, read, room, ranks)
    parked = max(0.0, room.device - need.streamed(0.0)) / _ACCUMULATOR_SHARE
    smallest = need.streamed(parked)
    too_large = gigabytes(least if loadable else need.resident_load)
    if wanted not in ("auto", "streaming"):
        can = f"; --engine streaming needs {gigabytes(smallest)}" if smallest <= room.device else ""
        peaks = _peak(least, need.resident_load, room.on_gpu)
        return replace(row, **peaks, problem=f"{too_large} do not fit in {room.label(loadable)}{can}")
    streamed = replace(
        row,
        engine="streaming",
        passes=1,
        accumulator_bytes=int(2 * need.held + need.decomposed),
        note=_joined(
            f"block streaming: resident needs {too_large}" if least > room.device or not loadable else None,
            None if size.has_plan or asked == 1 else _by_vllm(size, need, cluster),
        ),
        **_peak(smallest, need.outside + need.drawing, room.on_gpu),
    )
    if smallest <= room.device:
        return streamed
    problem = (
        f"block streaming still needs {gigabytes(smallest)} ({gigabytes(need.outside)} outside the blocks, "
        f"{gigabytes(need.block)} a block), more than {room.label(loadable)}; give {_remedy(row.dtype, need)}"
    )
    return replace(streamed, problem=problem)


def _resident(row: Placement, need: Needs, read: ReadJob, room: Room) -> Placement:
    at_once = _taps_at_once(read, need, room.device - need.weights)
    peak = max(need.resident(at_once), 0 if room.on_gpu else need.resident_load)
    shared = room.on_gpu and row.engine == "torch" and at_once >= need.num_taps  # vLLM takes the whole GPU
    return replace(
        row,
        gpus=_share(peak, room.device) if shared else row.gpus,
        passes=-(-need.num_taps // at_once),
        accumulator_bytes=int(need.held * at_once + need.decomposed),
        note="vLLM's cache and processes come on top" if row.engine == "vllm" else None,
        **_peak(peak, need.resident_load, room.on_gpu),
    )


def _sharded(row: Placement, size: ModelSize, need: Needs, read: ReadJob, room: Room, ranks: int) -> Placement:
    at_once = ranks * _taps_at_once(read, need, room.device - need.sharded(ranks))
    across = room.on_gpu and ranks > room.node.gpus
    counts = ", ".join(f"{count} {_COUNTED[name]}" for name, count in size.divisors.items() if name in _COUNTED)
    peak = need.sharded(ranks) if room.on_gpu else ranks * (need.sharded(ranks) + PROCESS_BYTES) - PROCESS_BYTES
    note = f"tensor parallel{' across nodes' if across else ''}: {ranks} divides {counts or 'its heads'}"
    return replace(
        row,
        gpus=ranks if room.on_gpu else 0,
        tensor_parallel=ranks,
        passes=-(-need.num_taps // at_once),
        accumulator_bytes=int(need.held * min(at_once, need.num_taps) / ranks + need.decomposed),
        note=_joined(note, "vLLM's cache and processes come on top" if row.engine == "vllm" else None),
        **_peak(peak, need.outside + need.drawing * ranks, room.on_gpu),
    )


def _place_functional(row: Placement, need: Needs, room: Room) -> Placement:
    """A functional read moves parameters in place and has no taps: the model is whole, on one device."""
    peak = need.weights + need.activations
    row = replace(
        row,
        engine="torch",
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


def _share(peak: float, budget: float) -> float:
    """The part of one GPU of `budget` bytes that holds `peak`."""
    return next((share for share in SHARES if peak + _CONTEXT_BYTES <= share * budget), 1)


def _replicated(row: Placement, replicas: int, cluster: Cluster) -> Placement:
    """The same on `replicas` devices, each with the whole model and a part of the tokens."""
    each, there = math.ceil(row.gpus), sum(node.gpus for node in cluster.nodes)
    gpus = each * replicas
    note = "; ".join(part for part in (row.note, f"{replicas} replicas divide the tokens") if part)
    problem = row.problem
    if not problem and (row.tensor_parallel or 1) > 1:
        problem = f"{row.tensor_parallel} devices must share the model: give --engine streaming, or --replicas 1"
    elif not problem and gpus > there:
        problem = f"{replicas} replicas need {gpus} GPUs and there are {there}; give --replicas {there // each}"
    return replace(row, gpus=gpus, note=note, problem=problem)


def _taps_at_once(read: ReadJob, need: Needs, free: float) -> int:
    share = read.accumulator_gb * 1e9 if read.accumulator_gb is not None else free / _ACCUMULATOR_SHARE
    return min(need.num_taps, max(1, int(share // need.decomposed)))


def _peak(value: float, host: float, on_gpu: bool) -> dict[str, Any]:
    """Columns of the peaks: `value` where the model runs, `host` in host memory beside a GPU."""
    if on_gpu:
        return {"peak_bytes": int(value), "peak_host_bytes": int(PROCESS_BYTES + host)}
    return {"peak_bytes": None, "peak_host_bytes": int(value + PROCESS_BYTES)}


def _by_vllm(size: ModelSize, need: Needs, cluster: Cluster) -> str | None:
    ranks = shared_by(size, need, cluster, True, None)
    return f"--engine vllm shares it over {ranks} GPUs" if isinstance(ranks, int) else None


def _joined(*remarks: str | None) -> str | None:
    return "; ".join(remark for remark in remarks if remark) or None


def _remedy(dtype: str | None, need: Needs) -> str:
    remedies = ["more memory"]
    if dtype in ("float32", "float64"):
        remedies.append("--dtype bfloat16")
    if need.stream > need.block:
        remedies.append("fewer --tokens")
    return " or ".join(remedies)


def as_rows(plan: list[Placement]) -> list[dict[str, Any]]:
    """The plan as plain dicts."""
    return [asdict(row) for row in plan]
