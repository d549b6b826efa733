"""A job: what one actor does, and the key under which each of its reads is stored."""

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deadbench.runners.engines.registry import AUTO, ENGINES
from deadbench.suite.checkpoints.adapters import open_checkpoint
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.series import trainer_step, trainer_tokens
from deadbench.suite.checkpoints.sources import locate
from deadbench.suite.checkpoints.training_steps import LARGEST_STEP, checkpoint_step, steps_told
from deadbench.suite.read_specs import READ_SPECS
from deadbench.suite.registry.entries import CheckpointPattern, ListedCheckpoints, Model, Protocol
from deadbench.suite.schema import KEY


class JobError(ValueError):
    """A request that cannot become jobs; one line, exit code 2."""


class SourceError(JobError):
    """A source that was named and cannot be read: its own failed reads where others can be."""


class Unreached(str):
    """The error of a read whose source cannot be reached from here: where the read runs it may be."""


class Unfit(str):
    """The error of a read whose input does not fit its model, which was seen before anything ran."""


@dataclass(frozen=True)
class Overrides:
    """What the command line changes in the protocol; None leaves it.

    `accumulator_gb`, `tensor_parallel` and `replicas` change no number. `config` and `model_type` say of what
    architecture a source is.
    """

    tokens: int | None = None
    input: str | None = None
    dtype: str | None = None
    engine: str | None = None
    seed: int = 0
    accumulator_gb: float | None = None
    tensor_parallel: int | None = None
    replicas: int = 1
    config: dict[str, Any] | None = None
    model_type: str | None = None
    taps: str | None = None

    def opened(self, source: str | None, revision: str | None = None, base: Path | None = None) -> Checkpoint:
        """A checkpoint of `source`, of the architecture that the command line says.

        Raises:
            CheckpointError: it is not there.
        """
        return open_checkpoint(source or "", revision, base, config=self.config, model_type=self.model_type)

    def label(self) -> str:
        """The overrides that change numbers, as they are appended to the protocol's name."""
        named = {"tokens": self.tokens, "input": self.input, "dtype": self.dtype, "taps": self.taps}
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
    stages: int = 1  # nodes that those devices are on, where each has its part of the blocks; the driver sets it
    half_batch: bool = False  # after an attempt that ran out of memory
    replicas: int = 1  # processes that run the whole model, each on a part of the tokens
    stands_for: str | None = None  # the protocol's own input, which cannot be had and which `input` replaces
    checkpoint_interval: float = 0.0  # seconds between two checkpoints; 0: none
    checkpoint_location: str | None = None  # the result set, absolute; the driver sets both
    config: dict[str, Any] | None = None  # in place of the source's own
    model_type: str | None = None  # of a configuration that has none
    factory: str | None = None  # what builds the module that is read, where it is the user's own: package.module:name
    place: str | None = None  # what `locate` says of the model's source, asked once, where the command was given
    auto: bool = False  # nobody named an engine: the plan takes one of `AUTO`

    def opened(self, revision: str | None) -> Checkpoint:
        """A checkpoint of the model's source.

        Raises:
            CheckpointError: it is not there, as this process sees it.
        """
        return open_checkpoint(self.model.source or "", revision, self.base, self.place, self.config, self.model_type)

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

    def by_any_engine(self) -> "tuple[ReadJob, ...]":
        """The read itself, and as each other engine would do it that the plan may take elsewhere or another time."""
        others = [name for name in AUTO if name != self.engine and self.read in ENGINES[name].reads]
        return (self, *(replace(self, engine=name) for name in (others if self.auto else ())))

    def as_stored(self, done: Collection[tuple[Any, ...]]) -> "ReadJob":
        """The read by the engine that has its row in `done`, identities of finished reads; itself where none has."""
        return next((read for read in self.by_any_engine() if read.identity() in done), self)

    def label(self) -> str:
        """Short name for people: `pythia-160m random`, `twin step16 trained`."""
        return " ".join(part for part in (self.model.id, self.revision, self.read) if part)


