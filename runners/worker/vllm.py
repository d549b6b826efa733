"""The vLLM engine: vLLM runs the model, its workers read it (`runners/engines/vllm_worker.py`), rows come back.

vLLM is imported only here and in the workers, and only when a read asks for it.
"""

import contextlib
import copy
import gc
import json
import os
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch

from deadbench.runners.engines.base import BATCH_TOKENS
from deadbench.runners.engines.device import pick_device
from deadbench.runners.engines.registry import ENGINES
from deadbench.runners.engines.vllm_support import ENVIRONMENT, refusal, vllm_architecture
from deadbench.runners.jobs.events import Progress, Reading
from deadbench.runners.jobs.job import ReadJob
from deadbench.runners.jobs.resolved import (
    Configuration,
    dtype_name,
    num_parameters,
    num_tokens,
    resolved_without_weights,
)
from deadbench.runners.worker.passes import accumulator_bytes
from deadbench.runners.worker.request import StoredWeights, Weights, entries_of, make_inputs, tensor_name
from deadbench.suite.architectures.stored_names import wrapped
from deadbench.suite.inputs.batches import Inputs, check_inputs
from deadbench.suite.inputs.specs import MIXED
from deadbench.suite.reads.columns import architecture_columns
from deadbench.suite.reads.residual import ResidualRead
from deadbench.suite.schema import Row
from deadbench.suite.scratch import Scratch

_SPEC = ENGINES["vllm"]
_LEAST_CACHE = 2**28  # blocks are whole, and Mamba keeps states beside them


def read_vllm(read: ReadJob, config: Configuration, weights: Weights) -> Reading:
    """As `read_forward`, by vLLM.

    Raises:
        ValueError: what cannot be read, in one line.
    """
    if missing := _SPEC.missing():
        raise ValueError(missing)
    if read.model.modality != "text":
        raise ValueError(f"the vLLM engine reads text models, not {read.model.modality}; give --engine torch")
    if (read.input or "").partition(":")[0] in MIXED:
        raise ValueError("the vLLM engine is given no pictures beside text; give --engine torch")
    if read.protocol.skip_positions:
        raise ValueError("the vLLM engine leaves no positions out, as skip_positions asks; give --engine torch")
    if isinstance(weights, StoredWeights) and weights.format != "safetensors":
        raise ValueError(f"the vLLM engine reads safetensors, not {weights.format}; give --engine torch")
    if wrapper := wrapped(entries_of(weights) or ()):
        raise ValueError(
            f"{weights.folder}: the tensor {wrapper} carries the name of a wrapper, which vLLM does not know; "
            "save the model that is wrapped, or give --engine torch"
        )
    device = pick_device()
    dtype = dtype_name(read.dtype, config.build(), entries_of(weights))
    resolved = resolved_without_weights(config, "text", "decoder")  # the whole model, whatever its halves
    final, whole = resolved.final, resolved.skeleton
    if final.path is None or final.hidden_size is None:
        raise ValueError(f"the final norm cannot be determined: {final.reason}; give --engine torch")
    assert whole is not None
    module = copy.deepcopy(whole.get_submodule(final.path)).to_empty(device="cpu")
    sought = pickle.dumps((final, module))
    raw_config = dict(config.raw) | {"architectures": [vllm_architecture(dict(config.raw))]}
    wanted = num_tokens(read.protocol.tokens, final.hidden_size)
    yield Progress(read.label(), "input", 0, wanted)
    inputs = make_inputs(read, whole, weights.folder, wanted, BATCH_TOKENS, resolved=resolved)
    check_inputs(inputs, final.hidden_size)
    prompts, stride = list(_prompts(inputs)), read.protocol.tap_stride
    row: Row = architecture_columns(final) | {"num_parameters": num_parameters(Configuration(raw_config))}

    yield Progress(read.label(), "loading")
    started = time.perf_counter()
    with _loaded(read, raw_config, weights, dtype, max(map(len, prompts))) as llm:
        load_seconds = time.perf_counter() - started
        llm.collective_rpc("deadbench_begin", args=(sought, inputs.num_tokens, dtype, stride))
        _run(llm, prompts[:1])
        least = min(llm.collective_rpc("deadbench_free"))  # as the workers see it: this process looks at no GPU
        budget = accumulator_bytes(read, least) / (1 if device.type == "cuda" else read.tensor_parallel)
        sharing = read.tensor_parallel // read.stages  # a block's taps; they may all be of one stage
        per_pass = max(1, stride) * sharing * ResidualRead.taps_within(budget, final.hidden_size)
        first, num_taps, detail = 0, 1, ""
        forward = spectrum = 0.0
        while first < num_taps:
            yield Progress(read.label(), "forward", first, num_taps)
            started = time.perf_counter()
            llm.collective_rpc("deadbench_pass", args=(first, per_pass))
            _run(llm, prompts)
            forward += time.perf_counter() - started
            started = time.perf_counter()
            told = json.loads(llm.collective_rpc("deadbench_end_pass")[-1])
            spectrum += time.perf_counter() - started
            if "error" in told:
                raise ValueError(told["error"])
            num_taps, detail = told["taps"], told["detail"]
            first += per_pass
        yield Progress(read.label(), "spectrum", inputs.num_tokens, inputs.num_tokens)
        started = time.perf_counter()
        packed = next(filter(None, llm.collective_rpc("deadbench_finish")))  # of the stage that has the norm
        tables = [pa.ipc.open_stream(part).read_all() for part in packed]
        spectrum += time.perf_counter() - started
    reads, spectra, blocks, samples = (_rows(table) for table in tables)
    row |= reads[0] | {
        "final_norm_tensor": tensor_name(entries_of(weights), final),
        "input": inputs.description,
        "num_distinct_inputs": inputs.num_distinct,
        "dtype": dtype,
        "device": _device_name(device),
        "load_seconds": load_seconds,
        "forward_seconds": forward,  # with what the hooks do meanwhile
        "spectrum_seconds": spectrum,
        "tensor_parallel": read.tensor_parallel,
        "engine_detail": f"vLLM {_version()}, {detail}",
    }
    return {"reads": [row], "spectra": spectra, "blocks": blocks, "samples": samples}


