"""What one actor does: the reads of one model, one after another, as a stream of events. Plain code, no Ray.

A read that fails is a finished row with its error; only the death of the process is not told from here.
"""

import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from deadbench.runners.engines.registry import ENGINES
from deadbench.runners.jobs.events import (
    Event,
    Finished,
    Progress,
    RankMemoryError,
    Reading,
    Remark,
    SilenceError,
    to_tables,
)
from deadbench.runners.jobs.job import ModelJob, ReadJob
from deadbench.runners.worker.passable import naming_who_unpacks, refuse_without_pass
from deadbench.suite.errors import CheckpointError, is_of_work, one_line

if TYPE_CHECKING:
    from deadbench.runners.jobs.resolved import Configuration
    from deadbench.suite.checkpoints.checkpoint import Checkpoint
    from deadbench.suite.reads.anatomy import Anatomy
    from deadbench.suite.reads.parameters import ParametersRead

_COMMIT = re.compile("[0-9a-f]{40}")  # the fingerprint of what is on the Hub


def run_model(job: ModelJob, run_id: str, attempt: int) -> Iterator[Event]:
    """Run the reads of `job`; yields progress, and a `Finished` for every read in order.

    `attempt` is the first read's: it is the one that an earlier process died of, and the others were not begun.
    """
    on_device = any(read.engine for read in job.reads)
    if on_device:
        _quieten()
    for read in job.reads:
        started_at = datetime.now(UTC)
        yield Progress(read.label(), "loading")
        failure, poisoned = None, False
        try:
            if read.error:
                raise ValueError(read.error)
            if on_device:
                _settle(job.gpu_share)
            rows = yield from (_read_factory if read.factory else READ_FUNCTIONS[read.read])(read)
            rows["reads"][0]["status"] = "ok"
        except BaseException as error:
            if not (is_of_work(error) or isinstance(error, SilenceError)):
                raise
            failure, poisoned = traceback.format_exc(), is_poisoned(error)
            rows = {"reads": [{"status": "failed", "error": one_line(error)}]}
        yield Finished(read, to_tables(rows, read, run_id, attempt, started_at), failure, poisoned)
        del rows
        if on_device and "torch" in sys.modules:
            _give_back()
        attempt = 1


def is_poisoned(error: BaseException) -> bool:
    """Whether another process is to try again: this one can do nothing more on its GPU, or is a rank without memory.

    By its text: torch's own classes are gone where another rank, vLLM's process or a message of ours passes it on.
    """
    torch = sys.modules.get("torch")
    if torch is None:  # nothing has run
        return False
    from deadbench.runners.engines.device import cause_of

    return isinstance(error, RankMemoryError) or cause_of(error) == "device"


def _read_parameters(read: ReadJob) -> Reading:
    from deadbench.runners.jobs.resolved import Configuration
    from deadbench.suite.architectures.objectives import objective
    from deadbench.suite.reads.anatomy import keep_anatomy, kept_anatomy
    from deadbench.suite.reads.norms_table import norms_stored
    from deadbench.suite.reads.parameters import read_parameters

    checkpoint = read.opened(read.revision)
    result = read_parameters(checkpoint)
    yield from _where_from(read, checkpoint)
    if result.final.family == "undetermined":
        raise ValueError(f"the final norm cannot be determined: {result.reason}")
    config = Configuration(checkpoint.config())
    anatomy = kept_anatomy(config.text, result.entries)
    yield Progress(read.label(), "norms")
    if anatomy is None:
        anatomy = _dissected(config, checkpoint, result)
        keep_anatomy(config.text, result.entries, anatomy)
    row = result.columns() | checkpoint.origin() | {"error": result.reason, "dtype": result.stored_dtype}
    row["objective"] = objective(checkpoint.config())
    row["num_parameters"] = anatomy.num_parameters
    row["flags"] = _quantised(config)
    norms = [norm for norm, _ in norms_stored(anatomy, checkpoint, result)]
    counted = [each["dead_parameters"] for each in norms if each["dead_parameters"] is not None]
    row["dead_parameters"] = sum(counted) if counted else None
    row["dead_parameters_share"] = sum(counted) / row["num_parameters"] if counted else None
    return {"reads": [row], "norms": norms}


def _dissected(config: "Configuration", checkpoint: "Checkpoint", result: "ParametersRead") -> "Anatomy":
    """The architecture taken apart, and the checkpoint found to be of it; with torch, which takes seconds to import."""
    from deadbench.runners.jobs.resolved import published
    from deadbench.suite.architectures.build import bare_model
    from deadbench.suite.architectures.unexpected_tensors import refuse_unexpected
    from deadbench.suite.reads.norms_table import published_anatomy

    _quieten()
    empty = published(config)
    refuse_unexpected(bare_model(empty), config.raw, result.entries, checkpoint.source)
    return published_anatomy(config.raw, result, empty)


def _read_random(read: ReadJob) -> Reading:
    from deadbench.runners.jobs.resolved import Configuration, published_wiring
    from deadbench.runners.worker.request import RandomWeights

    with ExitStack() as stack:
        raw_config, folder = read.model.config, None
        if raw_config is None:
            checkpoint = read.opened(read.model.main_checkpoint())
            raw_config = checkpoint.config()
            yield from _where_from(read, checkpoint)
        reads_text = read.input is not None and read.input.partition(":")[0] in ("text", "hf")
        if reads_text and read.model.modality == "text":
            if read.model.source is None:
                raise ValueError("text needs a tokenizer and the registry gives no source; use tokens:random")
            checkpoint = read.opened(read.model.main_checkpoint())
            try:
                folder = stack.enter_context(checkpoint.local_copy(weights=False))
            except CheckpointError as error:
                raise CheckpointError(f"{error} (for its tokenizer; --input tokens:random needs none)") from error
        config = Configuration(raw_config)
        _, dead = published_wiring(config)  # before the read: vLLM rewrites transformers' classes
        rows = yield from _model_reader(read)(read, config, RandomWeights(read.seed, folder))
        row = rows["reads"][0]
        row["dead_parameters"] = dead
        row["dead_parameters_share"] = None if dead is None else dead / row["num_parameters"]
        return rows


