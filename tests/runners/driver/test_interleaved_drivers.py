"""Drivers of one result set step by step: at each touch of the place any of them may be next, dead, or asleep for long.

Each is a greenlet on a clock that only the simulation moves; claims, sharing, books and turns are the project's own.
"""

import contextlib
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from greenlet import getcurrent, greenlet

from deadbench.runners.driver import books, in_process
from deadbench.runners.driver.sharing import Sharing
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished, failed_read, to_tables
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.results import claims
from deadbench.suite.registry.loading import load_registry
from deadbench.suite.schema import KEY

LEASE, BEAT, WORK = 60.0, 10.0, 30.0  # seconds
SEEDS, LONGEST = 40, 4000.0
ENGINES = ("torch", "streaming")
REGISTRY = """
protocols: {standard: {tokens: 128}}
suites: {}
models:
  - {id: a, source: nowhere, parameters: 9, config: {model_type: gpt_neox, hidden_size: 16, num_hidden_layers: 1,
     num_attention_heads: 2, vocab_size: 97}, input: 'tokens:random',
     checkpoints: {pattern: 'step{step}', first: 0, last: 1, every: 1}}
  - {id: b, config: {model_type: gpt_neox, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
     vocab_size: 97}, input: 'tokens:random'}
"""


@dataclass(eq=False)
class Driver:
    """One process: its greenlet, its plan, and until when it sleeps or stands still."""

    name: str
    jobs: list[Any]
    runs: greenlet | None = None
    sharing: Any = None
    wakes: float = 0.0
    beats: float = math.inf  # when next
    stands_until: float = 0.0
    fate: str = "alive"  # ended, killed, interrupted
    summary: Any = None


@dataclass(eq=False)
class World:
    """The place that all see: a folder of claims, rows; and the one clock."""

    rng: random.Random
    now: float = 1000.0
    files: dict[str, bytes] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    drivers: list[Driver] = field(default_factory=list)
    acting: Driver | None = None
    main: greenlet = field(default_factory=getcurrent)

    def step(self) -> None:
        """Somebody else may be next."""
        if getcurrent() is not self.main:
            self.main.switch()

    def beats_from_now(self) -> None:
        self.acting.beats = self.now + BEAT

    def sleep(self, seconds: float) -> None:
        self.acting.wakes = self.now + seconds
        self.step()


class Place:
    """A file system of which every call is one step."""

    protocol = "simulated"

    def __init__(self, world: World):
        self.world = world

    def ls(self, folder: str, **options: Any) -> list[dict[str, Any]]:
        self.world.step()
        return [{"name": path} for path in self.world.files]

    def cat_file(self, path: str, end: int | None = None) -> bytes:
        self.world.step()
        if path not in self.world.files:
            raise FileNotFoundError(path)
        return self.world.files[path]

    def pipe_file(self, path: str, data: bytes) -> None:
        self.world.step()
        self.world.files[path] = data

    def rm_file(self, path: str) -> None:
        self.world.step()
        if self.world.files.pop(path, None) is None:
            raise FileNotFoundError(path)

    def create(self, path: str, data: bytes) -> None:
        self.world.step()
        if path in self.world.files:
            raise FileExistsError(path)
        self.world.files[path] = data


class Store:
    """One driver's view of the rows; writing is no step: between the last look and the row nothing is locked."""

    location = "simulated"

    def __init__(self, world: World):
        self.world, self.passed = world, len(world.rows)

    def place(self) -> tuple[Place, str]:
        return Place(self.world), "out"

    def earlier(self, runs: set[str]) -> list[dict[str, Any]]:
        return [row for row in self.world.rows[: self.passed] if row["run_id"] in runs]

    def come(self) -> list[dict[str, Any]]:
        self.world.step()
        new, self.passed = self.world.rows[self.passed :], len(self.world.rows)
        return new

    def write(self, tables: dict[str, Any], stamp: str) -> None:
        self.world.rows += tables["reads"].to_pylist()


def identity(row):
    return (*(row[name] for name in KEY), row["source_fingerprint"])


@pytest.fixture
def simulated(monkeypatch):
    """A `World` of a random generator, whose place and clock the project's code takes for real."""

    def make(rng: random.Random) -> World:
        world = World(rng)
        monkeypatch.setattr(time, "monotonic", lambda: world.now)
        monkeypatch.setattr(time, "sleep", world.sleep)
        monkeypatch.setattr(claims, "is_local", lambda fs: True)
        monkeypatch.setattr(claims, "can_create_new", lambda fs: True)
        monkeypatch.setattr(claims, "create_new", lambda path, data, fs: fs.create(path, data))
        here = rng.random() < 0.5  # all on one machine, where a dead process is seen at once

        def has_died(facts):
            return here and any(
                facts.get("host") == each.name != "" and each.fate == "killed" for each in world.drivers
            )

        monkeypatch.setattr(claims, "own_facts", lambda: {"host": world.acting.name})
        monkeypatch.setattr(claims, "has_died", has_died)
        monkeypatch.setattr(claims.Claims, "beat_on", lambda self, seconds: world.beats_from_now())
        monkeypatch.setattr(books, "remove_checkpoints", lambda *given: None)
        return world

    return make


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    path = tmp_path_factory.mktemp("registry") / "models.yaml"
    path.write_text(REGISTRY)
    return build_jobs(load_registry(path), path, ["a", "b"], None, None, Overrides())


def planned(job, rng, named):
    """A model as one machine's plan has it: an engine for each read, the named one, or no room for it."""

    def of(read):
        if read.engine is None and not read.auto:
            return read
        error = "needs 9 GB" if rng.random() < 0.25 else None
        return replace(read, engine=named or rng.choice(ENGINES), auto=named is None, error=error)

    return replace(job, reads=tuple(map(of, job.reads)))


