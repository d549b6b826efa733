"""From the registry and the command line to jobs: which reads of which model, under which protocol, with which key.

A `ModelJob` is what one actor does; its `ReadJob`s carry the key under which their rows are stored, so that a finished
read is recognised before anything is loaded.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from deadbench.runners.engines.registry import DEFAULT, ENGINES, refused_together
from deadbench.runners.jobs.given_input import GivenInput, changed_label, default_input, given_input, why_unfit
from deadbench.runners.jobs.job import JobError, ModelJob, Overrides, ReadJob, SourceError, protocol_hash
from deadbench.runners.jobs.opening import Opened, fingerprint_of, needs_config_alone, open_all, revisions_of
from deadbench.runners.jobs.own_model import own_model
from deadbench.suite.checkpoints.series import Series, gathered, series_in
from deadbench.suite.checkpoints.sources import locate
from deadbench.suite.errors import CheckpointError, InputError, one_line, one_source
from deadbench.suite.inputs.specs import MIXED, check_spec, content_hash
from deadbench.suite.read_specs import DEFAULT_READS, READ_SPECS
from deadbench.suite.registry.entries import Model, Protocol, Registry, SuiteEntry
from deadbench.suite.registry.loading import folder_of
from deadbench.suite.secrets import shown_place

_CONCURRENT_MODELS = 16


@dataclass(frozen=True)
class _Asked:
    """What is asked of one model; its input as it was written, and what is installed here matters unless `assumed`."""

    model: Model
    reads: list[str]
    given: GivenInput
    protocol_name: str
    protocol: Protocol
    overrides: Overrides
    base: Path
    assumed: bool

    @property
    def input(self) -> str:
        """The specification of what it is fed."""
        return self.given.spec


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

    A folder of checkpoints, and several checkpoints of one folder, are one model with a series.
    Models named without a suite run under the protocol `standard`; with one, under the suite's. Of a model with a
    revision and a series, the series is read with `every_checkpoint`, or in a suite that says `checkpoints: true`.
    With `assumed` the jobs would run elsewhere, and what is installed here does not matter.

    Raises:
        JobError: an unknown suite or read, a SOURCE that does not exist, an input that does not fit.
    """
    suite_name = suite_name or (None if models else registry.default_suite())
    if suite_name is None and not models:
        raise JobError(f"{registry_path}: has no suite; name a model of it, or add a suite")
    if suite_name is not None and suite_name not in registry.suites:
        raise JobError(f"suite {suite_name!r} is unknown; choose {', '.join(registry.suites)}")
    for read in reads or ():
        if read not in READ_SPECS:
            raise JobError(f"read {read!r} is unknown; choose {', '.join(READ_SPECS)}")
    suite = registry.suites[suite_name] if suite_name else None
    protocol_name = suite.protocol if suite else "standard"
    base = folder_of(registry_path)
    if models:
        suite_entries = {e.model: e for e in suite.entries()} if suite else {}
        named: list[str | Series | SuiteEntry] = [
            *gathered(list(dict.fromkeys(models)), {model.id for model in registry.models})
        ]
    else:
        assert suite is not None
        suite_entries = {}
        named = [*suite.entries()]

    def job_of(each: str | Series | SuiteEntry) -> ModelJob | _Failed:
        try:
            with one_source(_called(each)):
                return job_that_may_fail(each)
        except (SourceError, CheckpointError) as error:
            return _Failed(each, error)

    def job_that_may_fail(each: str | Series | SuiteEntry) -> ModelJob:
        model, found = _meant(each, registry, overrides, base)
        job = _model_job(asked_of(each, model), series_of(model))
        return job if found is None else replace(job, remarks=(found.told(), *job.remarks))

    def asked_of(each: str | Series | SuiteEntry, model: Model) -> _Asked:
        entry = each if isinstance(each, SuiteEntry) else suite_entries.get(model.id, SuiteEntry(model=model.id))
        wanted = reads or entry.reads or (suite.reads if suite else list(DEFAULT_READS))
        protocol = registry.protocols[protocol_name]
        told = overrides.input or entry.input
        if told or not any(READ_SPECS[read].runs_model for read in wanted):
            given = GivenInput(told or default_input(model, protocol))
        else:
            given = given_input(model, protocol, overrides, base)
        as_if_told = replace(overrides, input=given.spec) if given.stands_for else overrides
        return _Asked(
            model=model,
            reads=[read for read in READ_SPECS if read in wanted],
            given=given,
            protocol_name=protocol_name + changed_label(registry, protocol_name, model, as_if_told),
            protocol=protocol,
            overrides=overrides,
            base=base,
            assumed=assumed,
        )

    def series_of(model: Model) -> bool:
        return every_checkpoint or model.revision is None or (suite is not None and suite.checkpoints)

    with ThreadPoolExecutor(_CONCURRENT_MODELS) as pool:  # each waits for its server
        jobs = list(pool.map(job_of, named))
    failures = [each for each in jobs if isinstance(each, _Failed)]
    if failures and len(failures) == len(jobs):  # nothing is left that could go on
        raise JobError(str(failures[0].error)) from failures[0].error
    return [_failed_job(each, asked_of) if isinstance(each, _Failed) else each for each in jobs]