def _read_trained(read: ReadJob) -> Reading:
    from deadbench.runners.jobs.resolved import Configuration, published
    from deadbench.runners.worker.request import StoredWeights
    from deadbench.suite.architectures.build import bare_model
    from deadbench.suite.architectures.unexpected_tensors import refuse_unexpected, remarks

    checkpoint = read.opened(read.revision)
    config = Configuration(checkpoint.config())
    yield from _where_from(read, checkpoint)
    entries = checkpoint.headers()  # refuses broken files before anything is loaded
    weights = checkpoint.weights().format
    refuse_without_pass(checkpoint, read.engine)
    whole = published(config)
    immaterial = refuse_unexpected(bare_model(whole), config.raw, entries, checkpoint.source)
    told = remarks(whole, config.raw, entries, immaterial)
    with checkpoint.local_copy() as folder, naming_who_unpacks(checkpoint):
        rows = yield from _model_reader(read)(read, config, StoredWeights(folder, entries, weights.name))
    row = rows["reads"][0]
    row |= checkpoint.origin() | {"flags": [*row.get("flags", ()), *_quantised(config)]}
    if merged := _merged(checkpoint):
        told.insert(0, merged)
    row["engine_detail"] = "; ".join([row["engine_detail"], *told])
    return rows


def _quantised(config: "Configuration") -> list[str]:
    """The flag of weights that are stored in fewer bits than they are computed in, where the configuration says so."""
    return ["quantised"] if config.raw.get("quantization_config") else []


def _merged(checkpoint: "Checkpoint") -> str | None:
    """What was merged into what, for an adapter's row."""
    from deadbench.suite.checkpoints.adapters import AdaptedCheckpoint

    if not isinstance(checkpoint, AdaptedCheckpoint):
        return None
    maps = len(checkpoint.tensors.changes)
    return f"{checkpoint.kind} adapter merged into {maps} maps of its base {checkpoint.base.source}"


def _where_from(read: ReadJob, checkpoint: "Checkpoint") -> Iterator[Remark]:
    """That the Hub's cache of this node was read, and which snapshot in it.

    Raises:
        CheckpointError: it is another commit than the one that was found where the command was given.
    """
    if checkpoint.remark is None:
        return
    listed, taken = read.fingerprint or "", Path(checkpoint.folder or "").name
    if _COMMIT.fullmatch(listed) and taken != listed:
        raise CheckpointError(
            f"{checkpoint.source}: commit {listed} is to be read and this node's cache of the Hub has {taken}; "
            "let the node reach the Hub, or put that snapshot into its cache"
        )
    yield Remark(read.label(), checkpoint.remark)


def _model_reader(read: ReadJob) -> Callable[..., Reading]:
    """The function that runs a model and reads it: in this process, or in vLLM's."""
    assert read.engine is not None
    if ENGINES[read.engine].in_process:
        from deadbench.runners.worker.forward import read_forward

        return read_forward
    from deadbench.runners.worker.vllm import read_vllm

    return read_vllm


def _read_functional(read: ReadJob) -> Reading:
    from deadbench.runners.jobs.resolved import Configuration, published
    from deadbench.runners.worker.functional import read_functional
    from deadbench.runners.worker.request import RandomWeights, StoredWeights
    from deadbench.suite.architectures.unexpected_tensors import refuse_unexpected
    from deadbench.suite.checkpoints.formats.table import WEIGHT_ENDINGS

    if read.model.source is None:
        assert read.model.config is not None
        return (yield from read_functional(read, Configuration(read.model.config), RandomWeights(read.seed)))
    checkpoint = read.opened(read.revision)
    # A configuration alone is an architecture at random initialisation; weights that are there are never passed over.
    stored = (".index.json", *WEIGHT_ENDINGS)  # an index may list shards in a subfolder
    trained = any(name.endswith(stored) for name in checkpoint.names())
    entries = checkpoint.headers() if trained else None
    config = Configuration(checkpoint.config())
    yield from _where_from(read, checkpoint)
    if entries is not None:
        refuse_without_pass(checkpoint, read.engine)
        refuse_unexpected(published(config), config.raw, entries, checkpoint.source)
    with checkpoint.local_copy() as folder, naming_who_unpacks(checkpoint):
        weights = RandomWeights(read.seed, folder) if entries is None else StoredWeights(folder, entries)
        rows = yield from read_functional(read, config, weights)
    rows["reads"][0] |= checkpoint.origin() | {"flags": _quantised(config)} if entries is not None else {}
    return rows


def _read_factory(read: ReadJob) -> Reading:
    from deadbench.runners.worker.own_factory import read_factory

    return (yield from read_factory(read))


# One read is one function and one line here; the runner does not change.
READ_FUNCTIONS: dict[str, Callable[[ReadJob], Reading]] = {
    "parameters": _read_parameters,
    "random": _read_random,
    "trained": _read_trained,
    "functional": _read_functional,
}


def _settle(share: float) -> None:
    from deadbench.runners.engines.device import settle  # torch, whose import takes seconds: those are the read's

    settle(share)


def _give_back() -> None:
    from deadbench.runners.engines.device import give_back

    give_back()


def _quieten() -> None:
    """The libraries' own bars and load reports say nothing that a row does not."""
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each map of each batch