def drive(world, driver, fails):
    """What a run without Ray does."""
    nothing = SimpleNamespace(**dict.fromkeys(("say", "finished", "elsewhere"), lambda *given: None))
    store = Store(world)
    done = {identity(row) for row in world.rows if row["status"] == "ok"}
    known = [replace(job, reads=tuple(read.as_stored(done) for read in job.reads)).without(done) for job in driver.jobs]
    left = [job for job in known if job.reads]
    driver.sharing = sharing = Sharing(store, left, driver.name, lambda text: None, 600.0, LEASE, BEAT)
    sharing._claims._clock = lambda: world.now
    book = books.Books(store, sharing, nothing, nothing, driver.name, 600.0)
    driver.summary = book.summary
    with sharing:
        for job in in_process._turns(left, sharing, book):
            for read in job.reads:
                if read.error:
                    book.put(failed_read(read, driver.name, 0, read.error))
                    continue
                world.sleep(world.rng.uniform(0, WORK))
                if (read.label(), read.engine) in fails:
                    book.put(failed_read(read, driver.name, 1, "no such norm"))
                else:
                    row = {"status": "ok", "depth": 1.0}
                    tables = to_tables({"reads": [row]}, read, driver.name, 1, datetime.now(UTC))
                    book.put(Finished(read, tables))
    driver.fate = "ended"


def started(world, name, jobs, fails):
    driver = Driver(name, jobs)
    driver.runs = greenlet(lambda: drive(world, driver, fails))
    world.drivers.append(driver)
    return driver


def run(world, driver, *thrown):
    """Let it go on to its next step, or to its end."""
    world.acting = driver
    try:
        driver.runs.throw(*thrown) if thrown else driver.runs.switch()
    finally:
        world.acting = None


def go_on(world, trouble, again):
    """Until all have ended; `trouble`: how likely something happens to one in a step; `again` starts its successor."""
    rng, until = world.rng, world.now + LONGEST
    while alive := [each for each in world.drivers if each.fate == "alive"]:
        assert world.now < until, f"{[each.name for each in alive]} wait for ever; {sorted(world.files)}"
        for each in alive:
            if max(each.beats, each.stands_until) <= world.now:
                each.beats, world.acting = world.now + BEAT, each
                each.sharing._claims.beat()
        if rng.random() < trouble:
            victim, what = rng.choice(alive), rng.choice(("killed", "interrupted", "stands", "stands"))
            if what == "stands":
                victim.stands_until = world.now + rng.uniform(0.5, 2.5) * LEASE
            elif what == "killed" or (victim.runs and victim.stands_until <= world.now):
                victim.fate = what
                if what == "interrupted":
                    interrupt(world, victim)
                again(victim)
            continue
        ready = [each for each in alive if max(each.wakes, each.stands_until) <= world.now]
        if ready:
            world.now += rng.expovariate(100)
            run(world, rng.choice(ready))
        else:
            world.now = min(world.now + BEAT, *(max(each.wakes, each.stands_until) for each in alive))


def interrupt(world, driver):
    """Ctrl-C: it gives back what it has."""
    with contextlib.suppress(KeyboardInterrupt):
        run(world, driver, KeyboardInterrupt)
        while driver.runs:
            run(world, driver)


def labelled(world):
    """(label, row) of every row."""
    return [
        (" ".join(part for part in (row["model"], row["revision"], row["read"]) if part), row) for row in world.rows
    ]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_read_is_done_once_by_one_who_can_and_nobody_waits_for_ever(seed, simulated, jobs):
    rng = random.Random(seed)
    world = simulated(rng)
    everyone = {read.label(): read for job in jobs for read in job.reads}
    fails = {(label, engine) for label in everyone for engine in (*ENGINES, None) if rng.random() < 0.08}
    count, names = rng.randint(2, 4), iter(range(10**6))
    named = [rng.choice(ENGINES) if rng.random() < 0.15 else None for _ in range(count)]
    plans = [[planned(job, rng, name) for job in rng.sample(jobs, len(jobs))] for name in named]

    def again(dead):
        if rng.random() < 0.7:
            started(world, f"d{next(names)}", dead.jobs, fails)

    for plan in plans:
        started(world, f"d{next(names)}", plan, fails)
    go_on(world, rng.choice((0.0, 0.004, 0.02)), again)
    for plan in plans:  # the same command, given again by all at once
        started(world, f"d{next(names)}", plan, fails)
    go_on(world, 0.0, again)

    ok = [(label, row["engine"]) for label, row in labelled(world) if row["status"] == "ok"]
    chosen = [plan for plan, name in zip(plans, named, strict=True) if name is None]
    for label in everyone:
        engines = [engine for each, engine in ok if each == label]
        assert len(engines) == len(set(engines)), (label, engines)
        if not any(named):
            assert len(engines) <= 1, (label, engines)
        able = [
            read.engine
            for plan in plans
            for job in plan
            for read in job.reads
            if read.label() == label and not read.error and (label, read.engine) not in fails
        ]
        assert bool(engines) == bool(able), (label, engines, able)
    for label, row in labelled(world):
        assert row["status"] == "ok" or row["attempt"] == 0 or (label, row["engine"]) in fails, (label, row["error"])
    once = Counter((label, row["run_id"]) for label, row in labelled(world))
    assert set(once.values()) == {1}
    ended = {each.name.encode() for each in world.drivers if each.fate == "ended"}
    assert not {path for path, content in world.files.items() if content in ended}
    assert chosen or any(named)
