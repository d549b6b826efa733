"""What one actor does: the reads of one model, one after another, as a stream of events. Plain code, no Ray.

A read that fails is a finished row with its error; only the death of the process is not told from here.
"""

import json
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from runners.jobs import ModelJob, ReadJob, read_step
from suite.schema import Row, to_table

VERSIONED = ("torch", "transformers", "ray", "numpy", "pyarrow", "safetensors")


@dataclass(frozen=True)
class Progress:
    """Where a running model is; `done` of `total` tokens in the phase, zero where it has no count."""

    label: str
    phase: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Finished:
    """One read is over, well or not: its tables, and the traceback of a failure."""

    job: ReadJob
    tables: dict[str, pa.Table]
    traceback: str | None = None

    @property
    def row(self) -> Row:
        """The row of `reads`."""
        return self.tables["reads"].to_pylist()[0]  # type: ignore[no-any-return]


Event = Progress | Finished
Rows = dict[str, list[Row]]
Reading = Generator[Progress, None, Rows]


def run_model(job: ModelJob, run_id: str, attempt: int) -> Iterator[Event]:
    """Run the reads of `job`; yields progress, and a `Finished` for every read in order."""
    _quieten()
    for read in job.reads:
        started_at = datetime.now(UTC)
        yield Progress(read.label(), "loading")
        failure = None
        try:
            if read.error:
                raise ValueError(read.error)
            rows = yield from READ_FUNCTIONS[read.read](read)
            rows["reads"][0]["status"] = "ok"
        except Exception as error:
            failure = traceback.format_exc()
            rows = {"reads": [{"status": "failed", "error": one_line(error)}]}
        yield Finished(read, to_tables(rows, read, run_id, attempt, started_at), failure)


def to_tables(rows: Rows, read: ReadJob, run_id: str, attempt: int, started_at: datetime) -> dict[str, pa.Table]:
    """Arrow tables of a read: the key in every row, and in the row of `reads` what is known without measuring."""
    key = {"run_id": run_id} | read.key_columns()
    row = rows["reads"][0] | {
        "source": read.model.source or "inline config",
        "source_fingerprint": read.fingerprint,
        "checkpoint_step": read_step(read),
        "modality": read.model.modality,
        "protocol": read.protocol_name,
        "family_expected": read.model.family,
        "tensor_parallel": 1 if read.engine else None,
        "peak_host_bytes": _peak_host_bytes(),
        "versions": versions(),
        "started_at": started_at,
        "finished_at": datetime.now(UTC),
        "attempt": attempt,
    }
    row.setdefault("input", read.input)
    keyed = {name: [key | each for each in (rows[name] if name != "reads" else [row])] for name in rows}
    return {name: to_table(name, each) for name, each in keyed.items()}


def failed_read(read: ReadJob, run_id: str, attempt: int, error: str) -> Finished:
    """The row of a read whose process died before it could speak."""
    rows: Rows = {"reads": [{"status": "failed", "error": error}]}
    return Finished(read, to_tables(rows, read, run_id, attempt, datetime.now(UTC)))


def one_line(error: BaseException) -> str:
    """What went wrong, in one line; our own errors speak for themselves, others name their class."""
    text = " ".join(str(error).split())[:500]
    ours = type(error).__module__.split(".")[0] in ("suite", "runners") or type(error) is ValueError
    return text if ours and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _read_parameters(read: ReadJob) -> Reading:
    from suite.parameters import list_norms, read_parameters
    from suite.sources import Checkpoint

    checkpoint = Checkpoint(read.model.source or "", read.revision, read.base)
    result = read_parameters(checkpoint)
    if result.final.family == "undetermined":
        raise ValueError(f"the final norm cannot be determined: {result.reason}")
    yield Progress(read.label(), "norms")
    row = result.columns() | {"error": result.reason, "dtype": result.stored_dtype}
    row["num_parameters"] = _num_parameters(json.dumps(checkpoint.config(), sort_keys=True))
    return {"reads": [row], "norms": list_norms(checkpoint, result)}


def _read_random(read: ReadJob) -> Reading:
    from suite.sources import Checkpoint

    with ExitStack() as stack:
        config, folder = read.model.config, None
        if config is None:
            checkpoint = Checkpoint(read.model.source or "", read.model.checkpoint_names()[0], read.base)
            config = checkpoint.config()
        if read.input is not None and read.input.partition(":")[0] in ("text", "hf"):
            if read.model.source is None:
                raise ValueError("text needs a tokenizer and the registry gives no source; use tokens:random")
            checkpoint = Checkpoint(read.model.source, read.model.checkpoint_names()[0], read.base)
            folder = stack.enter_context(checkpoint.local_copy())
        return (yield from _read_forward(read, config, folder, trained=False))


def _read_trained(read: ReadJob) -> Reading:
    from suite.sources import Checkpoint
    from suite.tensors import read_headers

    checkpoint = Checkpoint(read.model.source or "", read.revision, read.base)
    config = checkpoint.config()
    entries = read_headers(checkpoint)  # refuses pickles and broken files before anything is loaded
    with checkpoint.local_copy() as folder:
        return (yield from _read_forward(read, config, folder, trained=True, entries=entries))


