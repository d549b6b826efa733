"""The record of a run, `OUT/runs/<run_id>/run.json`: who, what, with which versions, where it ran, and what came of it.

Written when the run starts and when it ends; one that says `running` and has no end was cut off. Secrets stay out.
"""

import getpass
import json
import os
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import ModelJob, ReadJob
from deadbench.runners.results.store import ResultStore
from deadbench.runners.results.versions import versions
from deadbench.suite.errors import message
from deadbench.suite.schema import KEY
from deadbench.suite.secrets import scrubbed, shown_command, shown_place

_RECORD_VERSION = 1


class RunRecord:
    """What is known of a run; kept in memory, written as a whole."""

    def __init__(self, store: ResultStore, run_id: str, jobs: list[ModelJob], say: Callable[[str], None]):
        self._store, self._path, self._say = store, f"runs/{run_id}/run.json", say
        self._facts: dict[str, Any] = {
            "record_version": _RECORD_VERSION,
            "run_id": run_id,
            "status": "running",
            "started_at": _now(),
            "finished_at": None,
            "error": None,
            "user": _user(),
            "host": socket.gethostname(),
            "command": shown_command(sys.argv),
            "versions": json.loads(versions()),
            "cluster": None,
            "plan": [_planned(job) for job in jobs],
            "placements": [],
            "reads": [_key(read) | {"status": "planned"} for job in jobs for read in job.reads],
        }
        self._reads = {read.identity(): number for number, read in enumerate(r for job in jobs for r in job.reads)}

    def started(self, address: str, nodes: list[dict[str, Any]]) -> None:
        """The cluster is joined: write the record for the first time."""
        self._facts["cluster"] = {"address": shown_place(address), "nodes": nodes}
        self._write()

    def placed(self, job: ModelJob, attempt: int, nodes: list[str], devices: float) -> None:
        """A model was started."""
        where = {"model": job.model_id, "attempt": attempt, "nodes": nodes, "devices": devices, "started_at": _now()}
        self._facts["placements"].append(where)

    def finished(self, event: Finished) -> None:
        """A read is in the results."""
        row = event.row
        error = scrubbed(row["error"]) if row["error"] else None
        outcome = {"status": row["status"], "attempt": row["attempt"], "error": error}
        self._facts["reads"][self._reads[event.job.identity()]] |= outcome

    def elsewhere(self, read: ReadJob, row: dict[str, Any]) -> None:
        """Another run has stored a read of this one."""
        error = scrubbed(row["error"]) if row["error"] else None
        outcome = {"status": row["status"], "error": error, "by": row["run_id"]}
        self._facts["reads"][self._reads[read.identity()]] |= outcome

    def ended(self, status: str, error: BaseException | None = None) -> None:
        """The run is over: finished, interrupted or stopped. Write the record for the last time."""
        said = message(error, None) if error is not None and str(error) else None
        self._facts |= {"status": status, "finished_at": _now(), "error": said}
        self._write()

    def _write(self) -> None:
        try:
            self._store.write_text(self._path, json.dumps(self._facts, indent=1))
        except Exception as error:  # the reads are what counts; a store raises the errors of its own library
            self._say(f"the run record cannot be written ({message(error)})")


def read_record(text: str | None, named: str) -> dict[str, Any]:
    """The record that `text` holds; `named`: what it is of, for the error.

    Raises:
        ValueError: it is none that this version knows.
    """
    try:
        record = json.loads(text or "")
    except (ValueError, RecursionError):
        record = None
    reads = record.get("reads") if isinstance(record, dict) else None
    known = isinstance(reads, list) and all(
        isinstance(each, dict)
        and {*KEY, "status"} <= each.keys()
        and not any(isinstance(each[name], (list, dict)) for name in KEY)
        for each in reads
    )
    if not known or not isinstance(record.get("status"), str):
        raise ValueError(f"{named} has no record of a run; `deadbench run` writes one, runs/RUN_ID/run.json")
    return record  # type: ignore[no-any-return]


def _planned(job: ModelJob) -> dict[str, Any]:
    gpus = job.tensor_parallel or (job.gpus if job.gpu_share == 1.0 else job.gpu_share)
    place = job.reads[0].place if job.reads else None
    source = shown_place(place) if place else None
    plan = {"engine": job.engine, "gpus": gpus, "work": job.work, "reads": len(job.reads)}
    return {"model": job.model_id, "source": source} | plan


def _key(read: ReadJob) -> dict[str, Any]:
    return read.key_columns() | {"attempt": None, "error": None}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
