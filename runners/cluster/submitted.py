"""Runs that Ray's job API knows: which there are, what they print, how they end. None is started or stopped here."""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from deadbench.runners.cluster.joining import JoinError, check_answers
from deadbench.suite.errors import one_line
from deadbench.suite.plain_text import plain
from deadbench.suite.secrets import shown_place

_AGAIN_SECONDS = 2.0
_QUIET_SECONDS = 30.0  # without a letter, after which the head is asked whether the job goes on
_NAMED = 5  # jobs that an error lists
_PATIENCE_SECONDS = 600.0  # for which a head that does not answer is asked again
_OVER = ("SUCCEEDED", "FAILED", "STOPPED")
_OURS = re.compile(r"\bdeadbench\b.*\s(?:run|census|watch|reproduce)\b", re.DOTALL)


@dataclass(frozen=True)
class Submitted:
    """A job of deadbench's: `id` of its submission, None where a driver of its own joined the cluster."""

    id: str | None
    status: str
    entrypoint: str
    exit_code: int | None
    started: int

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in _OVER

    @property
    def out(self) -> str | None:
        """The result set that its command names; None where that is not seen, as behind a shell's `-c`."""
        with contextlib.suppress(ValueError):
            words = shlex.split(self.entrypoint)
            for word, following in zip(words, [*words[1:], ""], strict=True):
                if word == "--out" or word.startswith("--out="):
                    return word.partition("=")[2] or following
        return None

    def code(self) -> int:
        """The exit code: the command's own where Ray has it, 130 of one that was stopped."""
        if self.status == "STOPPED":
            return 130
        return 0 if self.status == "SUCCEEDED" else self.exit_code or 1


class Jobs:
    """The jobs of the cluster whose dashboard, or head, is at an address."""

    def __init__(self, address: str):
        """Ask there.

        Raises:
            JoinError: nobody answers, or refuses.
        """
        self._shown = shown_place(address)
        if "://" not in address or address.startswith("ray://"):
            check_answers(address)
        try:
            from deadbench.runners.cluster.bounded_client import client_class

            made = client_class()  # which needs Ray
            logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
            with _addressed(address):
                self._client = made(address)
        except Exception as error:
            raise JoinError(f"{self._shown}: Ray's jobs cannot be asked for ({_said(error)})") from error

    def latest(self, wanted: str | None = None) -> Submitted:
        """The job `wanted`; else of deadbench's the newest that goes on, submitted before joined, else the newest.

        Raises:
            JoinError: there is none.
        """
        try:
            found = [_job(each) for each in self._client.list_jobs()]
        except Exception as error:
            raise JoinError(f"{self._shown}: Ray's jobs cannot be listed ({_said(error)})") from error
        if wanted is not None:
            named = [job for job in found if job.id == wanted]
            if not named:
                known = ", ".join([job.id for job in found if job.id][-_NAMED:]) or "none"
                raise JoinError(f"{self._shown}: no job {wanted!r} was submitted; there are {known}")
            return named[0]
        ours = [job for job in found if _OURS.search(job.entrypoint)]
        if not ours:
            raise JoinError(f"{self._shown}: no job of deadbench's is known there; give the --out of its run instead")
        return max(ours, key=lambda job: (not job.over, job.id is not None, job.started))

    def follow(self, job: Submitted, write: Callable[[str], None], say: Callable[[str], None]) -> Submitted:
        """`write` what a submitted job prints, from its beginning until it ends; returns it as it ended.

        What is amiss is told to `say`, when the head stops answering as one does.

        Raises:
            JoinError: the head has not answered for longer than the patience.
        """
        written, answered, amiss = 0, time.monotonic(), False
        while True:
            try:
                for chunk in self._chunks(job, written):
                    written += len(chunk)
                    write(chunk)
                now = _job(self._client.get_job_info(str(job.id)))
                answered, amiss = time.monotonic(), False
                if now.over:
                    return now
            except Exception as error:  # the connection, the head that is just started again
                why = f"{self._shown}: job {plain(str(job.id))} cannot be followed ({_said(error)})"
                if time.monotonic() - answered > _PATIENCE_SECONDS:
                    raise JoinError(why) from error
                if not amiss:
                    say(f"{why}; asked again for {_PATIENCE_SECONDS:.0f} s")
                amiss = True
            time.sleep(_AGAIN_SECONDS)

    def _chunks(self, job: Submitted, passed: int) -> Iterator[str]:
        """What comes until the connection ends, without the `passed` letters that were there before."""
        tail = self._client.tail_job_logs(str(job.id))
        loop = asyncio.new_event_loop()
        try:
            while (chunk := self._next(tail, loop, job)) is not None:
                new, passed = chunk[passed:], max(0, passed - len(chunk))
                if new:
                    yield new
        finally:
            loop.run_until_complete(tail.aclose())
            loop.close()

    def _next(self, tail: AsyncIterator[str], loop: asyncio.AbstractEventLoop, job: Submitted) -> str | None:
        """What comes next; None at its end, or where nothing comes of a job that has ended."""
        coming = loop.create_task(_first(tail))
        try:
            while not loop.run_until_complete(asyncio.wait([coming], timeout=_QUIET_SECONDS))[0]:
                if _job(self._client.get_job_info(str(job.id))).over:  # a head that has gone raises
                    return None
            return coming.result()
        finally:
            if not coming.done():
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    loop.run_until_complete(coming)


async def _first(tail: AsyncIterator[str]) -> str | None:
    return await anext(tail, None)


@contextlib.contextmanager
def _addressed(address: str) -> Iterator[None]:
    """Inside, the address that was named is the one that Ray asks, whatever RAY_ADDRESS says."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        if address == "auto" and "RAY_ADDRESS" in before:
            os.environ["RAY_ADDRESS"] = before["RAY_ADDRESS"]
        yield
    finally:
        os.environ.update(before)


def _job(told: Any) -> Submitted:
    submission = told.submission_id if str(getattr(told.type, "value", told.type)) == "SUBMISSION" else None
    status = str(getattr(told.status, "value", told.status))
    return Submitted(submission, status, told.entrypoint or "", told.driver_exit_code, told.start_time or 0)


def _said(error: BaseException) -> str:
    said = one_line(error, 300)
    return f"{said}; pip install 'deadbench[cluster]'" if "ray[default]" in said else said
