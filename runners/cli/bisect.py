"""`deadbench trend --bisect`: the first checkpoint of a series that breaks a gate, from as few reads as that takes."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import polars as pl

from deadbench.analysis.compare import compare
from deadbench.analysis.gate import DEFAULT, Gate, GateError, broken, judge, load_gate
from deadbench.analysis.results import collected, latest, scan
from deadbench.analysis.trend import first_failing
from deadbench.runners.driver.driver import new_run_id
from deadbench.runners.driver.in_process import execute_at
from deadbench.runners.driver.loop import Settings
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import JobError, ModelJob, Overrides, ReadJob
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.results.store import ResultStore
from deadbench.suite.checkpoints.series import series_in
from deadbench.suite.registry.loading import find_registry, load_registry

# What the parameters alone say needs no forward pass.
FROM_PARAMETERS = ("num_zero_scales", "scale_harmonic", "predicted_dim", "depth_predicted")


class Bisection(NamedTuple):
    """What a bisection found; `first_failing` is None where the last checkpoint passes."""

    model: str
    metric: str
    first_failing: str | None
    last_passing: str | None
    num_checkpoints: int
    checkpoints_read: list[str]

    def sentence(self) -> str:
        """For people."""
        read = f"{len(self.checkpoints_read)} of {self.num_checkpoints} checkpoints read"
        if self.first_failing is None:
            return f"{self.model}: {self.metric} holds at the last checkpoint ({read})"
        return f"{self.model}: {self.metric} breaks at {self.first_failing}, holds at {self.last_passing} ({read})"


def bisect_series(
    results: list[str],
    model_id: str,
    metric: str,
    gate_file: Path | None,
    registry_file: Path | None,
    suite: str | None,
    address: str | None,
    say: Callable[[str], None],
) -> Bisection:
    """Bisect the checkpoints of the registry's `model_id` against the first one; reads go to the result set.

    The series is taken to pass up to a place and to fail from there on. Reads that are there already are not repeated.

    Raises:
        GateError: the gate has no rule for `metric`.
        JobError: the model is not in the registry or has no series, or a checkpoint could not be read.
        StoreError: more than one result set, or one that cannot be written.
    """
    rules = load_gate(gate_file) if gate_file is not None else DEFAULT
    if metric not in rules.metrics:
        where = gate_file or "the default gate"
        raise GateError(f"--bisect {metric!r}: {where} has no rule for it; it has {', '.join(rules.metrics)}")
    if len(results) != 1:
        raise JobError(f"--bisect writes to one result set; got {len(results)}")
    read = "parameters" if metric in FROM_PARAMETERS else "trained"
    rule = rules.metrics[metric].model_copy(update={"reads": [read], "models": ["*"]})
    only = Gate(noise=rules.noise, missing="fail", metrics={metric: rule})
    job = _series(model_id, registry_file, suite, read)
    store, read_names = ResultStore(results[0]), []

    def rows(checkpoint: ReadJob) -> pl.LazyFrame:
        name, finished = str(checkpoint.revision), store.finished()
        checkpoint = checkpoint.as_stored(finished)
        if name not in read_names:
            read_names.append(name)
            if checkpoint.identity() not in finished:
                with Reporter(1) as reporter:
                    one = [replace(job, reads=(checkpoint,))]
                    execute_at(address)(one, store, Settings(address), reporter, new_run_id())
        return _rows(results[0], checkpoint)

    def fails(checkpoint: ReadJob) -> bool:
        verdicts = judge(compare(rows(job.reads[0]), rows(checkpoint), only.scales()), only)
        failed = not broken(verdicts).is_empty()
        say(f"{checkpoint.revision}: {metric} {'breaks' if failed else 'holds'}")
        return failed

    found = first_failing(job.reads, fails)
    names = [str(checkpoint.revision) for checkpoint in job.reads]
    first = None if found is None else str(found.revision)
    before = None if first is None else names[names.index(first) - 1]
    return Bisection(model_id, metric, first, before, len(names), read_names)


def most_reads(num_checkpoints: int) -> int:
    """The most checkpoints a bisection reads: the two ends, and the logarithm of what is between."""
    return num_checkpoints if num_checkpoints < 3 else 2 + math.ceil(math.log2(num_checkpoints - 1))


def _series(model_id: str, registry_file: Path | None, suite: str | None, read: str) -> ModelJob:
    path = find_registry(registry_file)
    registry = load_registry(path)
    if registry.model(model_id) is None and series_in(model_id) is None:
        known = ", ".join(model.id for model in registry.models if model.checkpoints)
        raise JobError(
            f"--model {model_id!r} is not in {path}, nor a folder of checkpoints; with a series there are {known}"
        )
    (job,) = build_jobs(registry, path, [model_id], suite, [read], Overrides(), every_checkpoint=True)
    if len(job.reads) < 2:
        raise JobError(f"{path}: {model_id}: has no series of checkpoints; list them under 'checkpoints'")
    return job


def _rows(location: str, checkpoint: ReadJob) -> pl.LazyFrame:
    """The rows of one checkpoint's read.

    Raises:
        JobError: it failed.
    """
    wanted = [pl.col(name).eq_missing(pl.lit(value)) for name, value in checkpoint.key_columns().items()]
    reads = scan(location).filter(*wanted)
    row = collected(latest(reads)).row(0, named=True)
    if row["status"] != "ok":
        raise JobError(f"{checkpoint.label()}: could not be read ({row['error']}); the bisection cannot go on")
    return reads
