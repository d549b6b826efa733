"""The driver's one loop: what waits is started where it fits, events become results, and what dies is settled."""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from deadbench.runners.cluster.actors import Group, release, start
from deadbench.runners.cluster.faults import Attempts, Death, death_of
from deadbench.runners.cluster.head import HeadWatch
from deadbench.runners.cluster.nodes import Nodes
from deadbench.runners.cluster.processes import Ended
from deadbench.runners.cluster.schedule import Demand, Running, can_ever, decide
from deadbench.runners.driver.books import Books, Summary
from deadbench.runners.driver.sharing import AGAIN_SECONDS, Sharing
from deadbench.runners.jobs.events import Event, Progress, Remark, failed_read
from deadbench.runners.jobs.job import ModelJob
from deadbench.runners.reporting.metrics import Metrics
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.reporting.run_record import RunRecord
from deadbench.runners.results.outbox import PATIENCE_SECONDS, UnwritableError
from deadbench.runners.results.store import ResultStore

_POLL_SECONDS = 0.5
_LOOK_SECONDS = 2.0  # between two looks at the cluster
_PLACING_SECONDS = 600.0  # after which an actor that found no room, or never began, is taken back
_HOPELESS_SECONDS = 60.0  # how long a model waits for a node that could hold it, once there was one


@dataclass(frozen=True)
class Settings:
    """How to run.

    `address` as ray.init takes it (None: RAY_ADDRESS or a local Ray); `timeout` in seconds without any progress;
    `max_retries` further attempts at a read of which a process died; `to_come`: (GPUs, bytes of each) of the nodes that
    an autoscaler may add; `checkpoint_interval` in seconds, 0 for no checkpoints; `patience`: seconds for which results
    that cannot be written are kept; `gpu_bytes`: of a GPU of each node, by Ray's id, where they are known.
    """

    address: str | None = None
    timeout: float = 3600.0
    max_retries: int = 1
    to_come: tuple[tuple[int, float], ...] = ()
    checkpoint_interval: float = 300.0
    patience: float = PATIENCE_SECONDS
    gpu_bytes: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Waiting:
    job: ModelJob
    demand: Demand
    hopeless_since: float | None = None
    not_before: float = 0.0  # when to look again whether others have let go of it


