"""A read by forward passes: one model, random or trained, from its weights to the rows of its spectra.

What is run and read meanwhile is in `runners/passes.py`.
"""

import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runners.events import Progress, Reading
from runners.jobs import ReadJob
from runners.passes import Passes
from runners.torch_engine import BATCH_TOKENS, TorchEngine, pick_device
from suite.architecture import build_config, build_model, count_parameters, objective
from suite.feed import feed, part_of
from suite.inputs import Inputs, check_count
from suite.norms import live_norm
from suite.parameters import architecture_columns, scale_columns, stored_tensor
from suite.random_init import departure
from suite.ranks import Ranks
from suite.renaming import renamings
from suite.residual import TAP_BYTES
from suite.resolution import FinalNorm
from suite.schema import Row
from suite.tensors import TensorEntry, stored_dtype


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
    engine = make_engine(read.engine, read.replicas)
    engine.part, _ = part_of(build_model(config, "meta"), read.model.modality, read.model.stack)
    model = engine.load_trained(folder, dtype) if trained and folder else engine.load_random(config, read.seed, dtype)

    replicas = engine.ranks.replicas
    final = replace(engine.final_norm(model), renamings=renamings(model))
    row: Row = architecture_columns(below(engine.part, final)) | {
        "num_parameters": num_parameters(json.dumps(raw_config, sort_keys=True)),
        "objective": objective(raw_config),
        "dtype": name,
        "device": engine.device_name(),
        "load_seconds": engine.load_seconds,
        "engine_detail": engine.detail + (f"; tokens over {engine.ranks.size} replicas" if replicas else ""),
        "tensor_parallel": 1 if replicas else engine.ranks.size,
    }
    if final.path is None:
        if final.family == "undetermined":
            raise ValueError(f"the final norm cannot be determined: {final.reason}")
        return {"reads": [row | {"error": final.reason, "peak_device_bytes": engine.peak_device_bytes()}]}

    part = model.get_submodule(engine.part)
    module = part.get_submodule(final.path)
    assert final.hidden_size is not None
    norm = live_norm(module, final.behaviour, final.hidden_size)
    unlawful = None if trained else departure(norm, final.path)
    if unlawful:
        row["engine_detail"] = f"{row['engine_detail']}; {unlawful}"
    num_tokens = wanted_tokens(read, final.hidden_size)
    yield Progress(read.label(), "input", 0, num_tokens)
    for batch_tokens in (BATCH_TOKENS, BATCH_TOKENS // 2)[read.half_batch :]:
        inputs = make_inputs(read, engine.runnable(model), folder, num_tokens, batch_tokens)
        check_count(inputs.num_tokens, final.hidden_size)
        if engine.tap_by_tap and replicas and len(inputs.batches) < engine.ranks.size:
            raise ValueError(
                f"{engine.ranks.size} replicas for {len(inputs.batches)} batches of about {batch_tokens} tokens: block "
                f"streaming leaves none idle; give --replicas {len(inputs.batches)} at most, or more --tokens"
            )
        passes = Passes(read, engine, part, final, inputs, norm, name, batch_tokens)
        try:
            measured, stream, position = yield from passes.run()
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
    position.spectrum_seconds += time.perf_counter() - started
    row |= scale_columns(norm, name) | columns | stream_columns
    row |= {
        "final_norm_tensor": tensor_name(entries, below(engine.part, final)),
        "input": inputs.description,
        "num_distinct_inputs": inputs.num_distinct,
        "forward_seconds": position.forward_seconds,
        "spectrum_seconds": position.spectrum_seconds,
        "peak_device_bytes": engine.peak_device_bytes(),
    }
    return {"reads": [row], "spectra": [final_spectrum, *spectra], "blocks": blocks}


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


def make_engine(name: str | None, replicas: int = 1) -> TorchEngine:
    """The engine of that name, on this process's device; one of `replicas` that divide the tokens."""
    ranks = Ranks()
    if torch.distributed.is_initialized():  # this process is one rank of a group
        from runners.parallel import ParallelEngine, current_ranks

        if replicas == 1:
            return ParallelEngine(pick_device())
        ranks = replace(current_ranks(), divided="tokens")
    if name == "streaming":
        from runners.streaming_engine import StreamingEngine

        return StreamingEngine(pick_device(), ranks=ranks)
    return TorchEngine(pick_device(), ranks=ranks)


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
    entry = stored_tensor(entries, final.path, final.behaviour.scale_parameter, final.renamings)
    return entry.name if entry else None


@cache
def num_parameters(config_json: str) -> int:
    """Parameters of the published architecture, from the contents of config.json."""
    return count_parameters(build_config(json.loads(config_json)))
