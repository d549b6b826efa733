"""Checkpoints opened once, before anything takes a device: what is there, and what cannot be read and why."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deadbench.runners.jobs.job import ModelJob, Overrides, Unfit, Unreached
from deadbench.suite.checkpoints.opening import list_revisions
from deadbench.suite.checkpoints.series import gathered, series_in
from deadbench.suite.checkpoints.sources import is_hub_id, locate
from deadbench.suite.errors import CheckpointError, UnreachableError, one_source
from deadbench.suite.read_specs import READ_SPECS
from deadbench.suite.registry.entries import CheckpointPattern, Model, Registry
from deadbench.suite.secrets import shown_place

_CONCURRENT_CHECKPOINTS = 8


def unreachable(jobs: list[ModelJob]) -> list[str]:
    """What of the jobs cannot be opened (gated, missing, broken), one line each; their reads will be failed rows."""
    return list(dict.fromkeys(f"{read.model.id}: {read.error}" for job in jobs for read in job.reads if read.error))


def all_unfit(jobs: list[ModelJob]) -> str | None:
    """The first read's reason where none of the reads can run with its input: there is nothing to start."""
    reads = [read for job in jobs for read in job.reads]
    if reads and all(isinstance(read.error, Unfit) for read in reads):
        return f"{reads[0].model.id}: {reads[0].error}"
    return None


def which_are_meant(registry: Registry, names: list[str]) -> list[str]:
    """Of names that could mean two things here, one line each that says which was taken."""
    lines = []
    for each in gathered(list(dict.fromkeys(names)), {model.id for model in registry.models}):
        name = each if isinstance(each, str) else each.source
        place = locate(name)
        if not os.path.isabs(place):
            continue
        if registry.model(name) is not None:
            lines.append(f"{name}: the registry's model is read; give ./{name} for the folder {place}")
        elif is_hub_id(name):
            kind = "folder" if os.path.isdir(place) else "file"
            lines.append(f"{name}: the {kind} {place} is read; give hf://{name} for the Hub's model")
        if isinstance(each, str) and registry.model(name) is None:
            below = series_in(name, beside_weights=True)
            if below is not None:
                ends = " … ".join(dict.fromkeys((below.sources()[0], below.sources()[-1])))
                lines.append(f"{name}: its own weights are read; name the checkpoints in it to have them ({ends})")
    return lines


def revisions_of(model: Model, base: Path) -> tuple[list[str | None], str | None]:
    """The checkpoints of a model's series in training order, or why they cannot be listed."""
    series = model.checkpoints
    if series is None:
        return [model.revision], None
    if isinstance(series, CheckpointPattern):
        return list(series.names()), None
    if isinstance(series, list):
        return list(series), None
    try:
        with one_source(model.source or ""):
            found = series.names(list_revisions(model.source or "", base))
    except CheckpointError as error:
        return [model.revision], _told(error)
    if found:
        return list(found), None
    return [model.revision], f"{shown_place(model.source or '')}: no checkpoint matches {series.listed!r}"


def _told(error: CheckpointError) -> str:
    return Unreached(error) if isinstance(error, UnreachableError) else str(error)


Opened = tuple[str | None, str | None]  # fingerprint, or why there is none


def fingerprint_of(model: Model, revision: str | None, read: str, opened: dict[str | None, Opened]) -> Opened:
    """What the read will open, hashed; or why it cannot be opened, so that the read fails as a row of its own."""
    if needs_config_alone(model, read):
        return hashlib.sha256(json.dumps(model.config, sort_keys=True).encode()).hexdigest()[:16], None
    if model.source is None:
        return None, f"the registry gives no source, which the read {read!r} needs"
    return opened[revision]


def needs_config_alone(model: Model, read: str) -> bool:
    """Whether the registry's own configuration is all that a read opens."""
    opens = READ_SPECS[read].opens
    return model.config is not None and (opens == "config" or (opens == "either" and model.source is None))


def open_all(
    source: str | None, revisions: list[str | None], base: Path, overrides: Overrides
) -> tuple[dict[str | None, Opened], list[str]]:
    """Checkpoints that some read needs, opened now, side by side, before a device is taken; and remarks on them."""
    if source is None or not revisions:
        return {}, []

    def attempt(revision: str | None) -> tuple[Opened, str | None]:
        try:
            with one_source(source):
                checkpoint = overrides.opened(source, revision, base)
                checkpoint.config()  # of a gated repository everything is listed, and nothing can be read
                return (checkpoint.fingerprint(), None), checkpoint.remark
        except CheckpointError as error:
            return (None, _told(error)), None

    different = list(dict.fromkeys(revisions))
    with ThreadPoolExecutor(_CONCURRENT_CHECKPOINTS) as pool:
        found = dict(zip(different, pool.map(attempt, different), strict=True))
    remarks = [f"{shown_place(source)}{f'@{r}' if r else ''}: {remark}" for r, (_, remark) in found.items() if remark]
    return {revision: opened for revision, (opened, _) in found.items()}, remarks
