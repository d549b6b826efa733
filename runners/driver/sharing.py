"""Several drivers of one result set: each read is claimed before it is started, and others' outcomes are taken as ours.

A driver takes what nobody else has. Alone it takes a model whole, since a model's reads share what was loaded; beside
others its part of what is left of the model, whole checkpoints. What others have, it waits for: a run ends when all
of its reads are in the results, and takes over what a dead driver left. A read that failed is not tried again by
drivers that were there at the same time.

Machines differ: of a read whose engine nobody named each plan may take another one. It is claimed as by each of them,
and done when any has its row; a failure is that of its engine, and of no other machine where it was never tried.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from types import TracebackType
from typing import Any, Self

from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import ModelJob, ReadJob
from deadbench.runners.results.claims import BEAT_SECONDS, LEASE_SECONDS, Claims
from deadbench.runners.results.outbox import UnwritableError
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker.progress_folder import name_of
from deadbench.suite.schema import KEY
from deadbench.suite.storage import refusal

AGAIN_SECONDS = 3.0  # between two looks at what others have

Identity = tuple[Any, ...]


class Sharing:
    """Which reads of `jobs` are this driver's; a context manager, whose end gives back what was not read."""

    def __init__(
        self,
        store: ResultStore,
        jobs: Sequence[ModelJob],
        run_id: str,
        say: Callable[[str], None],
        patience: float,
        lease: float = LEASE_SECONDS,
        beat: float = BEAT_SECONDS,
        at: Callable[[], list[dict[str, Any]]] = list,
    ):
        """`patience`, `lease` and `beat` in seconds; `patience` as `Settings` has it; `at`: told with each beat."""
        self._store, self._run_id, self._say, self._patience, self._beat = store, run_id, say, patience, beat
        self._claims = Claims(store, run_id, lease)
        self._claims.at = at
        self._jobs = {read.identity(): job for job in jobs for read in job.reads}
        self._by_engine = {each.identity(): read for job in jobs for read in job.reads for each in read.by_any_engine()}
        self._settled: dict[Identity, dict[str, Any]] = {}
        self._told: set[Identity] = set()
        self._lost: list[ReadJob] = []
        self._refused_since: float | None = None
        self._waits_for: set[str] = set()

    def __enter__(self) -> Self:
        """Begin to be there.

        Raises:
            UnwritableError: nothing can be claimed in this place, nor written.
        """
        try:
            self._claims.begin()
            self._remember(self._store.earlier(self._claims.company) if self._claims.company else ())
        except Exception as error:
            raise UnwritableError(f"{self._store.location}: reads cannot be claimed ({refusal(error)})") from error
        if self._claims.works:
            self._claims.beat_on(self._beat)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(Exception):  # what stays lapses
            self._claims.end({name for read in self._settled_reads(self._settled) for name in _names(read)})

    def take(self, job: ModelJob, checkpoints: int | None = None) -> tuple[ModelJob, ModelJob]:
        """What of `job` to read now, and what of it others have or may have; what is in the results is in neither.

        `checkpoints`: how many of them at most; None: all if nobody else is there, else a fair part.

        Raises:
            UnwritableError: the place has refused claims for longer than the patience.
        """
        none = replace(job, reads=())
        try:
            self._claims.look()
            free = [read for read in job.reads if all(map(self._claims.free, _names(read)))]
            groups = [list(group) for _, group in groupby(free, key=lambda read: read.revision)]
            if checkpoints is None:
                checkpoints = -(-len(groups) // (1 + len(self._claims.others)))
            wanted = [read for group in groups[:checkpoints] for read in group]
            claimed = self._claim(wanted)
            # Only now: who had it stored it before it let go.
            come = self._store.come()
            self._claims.meet({row["run_id"] for row in come})
            self._remember(come)
        except Exception as error:
            self._refused(error)
            return none, job
        self._refused_since = None
        left = job.without(self._settled)
        ours = {read.identity() for read in claimed}
        mine = replace(left, reads=tuple(read for read in left.reads if read.identity() in ours))
        for read in claimed:
            if read.identity() in self._settled:
                self._claims.give_back(_names(read))
        return mine, left.without(ours)

    def _claim(self, reads: list[ReadJob]) -> list[ReadJob]:
        """Those of `reads` that are this driver's now, as by each engine; in one order: one has all."""
        mine = [(read, _names(read)) for read in reads]
        for place in range(max((len(names) for _, names in mine), default=0)):
            won = self._claims.take([names[place] for _, names in mine if place < len(names)])
            for _, names in (lost := [each for each in mine if not won.issuperset(each[1][place : place + 1])]):
                self._claims.give_back(names[:place])
            mine = [each for each in mine if each not in lost]
        return [read for read, _ in mine]

    def still_ours(self, event: Finished) -> bool:
        """Whether a finished read may be stored: nobody has taken it over while this process stood still.

        Raises:
            OSError, or what the place's library raises.
        """
        names = _names(event.job)
        if all(map(self._claims.holds, names)):
            return True
        self._claims.give_back(names)
        self._say(f"{event.job.label()}: another run has taken it over meanwhile; its row counts")
        self._lost.append(event.job)
        return False

    def stored(self, event: Finished) -> None:
        """A read is in the results: its claim is of no use any more."""
        with contextlib.suppress(Exception):
            self._claims.give_back(_names(event.job))

    def lost(self) -> list[ModelJob]:
        """What others have taken over since the last call: it is waited for as what they took first."""
        lost, self._lost = self._lost, []
        return [replace(self._jobs[read.identity()], reads=(read,)) for read in lost]

    def elsewhere(self) -> list[tuple[ReadJob, dict[str, Any]]]:
        """Reads of this run that others have stored, with their outcomes, since the last call."""
        new = [identity for identity in self._settled if identity in self._jobs and identity not in self._told]
        self._told |= set(new)
        return [(read, self._settled[read.identity()]) for read in self._settled_reads(new)]

    def waiting(self, jobs: Iterable[ModelJob]) -> None:
        """Nothing is left to do but to wait for others: say for whom, when that changes."""
        reads = [read for job in jobs for read in job.reads]
        named_as = [name for read in reads for name in _names(read)]
        holders = {holder for name in named_as if (holder := self._claims.holder(name)) is not None}
        if holders and holders != self._waits_for:
            named = ", ".join(self._claims.describe(holder) for holder in sorted(holders))
            self._say(f"waiting for {len(reads)} reads that are claimed by {named}")
        self._waits_for = holders

    def _settled_reads(self, identities: Iterable[Identity]) -> list[ReadJob]:
        """Those of this run's reads that are of `identities`, in the order of these."""
        wanted = [identity for identity in identities if identity in self._jobs]
        reads = {read.identity(): read for identity in wanted for read in self._jobs[identity].reads}
        return [reads[identity] for identity in wanted]

    def _remember(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            identity = (*(row[name] for name in KEY), row["source_fingerprint"])
            read = self._by_engine.get(identity)
            if read is None or row["run_id"] == self._run_id:
                continue
            tried = row["attempt"] != 0 or read.error is not None
            if row["status"] == "ok" or (tried and identity == read.identity()):
                self._settled[read.identity()] = row

    def _refused(self, error: Exception) -> None:
        now = time.monotonic()
        if self._refused_since is None:
            self._refused_since = now
            self._say(f"reads cannot be claimed in {self._store.location} ({refusal(error)}); tried again")
        if now - self._refused_since >= self._patience:
            raise UnwritableError(
                f"{self._store.location}: reads cannot be claimed for {self._patience:g} s ({refusal(error)})"
            ) from error


def _names(read: ReadJob) -> list[str]:
    """What a read is claimed by, as each engine would do it; in an order that is the same for all drivers."""
    return sorted(map(name_of, read.by_any_engine()))
