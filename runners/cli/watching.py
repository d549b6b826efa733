"""The loop of `deadbench watch`: look, read what is whole, judge it, tell what broke, and look again.

What was read and what was said of it lies in the result set, so that a watch that was killed goes on where it was.
"""

import json
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deadbench.analysis.gate import Gate
from deadbench.analysis.pages.training import training_page
from deadbench.analysis.sides import Side
from deadbench.runners.cli.console import UserError
from deadbench.runners.cli.run import execute_jobs
from deadbench.runners.cli.verdicts import Verdict, verdict_of
from deadbench.runners.driver.loop import Settings
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import JobError, ModelJob, Overrides
from deadbench.runners.jobs.opening import all_unfit
from deadbench.runners.jobs.own_model import own_model
from deadbench.runners.planning.assign import in_one_process, place_jobs
from deadbench.runners.planning.hardware import NO_RAY, Cluster
from deadbench.runners.results.store import ResultStore
from deadbench.suite.checkpoints.arrivals import Arrival, Arrivals
from deadbench.suite.checkpoints.series import Series
from deadbench.suite.errors import CheckpointError, message
from deadbench.suite.plain_text import MAX_LINE, plain
from deadbench.suite.registry.entries import Model, Registry
from deadbench.suite.secrets import scrubbed, shown_place
from deadbench.suite.storage import write_whole

VERDICTS = "watch/verdicts.json"  # of the result set
_VERSION = 1
_SETTLING_SECONDS = 1.0  # between the two looks of --once
_PAGE_SECONDS = 10.0  # between two pages within one look, which may find a hundred checkpoints
_SHOWN = 3
_STDERR = 2
COMMAND_SECONDS = 600.0  # of --on-break, for which no checkpoint is read meanwhile


