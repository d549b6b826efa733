"""`deadbench.measure`: the reads of a model that lives in this process, left as it was found."""

import hashlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deadbench.runners.engines.registry import DEFAULT
from deadbench.runners.jobs.events import Rows, new_run_id, to_tables
from deadbench.runners.jobs.job import ReadJob, protocol_hash
from deadbench.runners.live.as_found import as_found
from deadbench.runners.live.reading import Reading
from deadbench.runners.worker.own_module import dtype_of, hold, read_own_module, without_blocks
from deadbench.runners.worker.own_parameters import own_parameters, published_columns
from deadbench.suite.architectures.kernel_test import plain_type
from deadbench.suite.architectures.live import Sites, inner, is_replicated, is_sharded
from deadbench.suite.errors import InputError
from deadbench.suite.inputs.batches import Batch
from deadbench.suite.ranks import Ranks
from deadbench.suite.registry.entries import Model, Protocol
from deadbench.suite.tracing.flow import tensors_of

MOST = "64D"  # rows that are read of an input that has more


def measure(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    reads: Sequence[str] | None = None,
    final_norm: str | nn.Module | None = None,
    blocks: str | nn.Module | Sequence[nn.Module] | None = None,
    taps: str = "all",
    max_tokens: int | str = MOST,
    accumulator_gb: float | None = None,
) -> Reading:
    """As `deadbench.measure` says."""
    wanted = reads or (("trained",) if batches is not None else ("parameters",))
    for read in wanted:
        if read not in ("parameters", "trained"):
            raise InputError(f"read {read!r} cannot be made of a live model; choose parameters or trained")
    if "trained" in wanted and batches is None:
        raise InputError("the read 'trained' needs batches; give some, or reads=('parameters',)")
    if taps not in ("all", "none"):
        raise InputError(f"taps {taps!r} is unknown; choose all or none")
    _refuse_flat(model)
    ranks = _ranks_of(model)
    run_id, found = new_run_id(), []
    with as_found(model):
        root, told = inner(model), (final_norm, blocks)
        sites: Sites | None = None
        held: list[Batch] = []
        if batches is not None:
            sites, held = hold(root, batches, *told, max_tokens, ranks)
        for read in wanted:
            started_at = datetime.now(UTC)
            if read == "parameters":
                job = live_job(root, read, "float32", [], None)
                rows = own_parameters(root, sites, *told)
            else:
                assert sites is not None
                job = live_job(root, read, dtype_of(root), held, accumulator_gb)
                looked_at = sites if taps == "all" else without_blocks(sites)
                rows = _result(read_own_module(job, root, looked_at, held, str(job.input), ranks))
                rows["reads"][0] |= published_columns(root, sites.final)
            rows["reads"][0]["status"] = "ok"
            found.append(to_tables(rows, job, run_id, 1, started_at))
    return Reading(tuple(found) if ranks.rank == 0 else ())


def live_job(
    model: nn.Module,
    read: str,
    dtype: str = "auto",
    held: Sequence[Batch] = (),
    accumulator_gb: float | None = None,
) -> ReadJob:
    """A read of `model` as a job, which gives its rows their key; nothing `held` is nothing that was fed yet."""
    root = inner(model)
    runs = read == "trained"
    lengths = [t.shape[1] for batch in held for t in tensors_of(batch.model_inputs).values() if t.ndim > 1]
    total = sum(batch.num_rows for batch in held)
    protocol = Protocol.model_construct(tokens=total or 1, sequence_length=max(lengths, default=1))
    content = _content(held) if runs else ""
    return ReadJob(
        model=Model.model_construct(id=plain_type(root).__name__, source=plain_type(root).__qualname__),
        read=read,
        revision=None,
        seed=0,
        engine=DEFAULT if runs else None,
        protocol_name="live",
        protocol=protocol,
        protocol_hash=protocol_hash(read, protocol.model_copy(update={"tokens": total}), dtype, content),
        input=f"batches:{content}" if runs else None,
        dtype=dtype,
        fingerprint=None,
        base=Path(),
        accumulator_gb=accumulator_gb,
    )


def _content(held: Sequence[Batch]) -> str:
    """A hash of what is fed; of each rank its own part."""
    digest = hashlib.sha256()
    for batch in held:
        for name, value in sorted(tensors_of(batch.model_inputs).items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _result(steps: Generator[Any, None, Rows]) -> Rows:
    """What a read returns, its progress left out."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _refuse_flat(model: nn.Module) -> None:
    """Raise InputError where parameters are parts of one long vector, which is nobody's norm any more."""
    flat = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    if flat or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        how = "FullyShardedDataParallel; use fully_shard" if flat else "DeepSpeed's stage 3"
        raise InputError(f"the parameters are divided by {how}, or read its checkpoints by deadbench run")


def _ranks_of(model: nn.Module) -> Ranks:
    """The processes that train `model` together, each with its own part of the tokens; else this one alone."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return Ranks()
    if torch.distributed.get_world_size() == 1 or not (is_sharded(model) or is_replicated(model)):
        return Ranks()
    return _world(id(torch.distributed.group.WORLD))


@lru_cache(1)
def _world(group: int) -> Ranks:
    """All ranks, for the exchange of states: a group of its own, made once."""
    from deadbench.runners.engines.tensor_parallel import current_ranks

    return replace(current_ranks(), divided="tokens")
