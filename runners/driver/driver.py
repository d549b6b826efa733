"""The driver: the actors of each model, their events to the reporter, their tables to the store, everything given back.

One loop. The driver alone writes. Actors are neither restarted nor detached: when a process dies, the read that it was
at is tried again where that can help, else it is a failed row; the reads after it, and the other models, go on.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from typing import Any

from deadbench.runners.cluster.head import HeadWatch, LostClusterError
from deadbench.runners.cluster.joining import JoinError, connect
from deadbench.runners.cluster.node_versions import check_versions
from deadbench.runners.cluster.nodes import PlacementError
from deadbench.runners.doctor.before_run import check_gpu_nodes
from deadbench.runners.driver.books import Summary
from deadbench.runners.driver.loop import Run, Settings
from deadbench.runners.driver.sharing import Sharing
from deadbench.runners.jobs.events import new_run_id
from deadbench.runners.jobs.job import ModelJob
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.reporting.run_record import RunRecord
from deadbench.runners.results.outbox import UnwritableError
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker.progress_folder import absolute

__all__ = ["DriverError", "Settings", "StoppedError", "Summary", "execute", "new_run_id"]

_BESIDE = 32  # threads for what has to be waited for


class DriverError(RuntimeError):
    """Ray cannot be started or joined, or cannot hold what is asked; one line, exit code 2."""


class StoppedError(RuntimeError):
    """The run cannot go on: results cannot be written, or the cluster is `lost`; one line, exit code 1."""

    lost = False


def execute(jobs: list[ModelJob], store: ResultStore, settings: Settings, reporter: Reporter, run_id: str) -> Summary:
    """Run all `jobs`; returns when every read is one row.

    Raises:
        DriverError: Ray cannot be started, no node can hold a model, or a node runs other versions or has GPUs that
            torch has not.
        StoppedError: the cluster is lost, or results cannot be written; what was written is kept.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with every actor stopped and what finished kept.
    """
    with open(os.devnull, "w", encoding="utf-8") as quiet, redirect_stdout(quiet):  # where Ray's own notices go
        return _execute(jobs, store, settings, reporter, run_id)


def _execute(jobs: list[ModelJob], store: ResultStore, settings: Settings, reporter: Reporter, run_id: str) -> Summary:

    jobs = [job.checkpointed(settings.checkpoint_interval, absolute(store.location)) for job in jobs]
    try:
        connection = connect(settings.address, reporter.say)
    except JoinError as error:
        raise DriverError(str(error)) from error
    previous = signal.signal(signal.SIGTERM, _interrupt)  # after ray.init, which installs its own
    record = RunRecord(store, run_id, jobs, reporter.say)
    lost = False
    try:
        if not connection.started_here:
            refused, doubtful = check_versions()
            if refused:
                raise DriverError("; ".join(refused) + "; install the same versions on every node")
            for difference in doubtful:
                reporter.say(f"{difference}; numbers may differ")
        if any(read.engine for job in jobs for read in job.reads):
            fatal, harmful = check_gpu_nodes()
            if fatal:
                raise DriverError("; ".join(fatal))
            for line in harmful:
                reporter.say(f"{line}; `deadbench doctor` says more")
        with (
            HeadWatch() as head,
            Sharing(store, jobs, run_id, reporter.say, settings.patience, at=reporter.at) as sharing,
        ):
            pool = ThreadPoolExecutor(_BESIDE, "beside the driver")
            run = Run(
                jobs, store, sharing, settings, reporter, record, head, pool, run_id,
                shared=not connection.started_here,
            )  # fmt: skip
            record.started(settings.address or "local", run.nodes.facts())
            reporter.run_started(run_id, len(jobs))
            outcome, failure = "stopped", None
            try:
                run.go()
                outcome = "finished"
            except BaseException as error:
                lost = isinstance(error, LostClusterError)
                outcome = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
                failure = error
                raise
            finally:
                try:
                    run.stop(lost)
                finally:  # whatever a second Ctrl-C cuts short
                    pool.shutdown(wait=not lost, cancel_futures=lost)
                    record.ended(outcome, failure)
                    reporter.run_ended(outcome, {"ok": run.summary.ok, "failed": run.summary.failed})
            return run.summary
    except PlacementError as error:
        raise DriverError(str(error)) from error
    except (LostClusterError, UnwritableError) as error:
        stopped = StoppedError(f"{error}; what is written is kept: give the same command to go on")
        stopped.lost = lost
        raise stopped from error
    finally:
        signal.signal(signal.SIGTERM, previous)
        if not lost:
            connection.leave()


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
