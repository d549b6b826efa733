"""The driver: the actors of each model, their events to the reporter, their tables to the store, everything given back.

The driver alone writes. Actors are neither restarted nor detached: what dies becomes failed rows (or, with
`max_retries`, another attempt at the reads that are left), and the other models go on.
"""

import os
import signal
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from runners.actors import Capacity, Group, PlacementError, release, start
from runners.events import Event, Finished, Progress, failed_read
from runners.jobs import ModelJob
from runners.progress import Reporter
from runners.store import ResultStore

_POLL_SECONDS = 0.5
_BROKEN = "GroupBrokenError"
_LOCAL_OBJECT_STORE_BYTES = 200 * 2**20  # tables are small; weights never pass through


class DriverError(RuntimeError):
    """Ray cannot be started or joined; one line, exit code 2."""


@dataclass(frozen=True)
class Settings:
    """How to run.

    `address` as ray.init takes it (None: RAY_ADDRESS or a local Ray); `timeout` in seconds without any progress;
    `max_retries` further attempts when a process dies.
    """

    address: str | None = None
    timeout: float = 3600.0
    max_retries: int = 0


@dataclass
class Summary:
    """What a run came to."""

    run_id: str
    ok: int = 0
    failed: int = 0
    skipped: int = 0
    reads: list[dict[str, Any]] = field(default_factory=list)


def new_run_id() -> str:
    """Sortable by time, unique without coordination."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"


def execute(jobs: list[ModelJob], store: ResultStore, settings: Settings, reporter: Reporter, run_id: str) -> Summary:
    """Run all `jobs`; returns when every read is one row.

    Raises:
        DriverError: Ray cannot be started, or no node can hold a model's GPUs.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with every actor stopped and what finished kept.
    """
    import ray

    summary = Summary(run_id)
    started_here = connect(settings.address)
    previous = signal.signal(signal.SIGTERM, _interrupt)  # after ray.init, which installs its own
    running: dict[Any, Group] = {}  # by stream; a group of ranks has several
    try:
        capacity = Capacity.of_cluster(len(jobs))
        queue = deque(sorted(jobs, key=lambda job: (capacity.devices(job), _parameters(job)), reverse=True))
        attempts = {job.model_id: 1 for job in jobs}
        while queue or running:
            taken = sum(group.weight for group in _groups(running))
            while queue and taken + capacity.weight(queue[0]) <= capacity.slots:
                job = queue.popleft()
                group = start(job, capacity, run_id, attempts[job.model_id])
                running |= dict.fromkeys(group.streams, group)
                taken += group.weight
            for stream in _ready(ray, running):
                if stream not in running:
                    continue  # its group has ended in this round
                group = running[stream]
                death = _take_event(ray, stream, group, store, reporter, summary)
                if death is None:
                    continue
                if not death:
                    del running[stream]
                    continue
                broken = death == _BROKEN
                if group.expired:
                    death = f"no progress for {settings.timeout:g} s (--timeout)"
                _end(group, running, reporter)
                left = group.job.without(group.done)
                if not left.reads:
                    continue
                if broken:
                    queue.appendleft(left)  # the read that broke the ranks' step is a row; the others want a new group
                elif group.attempt <= settings.max_retries:
                    reporter.say(f"{left.model_id}: {death}; attempt {group.attempt + 1}")
                    attempts[left.model_id] += 1
                    queue.append(left)
                else:
                    for read in left.reads:
                        _store(failed_read(read, run_id, group.attempt, death), store, reporter, summary)
            _expire(ray, running, settings.timeout)
    except PlacementError as error:
        raise DriverError(str(error)) from error
    finally:
        for group in _groups(running):
            release(group)
        signal.signal(signal.SIGTERM, previous)
        if started_here:
            ray.shutdown()
    return summary


def _groups(running: dict[Any, Group]) -> list[Group]:
    return list({id(group): group for group in running.values()}.values())


def _end(group: Group, running: dict[Any, Group], reporter: Reporter) -> None:
    """Everything of `group` is gone, from the cluster and from `running`."""
    for stream in group.streams:
        running.pop(stream, None)
    for survivor in release(group):
        reporter.say(f"{group.job.model_id}: {survivor} would not end; its memory is not free")
    reporter.gone(group.job.model_id)


def connect(address: str | None) -> bool:
    """Join the Ray at `address`, or start one; True if it was started here."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    if ray.is_initialized():
        return False
    local = {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES} if target == "local" else {}
    try:
        ray.init(address=target, logging_level="ERROR", log_to_driver=False, **local)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DriverError(f"Ray at {target!r} cannot be joined ({type(error).__name__}: {reason})") from error
    return target == "local"


def _ready(ray: Any, running: dict[Any, Group]) -> list[Any]:
    """Streams that have an event, or have ended."""
    ready, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_SECONDS, fetch_local=False)
    return list(ready)


def _take_event(
    ray: Any, stream: Any, group: Group, store: ResultStore, reporter: Reporter, summary: Summary
) -> str | None:
    """Handle the next event of a stream; returns why its group has ended, "" if only this rank, None while it lives."""
    first = stream == group.streams[0]
    try:
        event: Event = ray.get(next(stream))
    except StopIteration:
        return "the actor ended" if first else ""
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError) and _BROKEN in type(error.cause).__name__:
            return _BROKEN
        return group.name(stream) + _cause(ray, error)
    group.last_event = time.monotonic()
    if isinstance(event, Progress):
        if first:
            reporter.progress(group.job.model_id, event)
    elif event.job.identity() not in group.done:
        group.done.append(event.job.identity())
        _store(event, store, reporter, summary)
    return None


def _store(event: Finished, store: ResultStore, reporter: Reporter, summary: Summary) -> None:
    store.write(event.tables)
    row = event.row
    summary.ok += row["status"] == "ok"
    summary.failed += row["status"] != "ok"
    summary.reads.append({name: row[name] for name in ("model", "revision", "read", "status", "error", "depth")})
    reporter.finished(event)


def _expire(ray: Any, running: dict[Any, Group], timeout: float) -> None:
    """Kill actors that have been silent too long; their streams then end."""
    for group in _groups(running):
        if not group.expired and time.monotonic() - group.last_event > timeout and group.is_placed():
            group.expired = True
            for actor in group.actors:
                ray.kill(actor)


def _cause(ray: Any, error: Exception) -> str:
    """Why an actor died, in one line."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "the process was killed: the machine ran out of memory"
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"the worker failed: {' '.join(str(error.cause).split())[:300]}"
    if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnavailableError):
        return "the process of this model died (killed, crashed or out of memory)"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _parameters(job: ModelJob) -> int:
    return job.reads[0].model.parameters or 0 if job.reads else 0


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