@dataclass(frozen=True)
class _Failed:
    """What was named, and why nothing can be read of it."""

    named: str | Series | SuiteEntry
    error: Exception


def _called(named: str | Series | SuiteEntry) -> str:
    return named.model if isinstance(named, SuiteEntry) else named.source if isinstance(named, Series) else named


def _failed_job(failed: _Failed, asked_of: Callable[[str | Series | SuiteEntry, Model], _Asked]) -> ModelJob:
    """Failed reads of what was named, beside the others that go on."""
    source = _called(failed.named)
    model = Model.model_construct(id=shown_place(source), source=source, modality="text")
    asked = asked_of(failed.named, model)
    opened = (None, one_line(failed.error))
    reads = tuple(_read_job(asked, read, None, DEFAULT, opened) for read in asked.reads)
    return ModelJob(model.id, reads, 1)


def _meant(
    named: str | Series | SuiteEntry, registry: Registry, overrides: Overrides, base: Path
) -> tuple[Model, Series | None]:
    """The model that is named, and its series where that is whatever lies in a folder."""
    if isinstance(named, Series):
        found, model = named, own_model(named, overrides)
    else:
        model_id = named.model if isinstance(named, SuiteEntry) else named
        known = registry.model(model_id)
        if known is None:
            return own_model(model_id, overrides), None
        alone = known.source is None or known.revision is not None or known.checkpoints is not None
        series = None if alone else series_in(str(known.source), base)
        if series is None:
            return known, None
        found, model = series, known
    return model.model_copy(update={"checkpoints": list(found.names)}), found


def _wished(model: Model, base: Path, assumed: bool, overrides: Overrides) -> str:
    """The registry's engine, which is a wish: torch where it is not installed or lacks the architecture."""
    if model.engine == "auto":
        return DEFAULT
    spec = ENGINES[model.engine]
    if assumed or spec.refuses is None:
        return model.engine
    if spec.missing():
        return DEFAULT
    try:
        config = model.config or overrides.opened(model.source, model.main_checkpoint(), base).config()
    except CheckpointError:
        return model.engine  # which the read will say
    return DEFAULT if spec.why_not(config) else model.engine


def _check_divides(model: Model, tensor_parallel: int, base: Path, overrides: Overrides) -> None:
    """Raise JobError where so many ranks cannot share the heads of `model`; what cannot be opened fails later."""
    try:
        needed = not model.config and tensor_parallel > 1
        opened = overrides.opened(model.source, model.main_checkpoint(), base) if needed else None
        config = model.config or (opened.config() if opened else {})
    except CheckpointError:
        return
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads") or config.get("n_head")
    for count, what in ((heads, "attention heads"), (config.get("num_key_value_heads"), "key/value heads")):
        if isinstance(count, int) and count % tensor_parallel:
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0 and (heads or count) % n == 0)
            raise JobError(
                f"{model.id}: {tensor_parallel} devices do not divide its {count} {what}; choose one of {fitting}"
            )


