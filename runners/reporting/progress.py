"""What a person sees while models run: a live table on a terminal, plain lines elsewhere. All on stderr."""

import time
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from deadbench.runners.jobs.events import Finished, Progress
from deadbench.runners.jobs.job import ModelJob, ReadJob
from deadbench.suite.plain_text import MAX_LINE, plain

_HEADERS = ("model", "phase", "done", "rate", "GPU memory", "left")
_TOLD_SECONDS = 60.0  # between two lines of one model where there is no terminal


@dataclass
class _Line:
    progress: Progress
    since: float = field(default_factory=time.monotonic)
    counted: str | None = None
    counted_since: float = field(default_factory=time.monotonic)
    counted_from: float = 0
    told: float = field(default_factory=time.monotonic)

    def moved(self, event: Progress) -> None:
        if event.total and event.phase != self.counted:  # a checkpoint, which counts nothing, begins nothing anew
            self.counted, self.counted_since, self.counted_from = event.phase, time.monotonic(), event.done
        self.progress = event

    def per_second(self) -> float | None:
        """Tokens or blocks of this phase; None where it has no count yet."""
        seconds, done = time.monotonic() - self.counted_since, self.progress.done - self.counted_from
        return done / seconds if self.progress.total and done > 0 and seconds > 0 else None

    def seconds_left(self) -> float | None:
        """Of this phase, at this rate."""
        rate = self.per_second()
        return (self.progress.total - self.progress.done) / rate if rate else None

    def due(self) -> bool:
        """Whether it is time for another line on how far it is, which there is where one can say how long it takes."""
        return self.seconds_left() is not None and time.monotonic() - self.told >= _TOLD_SECONDS


class Reporter:
    """Shows what happens in a run; a context manager. What is said here can be read by people."""

    def __init__(self, total_reads: int, *, debug: bool = False):
        self._console = Console(stderr=True, highlight=False)
        self._debug, self._total, self._done = debug, total_reads, 0
        self._lines: dict[str, _Line] = {}
        self._at: dict[str, Progress] = {}
        self._live: Live | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """One plain line."""
        self._print(plain(text, MAX_LINE))

    def _print(self, line: str) -> None:
        self._console.print(escape(line), soft_wrap=True)

    def run_started(self, run_id: str, num_models: int) -> None:
        """A run begins."""

    def model_started(self, job: ModelJob, attempt: int, nodes: list[str], devices: float) -> None:
        """A model was given its place: nodes, and how many devices."""

    def progress(self, model_id: str, event: Progress) -> None:
        """A model moved on."""
        self._at[model_id] = event
        line = self._lines.get(model_id)
        if line is None or line.progress.label != event.label:
            self._lines[model_id] = _Line(event)
            if self._live is None:
                self.say(f"{event.label}: {event.phase}")
        else:
            line.moved(event)
            if self._live is None and line.due():
                line.told = time.monotonic()
                left = duration(line.seconds_left() or 0.0)
                self.say(f"{event.label}: {event.phase}, {_count(event)}, about {left} left")

    def finished(self, event: Finished) -> None:
        """A read is over, and in the results."""
        self._done += 1
        line = self._lines.get(event.job.model.id)
        seconds = f" in {time.monotonic() - line.since:.1f} s" if line else ""
        row = event.row
        outcome = f"failed: {row['error']}" if row["status"] == "failed" else _headline(row)
        self._outcome(event.job.label(), f"{outcome}{seconds}")
        if self._debug and event.traceback:
            for each in event.traceback.splitlines():
                self._print(each.replace("\x1b", "\\x1b"))

    def elsewhere(self, read: ReadJob, row: dict[str, Any]) -> None:
        """A read of this run that another run has stored."""
        self.stored(read.label(), row, by_another=True)

    def stored(self, label: str, row: dict[str, Any], *, by_another: bool) -> None:
        """A read that came to the results, by its outcome there."""
        self._done += 1
        if row["status"] != "ok":
            outcome = f"failed: {row['error']}{'; by another run' if by_another else ''}"
        elif by_another:
            outcome = "read by another run"
        else:
            outcome = "read" if row["depth"] is None else f"depth {row['depth']:.2f}"
        self._outcome(label, outcome)

    def _outcome(self, label: str, outcome: str) -> None:
        self.say(f"[{self._done}/{self._total}] {label}: {outcome}")

    def at(self) -> list[dict[str, Any]]:
        """Where the running models are, as their last `Progress` says it."""
        return [asdict(event) for event in list(self._at.values())]

    def retry(self, read: ReadJob, cause: str, attempt: int, changed: str | None) -> None:
        """A read of which a process died is tried again, with what `changed`."""
        self.say(f"{read.label()}: {cause}; attempt {attempt}{f', with {changed}' if changed else ''}")

    def gone(self, model_id: str) -> None:
        """A model's actor has ended."""
        self._at.pop(model_id, None)
        self._lines.pop(model_id, None)

    def run_ended(self, outcome: str, counts: dict[str, int]) -> None:
        """A run is over: finished, interrupted or stopped."""

    def _render(self) -> RenderableType:
        table = Table(*_HEADERS, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for line in list(self._lines.values()):
            table.add_row(*(escape(plain(cell)) for cell in _cells(line)))
        seconds = time.monotonic() - self._began
        left = f", about {duration(seconds * (self._total - self._done) / self._done)} left" if self._done else ""
        table.caption = f"{self._done} of {self._total} reads in {duration(seconds)}{left}"
        return table


def _cells(line: _Line) -> tuple[str, ...]:
    event, rate, left = line.progress, line.per_second(), line.seconds_left()
    return (
        event.label,
        event.phase,
        _count(event) if event.total else "-",
        "-" if rate is None else f"{rate:,.0f} tokens/s" if event.unit == "tokens" else f"{duration(1 / rate)} a block",
        f"{event.device_bytes / 1e9:.1f} GB" if event.device_bytes is not None else "-",
        duration(left) if left is not None else f"({duration(time.monotonic() - line.since)} so far)",
    )


def _count(event: Progress) -> str:
    """How far it is; of blocks with a tenth, since one can take minutes."""
    done = f"{event.done:,.0f}" if event.unit == "tokens" else f"{event.done:.1f}"
    return f"{done} of {event.total:,} {event.unit}"


def duration(seconds: float) -> str:
    """In hours, minutes or seconds: `1 h 05 min`, `2 min 03 s`, `7 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _headline(row: dict[str, Any]) -> str:
    if row["depth"] is not None:
        return f"{row['family']}, depth {row['depth']:.2f}, alignment {row['alignment']:.4f}"
    if row["final_norm"] is None:
        return f"no final norm ({row['error']})"
    if row["num_zero_scales"] is not None:
        return f"{row['family']}, {row['num_zero_scales']} zero scales"
    return f"{row['family']}, moved and put back"