@dataclass
class Watch:
    """One place that is watched, and what there is to say of it.

    Attributes:
        place: the folder, absolute, or the URL.
        name: what the model is called in the results, as `deadbench run` calls it.
        registry: of its protocols the standard one is used; and where it is.
        baseline: what every checkpoint is compared with beside the one before, and its name.
        on_break: the command that gets a verdict on its stdin.
        report: where the page goes; None: to the result set.
        say: takes a line on what happens.
        verdicts: of each checkpoint, in the order in which they were read.
    """

    place: str
    name: str
    registry: tuple[Registry, Path]
    out: str
    reads: list[str]
    overrides: Overrides
    settings: Settings
    cluster: Cluster
    gate: Gate | None
    baseline: tuple[str, Side] | None
    on_break: str | None
    report: Path | None
    interval: float
    say: Callable[[str], None]
    told: Callable[[Verdict], None]
    debug: bool = False
    verdicts: list[Verdict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._store = ResultStore(self.out)
        self._arrivals = Arrivals(self.place, self.overrides.config, self.overrides.model_type)
        self._done: set[str] = set()
        self._said: str | None = None
        self._model: Model | None = None
        self._page_written = time.monotonic()
        self._earlier = self._stored()

    def once(self) -> list[Verdict]:
        """One look, or two where a form needs two; the verdicts on what was new.

        Raises:
            CheckpointError: the place cannot be listed.
        """
        waiting = self._look()
        if any(each.settling for each in waiting):
            time.sleep(min(self.interval, _SETTLING_SECONDS))
            waiting = self._look()
        self._say_waiting(waiting, otherwise="no other is there")
        self._write_page(live=False)
        return self.verdicts

    def follow(self, until_idle: float | None) -> list[Verdict]:
        """Look every `interval` seconds until interrupted, or until nothing new came for `until_idle` seconds."""
        last = time.monotonic()
        self._write_page(live=True)
        try:
            while True:
                count = len(self.verdicts)
                try:
                    self._say_waiting(self._look())
                except CheckpointError as error:  # a bucket that does not answer will again
                    self._say_once(f"{message(error)}; looking again every {self.interval:g} s")
                if len(self.verdicts) > count:
                    last = time.monotonic()
                    self._write_page(live=True)
                if until_idle is not None and time.monotonic() - last >= until_idle:
                    return self.verdicts
                time.sleep(self.interval)
        finally:
            self._write_page(live=False)

    def _look(self) -> list[Arrival]:
        """Read what is whole and new; what is not whole yet comes back."""
        there = self._arrivals.look(self._done)
        for each in there:
            if each.waits_for is None:
                self._take(each)
        return [each for each in there if each.waits_for is not None]

    def _take(self, arrival: Arrival) -> None:
        """One checkpoint: read unless that is done, judged unless that is done."""
        finished = self._store.finished()
        job = self._job(arrival).as_stored(finished)
        left = job.without(finished)
        key = _key(arrival.name, job)
        if left.reads:
            execute_jobs([left], self.out, True, self.settings, [], "text", self.debug)
        self._done.add(arrival.name)
        if not left.reads and self._earlier.get(arrival.name) == key:
            return  # it was told of before
        asked = self.out, self.name, arrival.name, self.reads, self.gate, self.baseline
        verdict = verdict_of(*asked)
        if verdict.error is not None and self._is_gone(arrival.name):
            verdict = verdict_of(*asked, deleted=True)
        news = verdict.alarms() - self._told_alarms()
        self.verdicts.append(verdict)
        self.told(verdict)
        if news:
            self._run_command(verdict)
        self._earlier[arrival.name] = key
        self._documents[arrival.name] = asdict(verdict)
        self._keep()
        if time.monotonic() - self._page_written > _PAGE_SECONDS:
            self._write_page(live=True)

    def _is_gone(self, name: str) -> bool:
        try:
            return not self._arrivals.has(name)
        except CheckpointError:  # of a bucket that does not answer nothing is known
            return False

    def _told_alarms(self) -> set[tuple[str, str, str | None]]:
        """What was wrong with the last checkpoint, and with the last that could be judged, by whatever process."""
        known = [Verdict.stored(each) for each in self._documents.values()]
        judged = [each for each in known if each.comparisons]
        return set().union(*(each.alarms() for each in (*known[-1:], *judged[-1:])))

    def _job(self, arrival: Arrival) -> ModelJob:
        """The reads of one checkpoint, as `deadbench run` would make them of the folder."""
        model = self._model or self._opened(arrival.name)
        named = model.model_copy(update={"checkpoints": [arrival.name]})
        registry = self.registry[0].model_copy(update={"models": [named]})
        jobs = build_jobs(
            registry, self.registry[1], [self.name], None, self.reads, self.overrides, every_checkpoint=True
        )
        if unfit := all_unfit(jobs):
            raise JobError(unfit)
        if self.settings.address == NO_RAY:
            jobs = in_one_process(jobs)
        (job,), problems = place_jobs(jobs, self.cluster)
        for problem in problems:
            self._say_once(problem)
        return job

    def _opened(self, name: str) -> Model:
        """The model, by its first checkpoint that can be opened."""
        called = {"id": self.name}
        try:
            self._model = own_model(Series(self.place, (name,), ""), self.overrides).model_copy(update=called)
            return self._model
        except JobError:  # its reads are failed rows that say why
            return Model.model_construct(id=self.name, source=self.place, modality="text")

    def _run_command(self, verdict: Verdict) -> None:
        """The user's command with the verdict on its stdin; what comes of it is said, and ends nothing."""
        if self.on_break is None:
            return
        command = shlex.split(self.on_break)
        try:
            told = json.dumps(asdict(verdict))
            done = subprocess.run(  # stdout is for data
                command, input=told, text=True, check=False, stdout=_STDERR, timeout=COMMAND_SECONDS
            )
        except OSError as error:
            self.say(f"--on-break {command[0]}: cannot be run ({message(error)})")
        except subprocess.TimeoutExpired:
            self.say(f"--on-break {command[0]}: ended after {COMMAND_SECONDS:g} s")
        else:
            self.say(f"--on-break {command[0]}: exit code {done.returncode}")

    def _say_waiting(self, waiting: list[Arrival], otherwise: str | None = None) -> None:
        few = [f"{each.name} (lacks {each.waits_for})" if not each.settling else f"{each.name} ({each.waits_for})"
               for each in waiting[:_SHOWN]]  # fmt: skip
        more = f" and {len(waiting) - _SHOWN} more" if len(waiting) > _SHOWN else ""
        what = f"waiting for the {'next' if self._done else 'first'} checkpoint" if otherwise is None else otherwise
        if waiting:
            what = f"waiting for {', '.join(few)}{more}"
        self._say_once(f"{shown_place(self.place)}: {len(self._done)} read; {what}")

    def _say_once(self, line: str) -> None:
        if line != self._said:
            self.say(plain(scrubbed(line), MAX_LINE))
            self._said = line

    def _write_page(self, *, live: bool) -> None:
        """The page, whole; one that cannot be written ends nothing."""
        self._page_written = time.monotonic()
        documents = sorted(self._documents.values(), key=lambda each: (each["step"] is None, each["step"] or 0))
        try:
            page = training_page(
                self.out,
                self.name,
                documents,
                gate=self.gate,
                baseline=self.baseline[1].reads if self.baseline else None,
                refresh=self.interval if live else None,
            )
            if self.report is not None:
                write_whole(self.report, page.encode())
            else:
                self._store.write_text("report.html", page)
        except OSError as error:
            self._say_once(f"the report cannot be written ({message(error)})")

    def _stored(self) -> dict[str, str]:
        """What was said of which checkpoint before, by its name: what it was said of."""
        self._documents: dict[str, dict[str, Any]] = {}
        self._others: dict[str, Any] = {}  # what was watched into the same result set
        text = self._store.read_text(VERDICTS)
        if text is None:
            return {}
        try:
            stored = json.loads(text)
            mine = stored["models"].get(self.name, {})
            self._documents = {name: asdict(Verdict.stored(each["verdict"])) for name, each in mine.items()}
            self._others = {name: each for name, each in stored["models"].items() if name != self.name}
            return {name: str(each["of"]) for name, each in mine.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"--out {self.out}: {VERDICTS} is no record of a watch; move it away") from error

    def _keep(self) -> None:
        mine = {name: {"of": self._earlier[name], "verdict": each} for name, each in self._documents.items()}
        models = self._others | {self.name: mine}
        try:
            self._store.write_text(VERDICTS, json.dumps({"watch_version": _VERSION, "models": models}, indent=1))
        except Exception as error:  # a store raises the errors of its own library
            self._say_once(f"{VERDICTS} cannot be written ({message(error)})")


def _key(name: str, job: ModelJob) -> str:
    """What a verdict is of: the reads, and what they opened."""
    return json.dumps([name, [[read.read, read.protocol_hash, read.fingerprint] for read in job.reads]])