def _model_job(asked: _Asked, series: bool) -> ModelJob:
    """The reads of one model: of every checkpoint of its `series`, or of the one that stands for it."""
    model, overrides = asked.model, asked.overrides
    runs_model = any(READ_SPECS[read].runs_model for read in asked.reads)
    if runs_model:
        try:
            check_spec(asked.input, model.modality)
        except InputError as error:
            raise JobError(f"{model.id}: {error}") from error
        tensor_parallel = overrides.tensor_parallel or (model.gpus if overrides.replicas == 1 else 1)
        if ENGINES[_engine(asked)].tensor_parallel != "stages":  # which copies KV heads, and depends on the nodes
            _check_divides(model, tensor_parallel, asked.base, overrides)
    unfit = why_unfit(model, asked.input, overrides, asked.base) if runs_model else None
    engine = _engine(asked)
    revisions, unlisted = revisions_of(model, asked.base) if series else ([model.revision], None)
    if unlisted is not None or all(needs_config_alone(model, read) for read in asked.reads):
        wanted = []
    else:
        wanted = revisions if any(READ_SPECS[read].per_checkpoint for read in asked.reads) else revisions[:1]
    opened, remarks = open_all(model.source, wanted, asked.base, overrides)
    if asked.given.stands_for:
        remarks.append(f"{asked.given.why}: {asked.input} stands for it")
    jobs = []
    for revision in revisions:
        for read in asked.reads:
            if READ_SPECS[read].per_checkpoint or revision == revisions[0]:
                found = fingerprint_of(model, revision, read, opened) if unlisted is None else (None, unlisted)
                if unfit is not None and READ_SPECS[read].runs_model and found[1] is None:
                    found = found[0], unfit
                jobs.append(_read_job(asked, read, revision, engine, found))
    return ModelJob(model.id, tuple(jobs), _tensor_parallel(model, overrides, engine), remarks=tuple(remarks))


def _read_job(asked: _Asked, read: str, revision: str | None, engine: str, opened: Opened) -> ReadJob:
    """One read of one checkpoint, with its key."""
    spec, overrides = READ_SPECS[read], asked.overrides
    tokens = overrides.tokens or spec.tokens or asked.protocol.tokens
    taps = overrides.taps or asked.protocol.taps
    protocol = asked.protocol.model_copy(update={"tokens": tokens, "taps": taps})
    dtype = overrides.dtype or spec.dtype or asked.model.dtype
    fingerprint, error = opened
    engine = _engine_of(read, engine)
    return ReadJob(
        model=asked.model,
        read=read,
        revision=revision if spec.per_checkpoint else None,
        seed=overrides.seed,
        engine=engine if spec.runs_model else None,
        protocol_name=asked.protocol_name,
        protocol=protocol,
        protocol_hash=_protocol_hash(read, protocol, dtype, asked.input),
        input=_absolute(asked.input) if spec.runs_model else None,
        stands_for=asked.given.stands_for if spec.runs_model else None,
        dtype=dtype,
        fingerprint=fingerprint,
        base=asked.base,
        place=locate(asked.model.source, asked.base) if asked.model.source else None,
        error=error,
        config=overrides.config,
        model_type=overrides.model_type,
        accumulator_gb=overrides.accumulator_gb,
        replicas=overrides.replicas if spec.divides else 1,
        auto=spec.runs_model and overrides.engine is None and engine == DEFAULT != asked.model.engine,
    )


def _protocol_hash(read: str, protocol: Protocol, dtype: str, input_spec: str) -> str:
    """`protocol_hash` of a read whose input is known by its specification."""
    return protocol_hash(read, protocol, dtype, content_hash(input_spec) if READ_SPECS[read].runs_model else "")


def _absolute(spec: str) -> str:
    """An input with its file by absolute path: a worker runs in another folder."""
    kind, _, rest = spec.partition(":")
    local = rest and kind in ("text", "image", "tokens", *MIXED) and rest != "random"
    return f"{kind}:{Path(rest).resolve()}" if local else spec


def _engine(asked: _Asked) -> str:
    """The engine as asked for, else as the registry wishes it."""
    wanted = asked.overrides.engine
    missing = ENGINES[wanted].missing() if wanted and not asked.assumed else None
    if missing:
        raise JobError(missing)
    return wanted or _wished(asked.model, asked.base, asked.assumed, asked.overrides)


def _engine_of(read: str, engine: str) -> str:
    """The engine that runs a read where `engine` is asked for."""
    return engine if read in ENGINES[engine].reads else DEFAULT


def _tensor_parallel(model: Model, overrides: Overrides, engine: str) -> int | None:
    """How many devices share the model, as asked for; None: the plan says."""
    if refused := refused_together(engine, overrides.tensor_parallel, overrides.replicas):
        raise JobError(f"{model.id}: {refused}")
    return overrides.tensor_parallel if overrides.replicas == 1 else 1  # each has the whole model on one device