@contextlib.contextmanager
def _loaded(read: ReadJob, raw_config: dict[str, Any], weights: Weights, dtype: str, longest: int) -> Iterator[Any]:
    """A running vLLM with these weights; everything of it is gone afterwards."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm

    from deadbench.runners.engines.vllm_random_weights import RANDOM_FORMAT

    with Scratch() as empty:
        (empty / "config.json").write_text(json.dumps(raw_config), encoding="utf-8")
        if isinstance(weights, StoredWeights):
            source: dict[str, Any] = {"model": str(weights.folder), "load_format": "safetensors"}
        else:
            extra = {"seed": weights.seed, "config": raw_config}  # the folder is on this node alone
            source = {"model": str(empty), "load_format": RANDOM_FORMAT, "model_loader_extra_config": extra}
        try:
            llm = vllm.LLM(
                **source,
                hf_overrides={"architectures": raw_config["architectures"]},
                dtype=dtype,
                tensor_parallel_size=read.tensor_parallel // read.stages,
                pipeline_parallel_size=read.stages,
                distributed_executor_backend="ray" if read.stages > 1 else "mp" if read.tensor_parallel > 1 else None,
                worker_extension_cls=_SPEC.path.replace(":", "."),
                enforce_eager=True,
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
                trust_remote_code=False,
                max_model_len=longest + 1,
                max_num_batched_tokens=max(BATCH_TOKENS, longest + 1),
                disable_log_stats=True,
                **_cache(raw_config, dtype, max(BATCH_TOKENS, longest + 1)),
                seed=read.seed,
            )
        except Exception as error:
            raise ValueError(f"vLLM cannot load it ({refusal(error)}); give --engine torch") from error
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _cache(raw_config: dict[str, Any], dtype: str, batch_tokens: int) -> dict[str, Any]:
    """vLLM's arguments for a cache of two steps' tokens: by default it takes all of a GPU that is left."""
    if not torch.cuda.is_available():
        return {}
    text = Configuration(raw_config).build().get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    a_token = 2 * text.num_hidden_layers * heads * width * getattr(torch, dtype).itemsize
    return {"kv_cache_memory_bytes": 2 * batch_tokens * a_token + _LEAST_CACHE, "gpu_memory_utilization": 0.5}


def _run(llm: Any, prompts: list[list[int]]) -> None:
    from vllm import SamplingParams

    once = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], once, use_tqdm=False)


def _prompts(inputs: Inputs) -> Iterator[list[int]]:
    """The sequences without their padding."""
    for batch in inputs.batches:
        ids_ST = batch.model_inputs["input_ids"]
        for row, ids_T in enumerate(ids_ST):
            yield ids_T.tolist() if batch.mask_ST is None else ids_T[batch.mask_ST[row]].tolist()


def _rows(table: pa.Table) -> list[Row]:
    return [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _version() -> str:
    import vllm

    return str(vllm.__version__)
