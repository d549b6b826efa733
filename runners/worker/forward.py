"""A read by forward passes: one model, random or trained, from its weights to the rows of its spectra.

What is run and read meanwhile is in `runners/worker/passes.py`.
"""

import time

import torch
from torch import nn

from deadbench.runners.engines.base import BATCH_TOKENS, Engine, batches_in_one
from deadbench.runners.engines.device import cause_of, free_bytes, give_back, rounds_to_tf32
from deadbench.runners.engines.registry import make_engine
from deadbench.runners.jobs.events import Progress, RankMemoryError, Reading, Rows
from deadbench.runners.jobs.job import ReadJob
from deadbench.runners.jobs.resolved import (
    Configuration,
    dtype_name,
    num_parameters,
    num_tokens,
    resolved_in,
    resolved_without_weights,
)
from deadbench.runners.worker.passes import Passes
from deadbench.runners.worker.request import (
    RandomWeights,
    StoredWeights,
    Weights,
    entries_of,
    make_inputs,
    tensor_name,
)
from deadbench.runners.worker.saved_state import Position
from deadbench.suite.architectures.kernel_test import live_norm
from deadbench.suite.architectures.norms import EffectiveNorm, FinalNorm, departure
from deadbench.suite.architectures.objectives import objective
from deadbench.suite.architectures.resolve import Resolved
from deadbench.suite.errors import UndeterminedError
from deadbench.suite.inputs.batches import check_distinct, check_inputs
from deadbench.suite.ranks import RankError
from deadbench.suite.read_specs import TAP_BYTES
from deadbench.suite.reads.columns import architecture_columns, scale_columns
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.reads.residual import ResidualRead
from deadbench.suite.schema import Row
from deadbench.suite.spectra.solvers import remarks

_ACTIVATIONS, _REPLAYED = 32, 80  # in D: numbers that a token is meanwhile in a block, bytes at the final norm, float64


def read_forward(read: ReadJob, config: Configuration, weights: Weights) -> Reading:
    """The final norm's spectrum and the residual stream's, of a random or a trained model.

    Raises:
        ValueError: what cannot be read, in one line.
    """
    name = dtype_name(read.dtype, config.build(), entries_of(weights))
    parameters = num_parameters(config)  # what transformers cannot build is refused before anything is loaded
    engine = make_engine(read.engine, read.replicas)
    model, resolved = _loaded(engine, read, config, weights, getattr(torch, name))

    replicas, final = engine.ranks.replicas, resolved.final
    row: Row = architecture_columns(resolved.final_in_whole) | {
        "num_parameters": parameters,
        "objective": objective(config.raw),
        "dtype": name,
        "device": engine.device_name(),
        "load_seconds": engine.load_seconds,
        "engine_detail": engine.detail + (f"; tokens over {engine.ranks.size} replicas" if replicas else ""),
        "tensor_parallel": 1 if replicas else engine.ranks.size,
    }
    part = model.get_submodule(resolved.part)
    if final.path is None:
        row |= {"error": final.reason, "peak_device_bytes": engine.peak_device_bytes()}
        return {"reads": [row | _of_pooled(part, resolved, weights, name)]}

    module = part.get_submodule(final.path)
    assert final.hidden_size is not None
    norm = live_norm(module, final.behaviour, final.hidden_size)
    if engine.absent:
        row["engine_detail"] = f"{row['engine_detail']}; not stored, and used by training alone: {engine.absent[0]}"
    unlawful = departure(norm, final.path) if isinstance(weights, RandomWeights) else None
    if unlawful:
        row["engine_detail"] = f"{row['engine_detail']}; {unlawful}"
    wanted = num_tokens(read.protocol.tokens, final.hidden_size)
    runnable = (resolved.skeleton or model).get_submodule(resolved.part)
    yield Progress(read.label(), "input", 0, wanted)
    per_batch, most_taps = BATCH_TOKENS // 2, None
    if not read.half_batch:
        per_batch = _per_batch(engine, read, part, parameters, final, wanted)
    while True:
        inputs = make_inputs(read, runnable, weights.folder, wanted, per_batch, resolved=resolved)
        check_inputs(inputs, final.hidden_size)
        if engine.tap_by_tap and replicas and len(inputs.batches) < engine.ranks.size:
            raise ValueError(
                f"{engine.ranks.size} replicas for {len(inputs.batches)} batches of about {per_batch} tokens: block "
                f"streaming leaves none idle; give --replicas {len(inputs.batches)} at most, or more --tokens"
            )
        passes = Passes(read, engine, part, final, inputs, norm, name, per_batch, most_taps=most_taps)
        try:
            measured, stream, position = yield from passes.run()
            break
        except (RuntimeError, MemoryError, RankError) as error:
            if cause_of(error) != "memory":
                raise
            fewer, sizes = passes.fewer_taps(), _sizes(engine, model, per_batch, final.hidden_size)
            # Ranks are in step and one cannot go back alone: the driver begins anew with all of them.
            if engine.ranks.size > 1 and not read.half_batch:
                raise RankMemoryError(sizes) from error
            if engine.ranks.size > 1 or (fewer is None and per_batch < BATCH_TOKENS):
                raise ValueError(sizes) from error
        if fewer is not None:
            most_taps, change = fewer, f"{fewer} taps a pass"
        else:
            per_batch, change = per_batch // 2, "half the batch"
        del passes
        give_back()
        yield Progress(read.label(), f"out of memory: again with {change}", 0, inputs.num_tokens)
    if engine.ranks.rank > 0:
        return {"reads": [row]}  # rank 0 has every row and tells
    yield Progress(read.label(), "spectrum", inputs.num_tokens, inputs.num_tokens)
    told = {
        "few-distinct-rows": measured.distinct.count() < measured.distinct.limit,
        "tf32": engine.device.type == "cuda" and rounds_to_tf32(),
        "not-stored": bool(engine.absent),
        "unlawful-initialisation": bool(unlawful),
    }
    row |= {
        "flags": [name for name, is_so in told.items() if is_so],
        "final_norm_tensor": tensor_name(entries_of(weights), resolved.final_in_whole),
        "input": inputs.description,
        "num_distinct_inputs": inputs.num_distinct,
        "peak_device_bytes": engine.peak_device_bytes(),
    }
    rows = finished(row, measured, stream, position, norm, name)
    for line in [*passes.remarks, *remarks()]:
        row["engine_detail"] = f"{row['engine_detail']}; {line}"
    return rows