class Run:
    """The state of one run: what waits, what runs, what is being taken down."""

    def __init__(
        self,
        jobs: list[ModelJob],
        store: ResultStore,
        sharing: Sharing,
        settings: Settings,
        reporter: Reporter,
        record: RunRecord,
        head: HeadWatch,
        pool: ThreadPoolExecutor,
        run_id: str,
        *,
        shared: bool,
    ):
        import ray

        self._ray, self._settings, self._reporter, self._run_id = ray, settings, reporter, run_id
        self._record, self._head, self._pool, self._shared = record, head, pool, shared
        self._metrics = Metrics(run_id)
        self._sharing = sharing
        self._books = Books(store, sharing, reporter, record, run_id, settings.patience, self._metrics.finished)
        self._attempts = Attempts(settings.max_retries)
        self._streams: dict[Any, Group] = {}  # a group of ranks has several
        self._ending: dict[Future[Ended], Group] = {}
        self.nodes = Nodes(len(jobs), settings.to_come, settings.gpu_bytes)
        self._unreadable: list[ModelJob] = []
        self._queue: list[_Waiting] = []
        self._enqueue(jobs)
        self._decided = self._changed = 0.0
        self._looked = time.monotonic()
        self._looking: Future[None] | None = None
        if settings.to_come:
            self.nodes.ask_for(waiting.demand for waiting in self._queue)

    @property
    def summary(self) -> Summary:
        """What the run came to so far."""
        return self._books.summary

    def go(self) -> None:
        """Until every read is a row; what the preflight could not open is one at once, and takes no device."""
        looked = 0.0
        while self._queue or self._streams or self._ending or self._unreadable:
            self._head.check()
            if self._unreadable and time.monotonic() - looked > AGAIN_SECONDS:
                self._unreadable, looked = self._books.fail_unreadable(self._unreadable), time.monotonic()
            self._look()
            if self._head.answers():
                self._start_what_fits()
            for stream in self._ready():
                if stream in self._streams:  # else its group has ended in this round
                    self._take_event(stream, self._streams[stream])
            self._look_for_silence()
            for future in [each for each in self._ending if each.done()]:
                self._settle(self._ending.pop(future), future.result())
            self._books.flush()
            if not (self._queue or self._streams or self._ending):
                self._books.drain()
            self._enqueue(self._sharing.lost())

    def _enqueue(self, jobs: list[ModelJob]) -> None:
        """Have `jobs` wait; what the preflight could not open, or has no room for, asks for no node."""
        unreadable = {read.identity() for job in jobs for read in job.reads if read.error}
        failing = [job.without(read.identity() for read in job.reads if not read.error) for job in jobs]
        readable = [job.without(unreadable) for job in jobs]
        self._unreadable += [job for job in failing if job.reads]
        self._queue += [_Waiting(job, self.nodes.demand(job)) for job in readable if job.reads]

    def stop(self, lost: bool) -> None:
        """End what runs; with a lost cluster Ray is not asked for anything. What has finished goes to the results."""
        with suppress(UnwritableError):
            self._books.drain() if lost else self._books.flush()
        if lost:
            return
        for group in self._groups():
            self._end(group)
        for future in list(self._ending):
            future.result()
        if self._settings.to_come:
            self.nodes.ask_for(())

    def _groups(self) -> list[Group]:
        return list({id(group): group for group in self._streams.values()}.values())

    def _occupied(self) -> list[Group]:
        return [*self._groups(), *self._ending.values()]

    def _look(self) -> None:
        """Every few seconds look at the cluster again; in a thread, because a head that is gone does not answer."""
        now = time.monotonic()
        if self._looking is not None and self._looking.done():
            self._looking.result()
            self._looking, self._looked, self._decided = None, now, 0.0
            for waiting in self._queue:
                waiting.demand = self.nodes.with_cpus(waiting.demand)
            self._end_on_lost_nodes()
            self._give_up_the_hopeless(now, idle=not self._occupied())
        elif self._looking is None and now - self._looked > _LOOK_SECONDS:
            places = [group.place for group in self._occupied()]
            self._looking = self._pool.submit(self.nodes.refresh, places, now - self._changed, shared=self._shared)

    def _start_what_fits(self) -> None:
        now = time.monotonic()
        occupied = self._occupied()
        if self._changed < self._decided:
            return
        self._decided = now
        running = [Running(g.place, max(0.0, self._estimate(g) - (now - g.started))) for g in occupied]
        placing = any(group.placement is not None and not group.is_placed() for group in self._groups())
        # One placement group at a time: the next one waits until this one stands.
        queue = [each for each in self._queue if not (placing and each.demand.ganged) and each.not_before <= now]
        demands, nothing_yet = [waiting.demand for waiting in queue], self._changed == 0
        for position, place in decide(demands, self.nodes.usable(), running, opening=nothing_yet):
            waiting = queue[position]
            if waiting.demand.ganged:
                if placing:
                    continue
                placing = True
            job = self._take(waiting)
            if not job.reads:
                self._decided = 0.0  # its place is another's
                continue
            attempt = self._attempts.number(job.reads[0])
            group = start(job, self.nodes, place, self._run_id, attempt)
            self._streams |= dict.fromkeys(group.streams, group)
            self._changed = time.monotonic()
            where = self.nodes.names(group.nodes())
            for told in (self._reporter.model_started, self._record.placed):
                told(group.job, attempt, where, waiting.demand.devices)
            self._metrics.running(len(self._groups()))

        if not self._occupied():
            self._sharing.waiting(waiting.job for waiting in self._queue if waiting.not_before > now)

    def _take(self, waiting: _Waiting) -> ModelJob:
        """What of a model that waits is ours to read; what others have stays in the queue."""
        self._queue.remove(waiting)
        mine, others = self._sharing.take(waiting.job)
        self._books.look_elsewhere()
        if others.reads:
            again = time.monotonic() + AGAIN_SECONDS
            self._queue.append(_Waiting(others, waiting.demand, waiting.hopeless_since, again))
        return mine

    def _estimate(self, group: Group) -> float:
        return self.nodes.demand(group.job).seconds

    def _ready(self) -> list[Any]:
        """Streams that have an event, or have ended."""
        streams = list(self._streams)
        if not streams:
            time.sleep(0.05)
            return []
        ready, _ = self._ray.wait(streams, num_returns=len(streams), timeout=0, fetch_local=False)
        if not ready:
            pause = 0.05 if self._ending else _POLL_SECONDS
            ready, _ = self._ray.wait(streams, num_returns=1, timeout=pause, fetch_local=False)
        return list(ready)

    def _take_event(self, stream: Any, group: Group) -> None:
        first = stream == group.streams[0]
        try:
            event: Event = self._ray.get(next(stream))
        except StopIteration:
            if not first:
                del self._streams[stream]
            else:
                left = group.job.without(group.done).reads
                self._end(group, Death("crash", "the actor ended") if left else None)
            return
        except self._ray.exceptions.RayError as error:
            death = death_of(self._ray, error)
            self._end(group, replace(death, cause=group.name(stream) + death.cause))
            return
        group.last_event = time.monotonic()
        if isinstance(event, Progress):
            if first:
                self._reporter.progress(group.job.model_id, event)
                self._metrics.progress(group.job.model_id, event)
        elif isinstance(event, Remark):
            self._reporter.say(f"{group.name(stream)}{event.label}: {event.text}")
        elif event.poisoned:
            cause = str(event.row["error"])
            self._end(group, Death("memory" if cause.startswith("out of memory") else "crash", cause))
        elif event.job.identity() not in group.done:
            group.done.append(event.job.identity())
            self._books.put(event)

    def _end(self, group: Group, death: Death | None = None) -> None:
        """Take `group` down; its place is free when that is done."""
        group.death = death
        for stream in group.streams:
            self._streams.pop(stream, None)
        self._ending[self._pool.submit(release, group)] = group
        self._reporter.gone(group.job.model_id)
        self._metrics.running(len(self._groups()))

    def _settle(self, group: Group, ended: Ended) -> None:
        """`group` is gone: what it left undone is queued again, or given up."""
        self._changed = time.monotonic()
        for survivor in ended.survivors:
            self._reporter.say(f"{group.job.model_id}: {survivor} would not end; its memory is not free")
        left = group.job.without(group.done)
        if group.death is None or not left.reads:
            return
        death = group.death.explained(ended)
        if death.kind in ("node", "unplaced"):
            for node in group.nodes():
                self.nodes.suspect(node)
        attempt = self._attempts.number(left.reads[0])
        again, given_up = self._attempts.after(death, left)
        if given_up is not None:
            self._books.put(failed_read(given_up, self._run_id, attempt, death.cause))
        elif death.kind != "broken":
            changed = "half the batch" if death.kind == "memory" else None
            self._reporter.retry(left.reads[0], death.cause, self._attempts.number(left.reads[0]), changed)
        if again.reads:
            avoid = frozenset() if death.kind == "broken" or given_up is not None else group.nodes()
            self._queue.append(_Waiting(again, self.nodes.demand(again, avoid)))

    def _look_for_silence(self) -> None:
        """End groups that have been silent too long, and take back those that found no room."""
        now = time.monotonic()
        for group in self._groups():
            if group.is_placed():
                if now - group.last_event > self._settings.timeout:
                    self._end(group, Death("silence", f"no progress for {self._settings.timeout:g} s (--timeout)"))
            elif now - group.started > _PLACING_SECONDS:
                self._end(group, Death("unplaced", "its place was taken by others"))

    def _end_on_lost_nodes(self) -> None:
        alive = {node.id for node in self.nodes.alive()}
        for group in self._groups():
            if not group.nodes() <= alive:
                self._end(group, Death("node", "its node was lost"))

    def _give_up_the_hopeless(self, now: float, *, idle: bool) -> None:
        """Reads that no node that is left could hold become failed rows, after a while."""
        patience = self._settings.timeout if self._settings.to_come else _HOPELESS_SECONDS
        nodes = self.nodes.alive()
        for waiting in list(self._queue):
            if not idle or can_ever(waiting.demand, nodes):
                waiting.hopeless_since = None
            elif waiting.hopeless_since is None:
                waiting.hopeless_since = now
            elif now - waiting.hopeless_since > patience:
                cause = f"needs {waiting.demand.devices:g} devices, and no node that is left has them"
                for read in self._take(waiting).reads:
                    row = failed_read(read, self._run_id, self._attempts.number(read) - 1, cause)
                    self._books.put(row)