# One read is one function and one line here; the runner does not change.
READ_FUNCTIONS: dict[str, Callable[[ReadJob], Reading]] = {
    "parameters": _read_parameters,
    "random": _read_random,
    "trained": _read_trained,
}


def _read_forward(
    read: ReadJob, raw_config: dict[str, Any], folder: Path | None, *, trained: bool, entries: Any = None
) -> Reading:
    """One forward pass of a random or trained model, with the final norm's spectrum."""
    import torch

    from runners.torch_engine import TorchEngine, pick_device
    from suite.architecture import build_config, find_final_norm
    from suite.final_norm import FinalNormRead
    from suite.inputs import check_count
    from suite.norms import live_norm
    from suite.parameters import architecture_columns, scale_columns
    from suite.tensors import stored_dtype

    config = build_config(raw_config)
    dtype_name = read.dtype
    if dtype_name == "auto":
        declared = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        dtype_name = (stored_dtype(entries) if entries else None) or declared
    dtype = getattr(torch, dtype_name)
    engine = TorchEngine(pick_device())
    model = engine.load_trained(folder, dtype) if trained and folder else engine.load_random(config, read.seed, dtype)

    final = find_final_norm(model)
    row: Row = architecture_columns(final) | {
        "num_parameters": _num_parameters(json.dumps(raw_config, sort_keys=True)),
        "dtype": dtype_name,
        "device": engine.device_name(),
        "load_seconds": engine.load_seconds,
    }
    if final.path is None:
        if final.family == "undetermined":
            raise ValueError(f"the final norm cannot be determined: {final.reason}")
        return {"reads": [row | {"error": final.reason, "peak_device_bytes": engine.peak_device_bytes()}]}

    module = model.get_submodule(final.path)
    assert final.hidden_size is not None
    norm = live_norm(module, final.behaviour, final.hidden_size)
    D = len(norm.scale_D)
    rule = read.protocol.tokens
    num_tokens = rule if isinstance(rule, int) else int(rule[:-1]) * D
    yield Progress(read.label(), "input", 0, num_tokens)
    inputs = _make_inputs(read, config, folder, num_tokens, final.rows_per_item)
    check_count(inputs.num_tokens, D)

    measured = FinalNormRead(module, norm)
    forward_seconds = spectrum_seconds = 0.0
    for batch, traffic in engine.passes(model, module, inputs.batches):
        forward_seconds += traffic.seconds
        started = time.perf_counter()
        measured.update(traffic.input_BTD, traffic.output_BTD, batch.mask_ST)
        spectrum_seconds += time.perf_counter() - started
        yield Progress(read.label(), "forward", measured.num_tokens, inputs.num_tokens)
    yield Progress(read.label(), "spectrum", measured.num_tokens, inputs.num_tokens)
    started = time.perf_counter()
    columns, eigenvalues_D = measured.finish()
    spectrum_seconds += time.perf_counter() - started
    row |= scale_columns(norm) | columns
    row |= {
        "final_norm_tensor": _tensor_name(entries, final),
        "input": inputs.description,
        "num_distinct_inputs": inputs.num_distinct,
        "forward_seconds": forward_seconds,
        "spectrum_seconds": spectrum_seconds,
        "peak_device_bytes": engine.peak_device_bytes(),
    }
    return {"reads": [row], "spectra": [{"site": "final_norm", "eigenvalues": eigenvalues_D.tolist()}]}


def _make_inputs(read: ReadJob, config: Any, folder: Path | None, num_tokens: int, rows_per_item: int) -> Any:
    from runners.torch_engine import BATCH_TOKENS
    from suite.inputs import image_batches, token_batches

    assert read.input is not None
    if read.model.modality == "image":
        size = config.image_size
        patch = getattr(config, "patch_size", None)
        return image_batches(
            read.input,
            image_size=(size, size) if isinstance(size, int) else tuple(size),
            patch_size=patch if isinstance(patch, int) else None,
            num_images=-(-num_tokens // rows_per_item),
            rows_per_image=rows_per_item,
            seed=read.seed,
            processor_folder=folder,
            batch_images=max(1, BATCH_TOKENS // rows_per_item),
        )
    text_config = config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None)
    length = read.protocol.sequence_length
    return token_batches(
        read.input,
        vocab_size=text_config.vocab_size,
        num_tokens=num_tokens,
        sequence_length=min(length, longest) if isinstance(longest, int) and longest > 0 else length,
        seed=read.seed,
        tokenizer_folder=folder,
        batch_tokens=BATCH_TOKENS,
    )


def _tensor_name(entries: Any, final: Any) -> str | None:
    from suite.parameters import stored_tensor

    if entries is None:
        return None
    entry = stored_tensor(entries, final.path, final.behaviour.scale_parameter)
    return entry.name if entry else None


@cache
def _num_parameters(config_json: str) -> int:
    from suite.architecture import build_config, count_parameters

    return count_parameters(build_config(json.loads(config_json)))


@cache
def versions() -> str:
    """JSON of the versions that decide numbers."""
    found = {name: metadata.version(name) for name in VERSIONED}
    return json.dumps({"deadbench": metadata.version("deadbench"), "python": platform.python_version(), **found})


def _quieten() -> None:
    """The libraries' own bars and load reports say nothing that a row does not."""
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _peak_host_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