def _of_pooled(part: nn.Module, resolved: Resolved, weights: Weights, dtype: str) -> Row:
    """Columns of a norm of what is pooled: which it is, its scales, and why there is no spectrum of it."""
    pooled = resolved.final.pooled
    if pooled is None or pooled.path is None or pooled.hidden_size is None:
        return {}
    norm = live_norm(part.get_submodule(pooled.path), pooled.behaviour, pooled.hidden_size)
    columns = architecture_columns(resolved.in_whole(pooled)) | scale_columns(norm, dtype) | {"error": pooled.reason}
    return columns | {"final_norm_tensor": tensor_name(entries_of(weights), resolved.in_whole(pooled))}


def finished(
    row: Row, measured: FinalNormRead, stream: ResidualRead, position: Position, norm: EffectiveNorm, dtype: str
) -> Rows:
    """All rows of a read whose passes are over, `row` being what is known beside them.

    Raises:
        InputError: too few of the rows that were read differ.
    """
    check_distinct(measured.distinct.count(), measured.num_tokens, len(norm.scale_D))
    started = time.perf_counter()
    columns, final_spectrum = measured.finish()
    stream_columns, blocks, spectra = stream.finish()
    position.spectrum_seconds += time.perf_counter() - started
    row |= scale_columns(norm, dtype) | columns | stream_columns
    row |= {"forward_seconds": position.forward_seconds, "spectrum_seconds": position.spectrum_seconds}
    samples = [measured.samples(columns["lambda_mean"])]
    return {"reads": [row], "spectra": [final_spectrum, *spectra], "blocks": blocks, "samples": samples}


def _loaded(
    engine: Engine, read: ReadJob, config: Configuration, weights: Weights, dtype: torch.dtype
) -> tuple[nn.Module, Resolved]:
    """The model, and what is known of its architecture: from itself, or from before where it is in pieces."""
    if engine.in_pieces:
        engine.resolved = resolved_without_weights(config, read.model.modality, read.model.stack)
        _check_determined(engine.resolved.final)
    if isinstance(weights, StoredWeights):
        model = engine.load_trained(weights.folder, dtype)
    else:
        model = engine.load_random(config.build(), weights.seed, dtype)
    engine.resolved = engine.resolved or resolved_in(model, config, read.model.modality, read.model.stack)
    _check_determined(engine.resolved.final)
    return model, engine.resolved


def _per_batch(
    engine: Engine, read: ReadJob, model: nn.Module, num_parameters: int, final: FinalNorm, wanted: int
) -> int:
    """Tokens of a batch; those of ranks are equal."""
    assert final.hidden_size is not None
    itemsize = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    held = (final.num_blocks or 0) + 1 if read.protocol.tap_stride else 0  # taps' rows, until a batch is through
    token = final.hidden_size * (itemsize * (_ACTIVATIONS + held) + _REPLAYED)
    mine = wanted // engine.ranks.size if engine.ranks.replicas else wanted
    on_device, free = engine.device.type != "cpu", free_bytes(engine.device)
    shared: list[int] = engine.ranks.share(batches_in_one(on_device, num_parameters, token, free, mine))
    return BATCH_TOKENS * min(shared)


def _check_determined(final: FinalNorm) -> None:
    if final.family == "undetermined":
        raise UndeterminedError(f"the final norm cannot be determined: {final.reason}")


def _sizes(engine: Engine, model: nn.Module, batch_tokens: int, hidden_size: int) -> str:
    weights = sum(p.nbytes for p in model.parameters() if not p.is_meta) / engine.ranks.size
    alone = engine.ranks.size == 1
    tried = ", with half the batch too" if alone else f" in one of {engine.ranks.size} ranks"
    first = "--engine streaming" if alone else "a larger --tensor-parallel"
    return (
        f"out of memory on {engine.device_name()}{tried}: {weights / 1e9:.1f} GB of weights, batches of {batch_tokens} "
        f"tokens, accumulators of {TAP_BYTES * hidden_size**2 / 1e9:.1f} GB a tap; give {first}, a smaller "
        "--accumulator-gb or --dtype bfloat16"
    )