@dataclass(frozen=True)
class ModelJob:
    """All reads of one model, for one actor, or one actor per rank.

    `tensor_parallel` as asked for; None: `gpus`, where there are GPUs. By the plan: `gpu_share`, the part of one GPU
    that is enough; `work`, 2 x parameters x tokens of its forward passes; `device_bytes` of each of its GPUs and
    `host_bytes` beside them, at the peak (0: not measured). `remarks`: what is to be said of where
    and in which order it is read.
    """

    model_id: str
    reads: tuple[ReadJob, ...]
    tensor_parallel: int | None = None
    gpu_share: float = 1.0
    work: float = 0.0
    device_bytes: float = 0.0
    host_bytes: float = 0.0
    remarks: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """How many GPUs share the model, by the registry."""
        return max((read.model.gpus for read in self.reads), default=1)

    def asked_tensor_parallel(self, *, has_gpus: bool) -> int | None:
        """What the command line or, where there are GPUs, the registry asks for; None: the plan chooses."""
        if self.replicas > 1:
            return None
        return self.tensor_parallel or (self.gpus if self.gpus > 1 and has_gpus else None)

    @property
    def replicas(self) -> int:
        """How many processes divide the tokens of the reads that can be divided."""
        return max((read.replicas for read in self.reads), default=1)

    @property
    def engine(self) -> str | None:
        """The engine of the reads that run the model, of those first that can be divided; None where none runs it."""
        ordered = sorted(self.reads, key=lambda read: not READ_SPECS[read.read].divides)
        return next((read.engine for read in ordered if read.engine), None)

    def over(self, tensor_parallel: int, stages: int = 1) -> "ModelJob":
        """The job with its reads told how many devices share the model, and on how many nodes they are stages of it."""
        reads = (replace(read, tensor_parallel=tensor_parallel, stages=stages) for read in self.reads)
        return replace(self, reads=tuple(reads))

    def checkpointed(self, interval: float, location: str) -> "ModelJob":
        """The job with its reads told how often to save where they are, and in which result set."""
        return replace(
            self,
            reads=tuple(replace(r, checkpoint_interval=interval, checkpoint_location=location) for r in self.reads),
        )

    def as_stored(self, done: Collection[tuple[Any, ...]]) -> "ModelJob":
        """The job with its reads as they are in `done`."""
        return replace(self, reads=tuple(read.as_stored(done) for read in self.reads))

    def without(self, done: Iterable[tuple[Any, ...]]) -> "ModelJob":
        """The job less the reads whose identity is in `done`."""
        finished = set(done)
        return replace(self, reads=tuple(r for r in self.reads if r.identity() not in finished))


def protocol_hash(read: str, protocol: Protocol, dtype: str, content: str) -> str:
    """What decides the numbers beside model and seed; of a read without input its version alone.

    `content` is a hash of what is fed.
    """
    spec = READ_SPECS[read]
    facts: dict[str, Any] = {"read": read, "version": spec.version}
    if spec.runs_model:
        facts |= {"tokens": protocol.tokens, "sequence_length": protocol.sequence_length, "dtype": dtype}
        facts |= {"input": content}
        # Rows of whole sequences, and of the whole stream, keep the hash that they always had.
        facts |= {"skip_positions": protocol.skip_positions} if protocol.skip_positions else {}
    if spec.taps and protocol.tap_stride != 1:
        facts |= {"taps": protocol.taps}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def read_step(job: ReadJob) -> int | None:
    """Training step of the checkpoint that a job reads; None for a random initialisation, and where nothing tells.

    By the registry's rule for the series, else by the checkpoint's name, else by what its Trainer wrote beside it.
    """
    if not READ_SPECS[job.read].per_checkpoint:
        return None
    if job.factory is not None:
        return None
    series = job.model.checkpoints
    if job.revision and isinstance(series, CheckpointPattern | ListedCheckpoints):
        step = series.step_of(job.revision)
        if step is not None:
            return step if step <= LARGEST_STEP else None
    known = steps_told(series) if isinstance(series, list) else {}
    name = job.revision or Path(job.model.source or "").name
    named = known[name] if name in known else checkpoint_step(name)
    if named is not None:
        return named
    return trainer_step(_folder(job))


def tokens_seen(job: ReadJob, step: int | None) -> int | None:
    """Tokens that the checkpoint of a job was trained on; None where nothing tells.

    By what its Trainer counted, else `step` times the registry's tokens per step.
    """
    if not READ_SPECS[job.read].per_checkpoint:
        return None
    counted = trainer_tokens(_folder(job))
    if counted is not None or step is None or job.model.tokens_per_step is None:
        return counted
    tokens = step * job.model.tokens_per_step
    return tokens if tokens <= LARGEST_STEP else None


def _folder(job: ReadJob) -> Path:
    return Path(job.place or locate(job.model.source or "", job.base)) / (job.revision or "")
