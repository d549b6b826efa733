"""The plan: which engine reads each model, on how many devices, in how many passes; and what cannot fit, and why.

Arithmetic on `Needs` against a `Cluster`; nothing is loaded. Resident on one device comes first, then tensor parallel
(a degree that divides attention heads and KV heads), then block streaming.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from runners.cluster import Cluster, Node
from runners.jobs import ModelJob, ReadJob
from runners.needs import ModelSize, Needs, measure, needs
from suite.architecture import build_config
from suite.sources import Checkpoint
from suite.tensors import read_headers, stored_dtype

PROCESS_BYTES = 0.6e9  # what an actor holds with torch and transformers imported and no model
_USABLE = 0.9  # of a device's memory; the rest is the allocator's, the driver's and other processes'
_ACCUMULATOR_SHARE = 4  # as the passes take it: one part in so many of what is free
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Placement:
    """One read of one model: how it would run. `problem` says why it cannot, and what would."""

    order: int
    model: str
    revision: str | None
    read: str
    engine: str | None
    gpus: int
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


def make_plan(jobs: list[ModelJob], cluster: Cluster) -> list[Placement]:
    """A placement for every read of `jobs`, in the order in which the models would start: largest first."""
    rows = [[place(read, cluster) for read in job.reads] for job in jobs]
    rows.sort(key=lambda each: max((r.gpus, r.weight_bytes or 0) for r in each), reverse=True)
    return [replace(row, order=order) for order, each in enumerate(rows, 1) for row in each]


def place(read: ReadJob, cluster: Cluster) -> Placement:
    """How one read would run."""
    empty = Placement(0, read.model.id, read.revision, read.read, None, 0, *[None] * 8)
    if read.error:
        return replace(empty, problem=read.error)
    if read.read == "parameters":
        return replace(empty, note="headers and norms only")
    try:
        size, dtype, num_tokens = _facts(read)
    except ValueError as error:
        return replace(empty, problem=str(error))
    need = needs(size, read.read, _ITEM_BYTES[dtype], -(-num_tokens // read.replicas))
    row = _place(replace(empty, dtype=dtype), size, need, read, cluster)
    return row if read.replicas == 1 else _replicated(row, read.replicas, cluster)


def _facts(read: ReadJob) -> tuple[ModelSize, str, int]:
    """(size, dtype, tokens) of a read by forward pass."""
    config, dtype = read.model.config, read.dtype
    entries = None
    if config is None or read.read == "trained":
        checkpoint = Checkpoint(read.model.source or "", read.revision or read.model.main_checkpoint(), read.base)
        config = checkpoint.config()
        entries = read_headers(checkpoint) if read.read == "trained" else None
    built = build_config(config)
    if dtype == "auto":
        declared = str(getattr(built, "dtype", None) or "float32").removeprefix("torch.")
        dtype = (stored_dtype(entries) if entries else None) or declared
    size = _measure(json.dumps(config, sort_keys=True), read.protocol.sequence_length)
    rule = read.protocol.tokens
    return size, dtype, rule if isinstance(rule, int) else int(rule[:-1]) * size.hidden_size


@cache
def _measure(config_json: str, sequence_length: int) -> ModelSize:
    """`measure`, once for the reads of one architecture."""
    return measure(build_config(json.loads(config_json)), sequence_length)


def _place(row: Placement, size: ModelSize, need: Needs, read: ReadJob, cluster: Cluster) -> Placement:
    node = cluster.largest
    on_gpu = node.gpus > 0
    host = (node.host_bytes or math.inf) - PROCESS_BYTES
    budget = _USABLE * (node.gpu_bytes if on_gpu else host)
    wanted = read.engine if read.engine != "torch" or read.model.engine == "torch" else "auto"
    one_tap = max(need.resident(1), 0 if on_gpu else need.resident_load)
    loadable = need.resident_load <= _USABLE * host
    row = replace(
        row,
        weight_bytes=int(need.weights),
        activation_bytes=int(need.activations),
        gpus=int(on_gpu),
        tensor_parallel=1,
        engine="vllm" if wanted == "vllm" else "torch",
    )
    if wanted != "streaming" and one_tap <= budget and loadable:
        at_once = _taps_at_once(read, need, budget - need.weights)
        peak = max(need.resident(at_once), 0 if on_gpu else need.resident_load)
        return replace(
            row,
            passes=-(-need.num_taps // at_once),
            accumulator_bytes=int(need.held * at_once + need.decomposed),
            **_peak(peak, need.resident_load, on_gpu),
        )
    ranks = _ranks(size, need, node, cluster) if wanted != "streaming" and on_gpu and loadable else None
    if ranks is not None:
        at_once = ranks * _taps_at_once(read, need, budget - need.sharded(ranks))
        return replace(
            row,
            gpus=ranks,
            tensor_parallel=ranks,
            passes=-(-need.num_taps // at_once),
            accumulator_bytes=int(need.held * min(at_once, need.num_taps) / ranks + need.decomposed),
            note=f"tensor parallel{' across nodes' if ranks > node.gpus else ''}: "
            f"{ranks} divides {size.num_heads} heads, {size.num_kv_heads} KV heads",
            **_peak(need.sharded(ranks), need.resident_load, on_gpu),
        )
    parked = max(0.0, budget - need.streamed(0.0)) / _ACCUMULATOR_SHARE
    least = need.streamed(parked)
    streamed = replace(
        row,
        engine="streaming",
        passes=1,
        accumulator_bytes=int(2 * need.held + need.decomposed),
        note=f"block streaming: resident needs {_gb(one_tap if loadable else need.resident_load)}",
        **_peak(least, need.outside + need.drawing, on_gpu),
    )
    if wanted in ("auto", "streaming") and least <= budget:
        return streamed
    place = f"a GPU of {_gb(node.gpu_bytes)}" if on_gpu and loadable else f"{_gb(node.host_bytes or 0)} of memory"
    if wanted in ("auto", "streaming"):
        return replace(
            streamed,
            problem=f"block streaming still needs {_gb(least)} ({_gb(need.outside)} outside the blocks, "
            f"{_gb(need.block)} a block), more than {place}; give {_remedy(row.dtype, need)}",
        )
    resident = _peak(one_tap, need.resident_load, on_gpu)
    problem = f"{_gb(max(one_tap, need.resident_load))} do not fit in {place}; --engine streaming needs {_gb(least)}"
    return replace(row, **resident, problem=problem)


def _replicated(row: Placement, replicas: int, cluster: Cluster) -> Placement:
    """The same on `replicas` devices, each with the whole model and a part of the tokens."""
    gpus, there = row.gpus * replicas, sum(node.gpus for node in cluster.nodes)
    note = "; ".join(part for part in (row.note, f"{replicas} replicas divide the tokens") if part)
    problem = row.problem
    if not problem and (row.tensor_parallel or 1) > 1:
        problem = f"{row.tensor_parallel} devices must share the model: give --engine streaming, or --replicas 1"
    elif not problem and gpus > there:
        problem = f"{replicas} replicas need {gpus} GPUs and there are {there}; give --replicas {there // row.gpus}"
    return replace(row, gpus=gpus, note=note, problem=problem)


def _taps_at_once(read: ReadJob, need: Needs, free: float) -> int:
    share = read.accumulator_gb * 1e9 if read.accumulator_gb is not None else free / _ACCUMULATOR_SHARE
    return min(need.num_taps, max(1, int(share // need.decomposed)))


def _peak(value: float, host: float, on_gpu: bool) -> dict[str, Any]:
    """Columns of the peaks: `value` where the model runs, `host` in host memory beside a GPU."""
    if on_gpu:
        return {"peak_bytes": int(value), "peak_host_bytes": int(PROCESS_BYTES + host)}
    return {"peak_bytes": None, "peak_host_bytes": int(value + PROCESS_BYTES)}


def _ranks(size: ModelSize, need: Needs, node: Node, cluster: Cluster) -> int | None:
    """The smallest tensor-parallel degree that divides the heads and fits; beyond one node only by whole nodes."""
    if not size.num_heads or not size.num_kv_heads:
        return None
    degrees: list[int] = [*range(2, node.gpus + 1), *(node.gpus * n for n in range(2, len(cluster.nodes) + 1))]
    for ranks in degrees:
        divides = size.num_heads % ranks == 0 and size.num_kv_heads % ranks == 0
        if divides and need.sharded(ranks) <= _USABLE * node.gpu_bytes:
            return ranks
    return None


def _remedy(dtype: str | None, need: Needs) -> str:
    remedies = ["more memory"]
    if dtype in ("float32", "float64"):
        remedies.append("--dtype bfloat16")
    if need.stream > need.block:
        remedies.append("fewer --tokens")
    return " or ".join(remedies)


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f} GB"


def as_rows(plan: list[Placement]) -> list[dict[str, Any]]:
    """The plan as plain dicts."""
    return [asdict(row) for row in plan]


def place_jobs(jobs: list[ModelJob], cluster: Cluster) -> tuple[list[ModelJob], list[str]]:
    """`jobs` with the engine that the plan chose, and the problems, one line each; what cannot fit carries its reason.

    Models whose published size leaves no doubt are not measured.
    """
    problems: list[str] = []
    placed = []
    for job in jobs:
        reads, degree = [], None
        for read in job.reads:
            shared = (job.tensor_parallel or 1) > 1  # asked for: the actors say what does not fit
            if read.engine and not read.error and not shared and not _surely_fits(read, cluster):
                row = place(read, cluster)
                if row.tensor_parallel and row.tensor_parallel > 1:
                    degree = max(degree or 1, row.tensor_parallel)
                if row.problem:
                    problems.append(f"{read.label()}: {row.problem}")
                    read = replace(read, error=row.problem)
                elif row.engine == "streaming" and read.engine == "torch":
                    problems.append(f"{read.label()}: {row.note}")
                    read = replace(read, engine="streaming")
            reads.append(read)
        placed.append(replace(job, reads=tuple(reads), tensor_parallel=job.tensor_parallel or degree))
    return placed, problems


def _surely_fits(read: ReadJob, cluster: Cluster) -> bool:
    """Whether float32 weights by the registry's own figure take less than an eighth of the memory."""
    node = cluster.largest
    memory = node.gpu_bytes if node.gpus else node.host_bytes
    return read.model.parameters is not None and memory is not None and 4 * read.model.parameters * 8 <= memory
