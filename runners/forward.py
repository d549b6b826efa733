"""A read by forward passes: one model, random or trained, from its weights to the rows of its spectra.

The first pass over the tokens feeds the final norm's read and as many taps of the residual stream as fit in the stated
memory; the taps that are left are read in further passes over the same tokens.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from runners.events import Progress, Reading
from runners.jobs import ReadJob
from runners.torch_engine import BATCH_TOKENS, Blocks, Swept, TorchEngine, pick_device
from suite.architecture import block_list, build_config, build_model, count_parameters, objective
from suite.feed import feed, part_of
from suite.final_norm import FinalNormRead
from suite.inputs import Batch, Inputs, check_count
from suite.norms import live_norm
from suite.parameters import architecture_columns, scale_columns, stored_tensor
from suite.residual import TAP_BYTES, ResidualRead
from suite.resolution import FinalNorm
from suite.schema import Row
from suite.tensors import TensorEntry, stored_dtype

_ACCUMULATOR_SHARE = 4  # of the memory that is free, the accumulators of one pass take one part in so many


@dataclass
class Seconds:
    """Where the time of the passes went: in the model, and in what is read from it."""

    forward: float = 0.0
    spectrum: float = 0.0


def read_forward(
    read: ReadJob,
    raw_config: dict[str, Any],
    folder: Path | None,
    *,
    trained: bool,
    entries: dict[str, TensorEntry] | None = None,
) -> Reading:
    """The final norm's spectrum and the residual stream's, of a random or a trained model.

    Args:
        read: what is asked.
        raw_config: the contents of config.json.
        folder: a local folder with the tokenizer or processor, and the weights where `trained`.
        trained: load the weights from `folder`; else initialise at random.
        entries: the checkpoint's tensors, where there is one.

    Raises:
        ValueError: what cannot be read, in one line.
    """
    config = build_config(raw_config)
    name = dtype_name(read, config, entries)
    dtype = getattr(torch, name)
    engine = make_engine(read.engine)
    engine.part, _ = part_of(build_model(config, "meta"), read.model.modality, read.model.stack)
    model = engine.load_trained(folder, dtype) if trained and folder else engine.load_random(config, read.seed, dtype)

    final = engine.final_norm(model)
    row: Row = architecture_columns(below(engine.part, final)) | {
        "num_parameters": num_parameters(json.dumps(raw_config, sort_keys=True)),
        "objective": objective(raw_config),
        "dtype": name,
        "device": engine.device_name(),
        "load_seconds": engine.load_seconds,
        "engine_detail": engine.detail,
        "tensor_parallel": engine.ranks.size,
    }
    if final.path is None:
        if final.family == "undetermined":
            raise ValueError(f"the final norm cannot be determined: {final.reason}")
        return {"reads": [row | {"error": final.reason, "peak_device_bytes": engine.peak_device_bytes()}]}

    part = model.get_submodule(engine.part)
    module = part.get_submodule(final.path)
    assert final.hidden_size is not None
    norm = live_norm(module, final.behaviour, final.hidden_size)
    num_tokens = wanted_tokens(read, final.hidden_size)
    yield Progress(read.label(), "input", 0, num_tokens)
    for batch_tokens in (BATCH_TOKENS, BATCH_TOKENS // 2):
        inputs = make_inputs(read, engine.runnable(model), folder, num_tokens, batch_tokens)
        check_count(inputs.num_tokens, final.hidden_size)
        measured = FinalNormRead(module, norm)
        stream = ResidualRead(
            final.hidden_size, inputs.num_tokens, name, str(final.placement), engine.device, engine.ranks
        )
        seconds = Seconds()
        try:
            yield from _run_passes(read, engine, part, final, inputs, measured, stream, seconds)
            break
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            # Ranks are in step and one cannot go back alone: they do not try again.
            if batch_tokens < BATCH_TOKENS or engine.ranks.size > 1:
                raise ValueError(_sizes(engine, model, batch_tokens, final.hidden_size)) from error
        yield Progress(read.label(), "out of memory: again with half the batch", 0, inputs.num_tokens)
    if engine.ranks.rank > 0:
        return {"reads": [row]}  # rank 0 has every row and tells
    yield Progress(read.label(), "spectrum", inputs.num_tokens, inputs.num_tokens)
    started = time.perf_counter()
    columns, final_spectrum = measured.finish()
    stream_columns, blocks, spectra = stream.finish()
    seconds.spectrum += time.perf_counter() - started
    row |= scale_columns(norm, name) | columns | stream_columns
    row |= {
        "final_norm_tensor": tensor_name(entries, below(engine.part, final)),
        "input": inputs.description,
        "num_distinct_inputs": inputs.num_distinct,
        "forward_seconds": seconds.forward,
        "spectrum_seconds": seconds.spectrum,
        "peak_device_bytes": engine.peak_device_bytes(),
    }
    return {"reads": [row], "spectra": [final_spectrum, *spectra], "blocks": blocks}


def _run_passes(
    read: ReadJob,
    engine: TorchEngine,
    model: nn.Module,
    final: FinalNorm,
    inputs: Inputs,
    measured: FinalNormRead,
    stream: ResidualRead,
    seconds: Seconds,
) -> Reading:
    """Feed both reads: one pass over the tokens, and as many more as the taps need."""
    assert final.path is not None
    assert final.hidden_size is not None
    norm = model.get_submodule(final.path)
    blocks_path, _ = block_list(model, final.path)
    modules = list(model.get_submodule(blocks_path).children()) if blocks_path else []
    blocks = Blocks(modules, lambda tap, acts, batch: stream.update(tap, acts, batch.mask_ST))
    ranks = engine.ranks
    budget = min(ranks.gather(accumulator_bytes(read, engine.device)))
    per_pass = ranks.size * stream.taps_within(budget, final.hidden_size)
    if engine.tap_by_tap:
        per_pass = sys.maxsize
    first, num_taps = 0, 1
    while first < num_taps:
        stream.wanted = range(first, first + per_pass)
        done = 0
        for step in engine.passes(model, norm, inputs.batches, blocks):
            started = time.perf_counter()
            if isinstance(step, Swept):  # all of this tap's rows are there, and nothing of the next tap's
                stream.end_pass()
                seconds.spectrum += time.perf_counter() - started
                yield Progress(read.label(), "blocks", step.num_done, step.num_blocks)
                continue
            batch, traffic = step
            with ranks.together():
                if first == 0 and ranks.rank == 0:
                    measured.update(traffic.input_BTD, traffic.output_BTD, batch.mask_ST)
                if modules:
                    # A post-LN model's stream leaves its last block through the final norm.
                    last = traffic.output_BTD if final.placement == "post" else traffic.input_BTD
                    stream.update(traffic.num_block_calls, last, batch.mask_ST)
                    num_taps = traffic.num_block_calls + 1
            seconds.forward += traffic.seconds
            seconds.spectrum += traffic.tap_seconds + time.perf_counter() - started
            done += _num_rows(batch, traffic.output_BTD)
            phase = "forward" if num_taps <= per_pass else f"taps {first} to {min(first + per_pass, num_taps) - 1}"
            yield Progress(read.label(), phase, done, inputs.num_tokens)
        yield Progress(read.label(), "spectrum", done, inputs.num_tokens)
        started = time.perf_counter()
        stream.end_pass()
        seconds.spectrum += time.perf_counter() - started
        first += per_pass
    return {}


def _num_rows(batch: Batch, output: Tensor) -> int:
    return output.numel() // output.shape[-1] if batch.mask_ST is None else int(batch.mask_ST.sum())


def dtype_name(read: ReadJob, config: Any, entries: dict[str, TensorEntry] | None) -> str:
    """The dtype of the forward pass: as asked, else that of the stored tensors, else the configuration's."""
    if read.dtype != "auto":
        return read.dtype
    declared = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return (stored_dtype(entries) if entries else None) or declared


