"""The plan: which engine reads each model, on how many devices, in how many passes; and what cannot fit, and why.

Nothing is loaded. Resident on one device comes first (on a part of one where a GPU has room for several), then tensor
parallel (a degree that divides attention heads and KV heads), then block streaming; which comes before both where they
leave the accumulators so little room that the further passes would take longer.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from deadbench.runners.engines.registry import BLOCKWISE, ENGINES
from deadbench.runners.jobs.job import ModelJob, ReadJob, Unfit, Unreached
from deadbench.runners.jobs.resolved import Configuration, dtype_name, num_tokens
from deadbench.runners.planning.hardware import Cluster, Room
from deadbench.runners.planning.needs import Needs, needs
from deadbench.runners.planning.placement import Placement, fit, fit_whole, joined, replicated
from deadbench.runners.planning.seconds import Seconds, Work, projected, rates_of
from deadbench.runners.planning.sizes import ModelSize, measure
from deadbench.suite.checkpoints.tensors import TensorEntry
from deadbench.suite.errors import CheckpointError, one_line, one_source
from deadbench.suite.plain_text import plain
from deadbench.suite.read_specs import READ_SPECS

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_NEAR = 1.25  # times what block streaming takes, up to which a model is held whole, as is the standard


def make_plan(jobs: list[ModelJob], cluster: Cluster, done: Collection[tuple[Any, ...]] = ()) -> list[Placement]:
    """A placement for every read of `jobs`, in the order in which the models would start: largest first.

    `done`: identities of reads that are finished (`ResultStore.finished`), which would be skipped.
    """
    rows = []
    for job in jobs:
        tensor_parallel = job.asked_tensor_parallel(has_gpus=cluster.largest.gpus > 0)
        placed = zip(job.reads, place_together(job.reads, cluster, tensor_parallel), strict=True)
        rows.append([_unless_done(read, row, done) for read, row in placed])
    rows.sort(key=lambda each: max((r.gpus, r.weight_bytes or 0) for r in each), reverse=True)
    return [replace(row, order=order) for order, each in enumerate(rows, 1) for row in each]


def _unless_done(read: ReadJob, row: Placement, done: Collection[tuple[Any, ...]]) -> Placement:
    is_done = read.as_stored(done).identity() in done
    return replace(row, note="already there", problem=None) if is_done else row


def place_together(reads: Sequence[ReadJob], cluster: Cluster, tensor_parallel: int | None = None) -> list[Placement]:
    """How the reads of one model would run, over `tensor_parallel` devices where a number is given.

    The same devices do them all: where some reads would be shared by several and others streamed on one, all are on
    one, or, if that leaves more of them without a place, all are shared.
    """
    rows = [place(read, cluster, tensor_parallel) for read in reads]
    placed = [row for row in rows if row.engine is not None and row.problem is None]
    degree = max((row.tensor_parallel or 1 for row in placed), default=1)
    if tensor_parallel is not None or degree == 1 or not any(ENGINES[str(row.engine)].blockwise for row in placed):
        return rows
    either = ([place(read, cluster, each) for read in reads] for each in (1, degree))
    return min(either, key=lambda rows: sum(row.problem is not None for row in rows))


def place(read: ReadJob, cluster: Cluster, tensor_parallel: int | None = None) -> Placement:
    """How one read would run, over `tensor_parallel` devices where a number is given."""
    row = Placement(0, read.model.id, read.revision, read.read)
    problem, remark = read.error, None
    if isinstance(problem, Unreached) and cluster.assumed:  # nor does that matter to an assumed cluster
        problem, remark = None, "its source cannot be reached from here"
    if read.factory is not None:  # what it takes is its factory's to say
        return replace(
            row, engine=read.engine, gpus=min(1, cluster.largest.gpus), note="a module of your own, not sized"
        )
    if not READ_SPECS[read.read].runs_model:
        return replace(row, note=joined("headers and norms only", remark), problem=problem)
    try:
        with one_source(read.model.id):
            return _placed(row, read, cluster, tensor_parallel, problem, remark)
    except ValueError as error:
        return replace(row, problem=problem or one_line(error))


def _placed(
    row: Placement,
    read: ReadJob,
    cluster: Cluster,
    tensor_parallel: int | None,
    problem: str | None,
    remark: str | None,
) -> Placement:
    """`row` of a read by forward pass; raises whatever its configuration makes transformers raise."""
    size, dtype, inline = _facts(read)
    if inline:
        remark = "sized by the registry's configuration"
    share = -(-num_tokens(read.protocol.tokens, size.hidden_size) // read.replicas)
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"dtype {plain(dtype)} is none that a model runs in; give --dtype {', '.join(_ITEM_BYTES)}")
    row, need = replace(row, dtype=dtype), needs(size, read.read, _ITEM_BYTES[dtype], share, read.protocol.tap_stride)
    if not READ_SPECS[read.read].divides:
        found = fit_whole(row, need, Room.of(cluster))
    else:
        found = _soonest(row, size, need, read, cluster, tensor_parallel)
        found = found if read.replicas == 1 else replicated(found, read.replicas, cluster)
        if found.problem is None and 0 < cluster.largest.gpus < (found.tensor_parallel or 1):
            problem = problem or ENGINES[str(found.engine)].why_not_over_nodes(_described(read)[0])
        if found.problem is None:
            taken = _seconds(found, size, need, read, cluster)
            found = replace(
                found,
                seconds=taken.total,
                most=taken.most,
                load_seconds=taken.load,
                forward_seconds=taken.forward,
                spectrum_seconds=taken.spectra,
            )
    if cluster.to_come and found.problem is None:
        now = _placed(row, read, cluster.here(), tensor_parallel, None, None)
        differs = now.problem or (now.engine, now.gpus) != (found.engine, found.gpus)
        found = replace(found, note=joined(found.note, "when nodes have come" if differs else None))
    return replace(found, note=joined(found.note, remark), problem=problem or found.problem)


def _soonest(
    row: Placement, size: ModelSize, need: Needs, read: ReadJob, cluster: Cluster, tensor_parallel: int | None
) -> Placement:
    """As `fit`; of `auto`, block streaming also where what fits would take more than `_NEAR` times as long."""
    found = fit(row, size, need, read, cluster, tensor_parallel)
    if not read.auto or found.problem or found.passes == 1 or (tensor_parallel or 1) > 1:
        return found
    streamed = fit(row, size, need, replace(read, engine=BLOCKWISE, auto=False), cluster, tensor_parallel)
    whole, by_block = (_seconds(each, size, need, read, cluster).total for each in (found, streamed))
    if streamed.problem or whole <= _NEAR * by_block:
        return found
    held = "resident" if found.tensor_parallel == 1 else "tensor parallel"
    return replace(streamed, note=f"block streaming: {held} would take {found.passes} passes")


def _seconds(row: Placement, size: ModelSize, need: Needs, read: ReadJob, cluster: Cluster) -> Seconds:
    """How long `row` would take; its replicas and ranks share what tokens and taps cost."""
    tokens = num_tokens(read.protocol.tokens, size.hidden_size)
    trained = read.read == "trained"
    work = Work(
        read.read,
        passed_tokens=tokens * (row.passes or 1),
        num_tokens=tokens,
        flop_per_token=size.flop_per_token,
        num_taps=need.num_taps,
        hidden_size=size.hidden_size,
        drawn=0.0 if trained else size.parameters,
        loaded_bytes=need.weights if trained else 0.0,
        dtype=row.dtype,
        devices=(row.tensor_parallel or 1) * read.replicas,
    )
    return projected(work, rates_of(cluster)[0])


def _facts(read: ReadJob) -> tuple[ModelSize, str, bool]:
    """(size, dtype) of a read by forward pass, and whether the registry's word stands for the checkpoint's."""
    raw_config, entries, inline = _described(read)
    shape = (read.protocol.sequence_length, read.model.modality, read.model.stack)
    config = Configuration(raw_config)
    return _measure(config, *shape), dtype_name(read.dtype, config.build(), entries), inline


def _described(read: ReadJob) -> tuple[dict[str, Any], dict[str, TensorEntry] | None, bool]:
    """(contents of config.json, a trained model's tensors), the registry's configuration where it must do.

    Raises:
        CheckpointError: the checkpoint cannot be opened, and the registry has none.
    """
    weights = READ_SPECS[read.read].opens == "weights"
    if read.model.config is not None and not weights:
        return read.model.config, None, False
    if read.error and not isinstance(read.error, Unfit):  # it could not be opened, which is not waited for once more
        if read.model.config is None:
            raise CheckpointError(read.error)
        return read.model.config, None, True
    try:
        checkpoint = read.opened(read.revision or read.model.main_checkpoint())
        return (
            checkpoint.config(),
            checkpoint.headers() if weights else None,
            False,
        )
    except CheckpointError:
        if read.model.config is None:
            raise
        return read.model.config, None, True


@cache
def _measure(config: Configuration, sequence_length: int, modality: str, stack: str) -> ModelSize:
    """`measure`, once for the reads of one architecture."""
    return measure(config.build(), sequence_length, modality, stack)


def as_rows(plan: list[Placement]) -> list[dict[str, Any]]:
    """The plan as plain dicts."""
    return [asdict(row) for row in plan]
