"""A run in this process, without Ray: one model after another, and all else as the driver does it.

What a process of its own gives is not had: one that is killed (for memory, by a device's fault) takes the run with it,
and the same command goes on; a device's fault that leaves the process alive ends the run after that read.
"""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from deadbench.runners.doctor.before_run import check_own_gpus
from deadbench.runners.driver.books import Books, Summary
from deadbench.runners.driver.driver import StoppedError, execute
from deadbench.runners.driver.loop import Settings
from deadbench.runners.driver.sharing import AGAIN_SECONDS, Sharing
from deadbench.runners.jobs.events import Progress, Remark, SilenceError, failed_read
from deadbench.runners.jobs.job import ModelJob
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.reporting.run_record import RunRecord
from deadbench.runners.results.outbox import UnwritableError
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker.progress_folder import absolute
from deadbench.runners.worker.run import run_model

_NO_RAY = "none"  # as planning/hardware.py has it
_SILENT_AGAIN_SECONDS = 60.0  # between a silence that was told and the next, at least


def execute_at(address: str | None) -> Callable[[list[ModelJob], ResultStore, Settings, Reporter, str], Summary]:
    """What runs jobs where `--address` says: here where that is `none`, else on Ray."""
    return execute_in_process if address == _NO_RAY else execute


def execute_in_process(
    jobs: list[ModelJob], store: ResultStore, settings: Settings, reporter: Reporter, run_id: str
) -> Summary:
    """Run all `jobs` here, one after another; returns when every read is one row.

    Raises:
        StoppedError: results cannot be written, or a fault has left this process's GPU of no use; what was written is
            kept.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with what finished kept.
    """
    jobs = [job.checkpointed(settings.checkpoint_interval, absolute(store.location)) for job in jobs]
    record = RunRecord(store, run_id, jobs, reporter.say)
    sharing = Sharing(store, jobs, run_id, reporter.say, settings.patience, at=reporter.at)
    books = Books(store, sharing, reporter, record, run_id, settings.patience)
    record.started(str(settings.address), [])
    reporter.run_started(run_id, len(jobs))
    outcome = "stopped"
    failure: BaseException | None = None
    with _quiet(), interruptible():
        try:
            if any(read.engine for job in jobs for read in job.reads):
                for line in check_own_gpus():
                    reporter.say(f"{line}; `deadbench doctor` says more")
            with sharing:
                _run_all(jobs, sharing, books, record, reporter, settings.timeout)
            outcome = "finished"
        except UnwritableError as error:
            failure = error
            raise StoppedError(f"{error}; what is written is kept: give the same command to go on") from error
        except BaseException as error:
            outcome, failure = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped", error
            raise
        finally:
            record.ended(outcome, failure)
            reporter.run_ended(outcome, {"ok": books.summary.ok, "failed": books.summary.failed})
    return books.summary


def _run_all(
    jobs: list[ModelJob], sharing: Sharing, books: Books, record: RunRecord, reporter: Reporter, timeout: float
) -> None:
    try:
        for job in _turns(jobs, sharing, books):
            _run(job, books, record, reporter, timeout)
    except BaseException:
        with suppress(UnwritableError):
            books.flush()
        raise


def _turns(jobs: list[ModelJob], sharing: Sharing, books: Books) -> Iterator[ModelJob]:
    """What to read next, a checkpoint of a model at a time, until all of `jobs` is in the results."""
    left, passed = deque(jobs), 0
    while left:
        mine, others = sharing.take(left.popleft(), checkpoints=1)
        books.look_elsewhere()
        if mine.reads:
            yield mine
            left.extendleft([others] if others.reads else [])
            passed = 0
        elif others.reads:
            left.append(others)
            passed += 1
        if passed >= len(left) or not left:  # nothing is free
            books.drain()
            left.extend(sharing.lost())
            if left:
                sharing.waiting(left)
                time.sleep(AGAIN_SECONDS)
            passed = 0


def _run(job: ModelJob, books: Books, record: RunRecord, reporter: Reporter, timeout: float) -> None:
    """The reads of one model."""
    run_id = books.summary.run_id
    for read in (read for read in job.reads if read.error):
        books.put(failed_read(read, run_id, 0, str(read.error)))
    job = job.without(read.identity() for read in job.reads if read.error)
    if not job.reads:
        return
    for told in (reporter.model_started, record.placed):
        told(job, 1, ["this process"], 1)
    try:
        with _silence(timeout) as heard:
            for event in run_model(job, run_id, 1):
                heard(True)
                if isinstance(event, Progress):
                    reporter.progress(job.model_id, event)
                elif isinstance(event, Remark):
                    reporter.say(f"{event.label}: {event.text}")
                else:
                    heard(False)
                    books.put(event)  # and no clock runs while the model is freed: the next read's first word starts it
                    if event.poisoned:
                        raise StoppedError(
                            f"{event.job.label()}: {event.row['error']}; this process can use its GPU no more: give "
                            "the same command to go on"
                        )
    finally:
        reporter.gone(job.model_id)


@contextmanager
def _silence(seconds: float) -> Iterator[Callable[[bool], None]]:
    """Inside, a SilenceError comes where nothing was heard for so long; `heard(False)` stops the clock.

    It comes between two steps of Python: what hangs inside one call of a library's is not reached.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield lambda running: None
        return

    def silent(signum: int, frame: Any) -> None:
        raise SilenceError(f"no progress for {seconds:g} s (--timeout)")

    def heard(running: bool) -> None:
        again = max(seconds, _SILENT_AGAIN_SECONDS)  # where something waits at its end; not while the row is being made
        signal.setitimer(signal.ITIMER_REAL, *((seconds, again) if running else (0.0, 0.0)))

    before = signal.signal(signal.SIGALRM, silent)
    try:
        heard(True)
        yield heard
    finally:
        heard(False)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, what libraries print and warn of goes nowhere, as that of a worker does."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM is Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