def wanted_tokens(read: ReadJob, hidden_size: int) -> int:
    """The protocol's tokens for a model of that width."""
    rule = read.protocol.tokens
    return rule if isinstance(rule, int) else int(rule[:-1]) * hidden_size


def accumulator_bytes(read: ReadJob, device: torch.device) -> float:
    """What the taps of one pass may take, where the model lives: as asked, else a part of what is free."""
    if read.accumulator_gb is not None:
        return read.accumulator_gb * 1e9
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return float(free) / _ACCUMULATOR_SHARE


def make_engine(name: str | None) -> TorchEngine:
    """The engine of that name, on the device that this process has."""
    if name == "streaming":
        from runners.streaming_engine import StreamingEngine

        return StreamingEngine(pick_device())
    if torch.distributed.is_initialized():  # this process is one rank of a group
        from runners.parallel import ParallelEngine

        return ParallelEngine(pick_device())
    return TorchEngine(pick_device())


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _sizes(engine: TorchEngine, model: nn.Module, batch_tokens: int, hidden_size: int) -> str:
    weights = sum(p.nbytes for p in model.parameters() if not p.is_meta) / engine.ranks.size
    alone = engine.ranks.size == 1
    tried = ", with half the batch too" if alone else f" in one of {engine.ranks.size} ranks"
    first = "--engine streaming" if alone else "a larger --tensor-parallel"
    return (
        f"out of memory on {engine.device_name()}{tried}: {weights / 1e9:.1f} GB of weights, batches of {batch_tokens} "
        f"tokens, accumulators of {TAP_BYTES * hidden_size**2 / 1e9:.1f} GB a tap; give {first}, a smaller "
        "--accumulator-gb or --dtype bfloat16"
    )


def make_inputs(
    read: ReadJob, part: nn.Module, folder: Path | None, num_tokens: int, batch_tokens: int, least_items: int = 1
) -> Inputs:
    """What the part of the model that is read is fed, in batches of about `batch_tokens`."""
    assert read.input is not None
    return feed(
        part,
        read.input,
        modality=read.model.modality,
        num_tokens=num_tokens,
        sequence_length=read.protocol.sequence_length,
        seed=read.seed,
        folder=folder,
        batch_tokens=batch_tokens,
        least_items=least_items,
    )


def below(path: str, final: FinalNorm) -> FinalNorm:
    """`final`, found in the part at `path`, as the whole model calls it."""
    return final if final.path is None or not path else replace(final, path=f"{path}.{final.path}")


def tensor_name(entries: dict[str, TensorEntry] | None, final: FinalNorm) -> str | None:
    """The name of the final norm's scale in the checkpoint."""
    if entries is None or final.path is None:
        return None
    entry = stored_tensor(entries, final.path, final.behaviour.scale_parameter)
    return entry.name if entry else None


@cache
def num_parameters(config_json: str) -> int:
    """Parameters of the published architecture, from the contents of config.json."""
    return count_parameters(build_config(json.loads(config_json)))
