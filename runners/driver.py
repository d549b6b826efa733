"""The driver: one Ray actor a model, its events to the reporter, its tables to the store, everything given back.

The driver alone writes. Actors are neither restarted nor detached: what dies becomes failed rows (or, with
`max_retries`, another attempt at the reads that are left), and the other models go on.
"""

import os
import signal
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from runners.events import Event, Finished, Progress, failed_read
from runners.jobs import ModelJob
from runners.progress import Reporter
from runners.store import ResultStore
from runners.worker import run_model

_POLL_SECONDS = 0.5
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


@dataclass
class _Running:
    job: ModelJob
    actor: Any
    attempt: int
    done: list[tuple[Any, ...]] = field(default_factory=list)
    last_event: float = field(default_factory=time.monotonic)
    expired: bool = False


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
    started_here = _connect(settings.address)
    previous = signal.signal(signal.SIGTERM, _interrupt)  # after ray.init, which installs its own
    running: dict[Any, _Running] = {}
    try:
        slots, options = _placement(jobs)
        queue = deque(sorted(jobs, key=lambda job: (job.num_gpus, _parameters(job)), reverse=True))
        attempts = {job.model_id: 1 for job in jobs}
        while queue or running:
            while queue and len(running) < slots:
                job = queue.popleft()
                actor = _actor_class(options(job)).remote()
                stream = actor.run.remote(job, run_id, attempts[job.model_id])
                running[stream] = _Running(job, actor, attempts[job.model_id])
            for stream in _ready(ray, running):
                state = running[stream]
                death = _take_event(ray, stream, state, store, reporter, summary)
                if death is None:
                    continue
                if state.expired:
                    death = f"no progress for {settings.timeout:g} s (--timeout)"
                del running[stream]
                ray.kill(state.actor)
                reporter.gone(state.job.model_id)
                left = state.job.without(state.done)
                if not left.reads:
                    continue
                if state.attempt <= settings.max_retries:
                    reporter.say(f"{left.model_id}: {death}; attempt {state.attempt + 1}")
                    attempts[left.model_id] += 1
                    queue.append(left)
                else:
                    for read in left.reads:
                        _store(failed_read(read, run_id, state.attempt, death), store, reporter, summary)
            _expire(ray, running, settings.timeout)
    finally:
        for state in running.values():
            ray.kill(state.actor)
        signal.signal(signal.SIGTERM, previous)
        if started_here:
            ray.shutdown()
    return summary


def _connect(address: str | None) -> bool:
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


def _placement(jobs: list[ModelJob]) -> tuple[int, Any]:
    """How many actors may run at once, and the resources each asks for.

    With GPUs an actor owns its own. Without, two actors share the CPUs: while one loads, the other computes.
    """
    import ray

    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
    if gpus == 0:
        slots = min(len(jobs), 2, max(1, cpus))
        return slots, lambda job: {"num_cpus": max(1, cpus // slots)}
    per_node = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    for job in jobs:
        if job.num_gpus > max(per_node):
            raise DriverError(f"{job.model_id}: needs {job.num_gpus} GPUs on one node; the largest has {max(per_node)}")
    smallest = min(job.num_gpus for job in jobs)
    return max(1, gpus // smallest), lambda job: {"num_cpus": 1, "num_gpus": job.num_gpus}


def _actor_class(options: dict[str, Any]) -> Any:
    import ray

    class ModelActor:
        """Owns the resources of one model for as long as its reads take."""

        @ray.method(num_returns="streaming")  # type: ignore[untyped-decorator]
        def run(self, job: ModelJob, run_id: str, attempt: int) -> Iterator[Event]:
            yield from run_model(job, run_id, attempt)

    return ray.remote(max_restarts=0, max_task_retries=0, **options)(ModelActor)


def _ready(ray: Any, running: dict[Any, _Running]) -> list[Any]:
    """Streams that have an event, or have ended."""
    ready, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_SECONDS, fetch_local=False)
    return list(ready)


def _take_event(
    ray: Any, stream: Any, state: _Running, store: ResultStore, reporter: Reporter, summary: Summary
) -> str | None:
    """Handle the next event of a stream; returns why the actor has ended, or None while it lives."""
    try:
        event: Event = ray.get(next(stream))
    except StopIteration:
        return "the actor ended"
    except ray.exceptions.RayError as error:
        return _cause(ray, error)
    state.last_event = time.monotonic()
    if isinstance(event, Progress):
        reporter.progress(state.job.model_id, event)
    else:
        state.done.append(event.job.identity())
        _store(event, store, reporter, summary)
    return None


def _store(event: Finished, store: ResultStore, reporter: Reporter, summary: Summary) -> None:
    store.write(event.tables)
    row = event.row
    summary.ok += row["status"] == "ok"
    summary.failed += row["status"] != "ok"
    summary.reads.append({name: row[name] for name in ("model", "revision", "read", "status", "error", "depth")})
    reporter.finished(event)


def _expire(ray: Any, running: dict[Any, _Running], timeout: float) -> None:
    """Kill actors that have been silent too long; their streams then end."""
    for state in running.values():
        if not state.expired and time.monotonic() - state.last_event > timeout:
            state.expired = True
            ray.kill(state.actor)


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
