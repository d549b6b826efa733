"""What a person sees while models run: one live line a model on a terminal, plain lines elsewhere. All on stderr."""

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from runners.events import Finished, Progress


@dataclass
class _Line:
    progress: Progress
    since: float = field(default_factory=time.monotonic)


class Reporter:
    """Shows events of running models; a context manager."""

    def __init__(self, total_reads: int, *, debug: bool = False):
        self._console = Console(stderr=True, highlight=False)
        self._debug, self._total, self._done = debug, total_reads, 0
        self._lines: dict[str, _Line] = {}
        self._live: Live | None = None

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
        self._console.print(escape(text), soft_wrap=True)

    def progress(self, model_id: str, event: Progress) -> None:
        """A model moved on."""
        line = self._lines.get(model_id)
        if line is None or line.progress.label != event.label:
            self._lines[model_id] = _Line(event)
            if self._live is None:
                self.say(f"{event.label}: {event.phase}")
        else:
            line.progress = event

    def finished(self, event: Finished) -> None:
        """A read is over."""
        self._done += 1
        line = self._lines.get(event.job.model.id)
        seconds = f" in {time.monotonic() - line.since:.1f} s" if line else ""
        row = event.row
        outcome = f"failed: {row['error']}" if row["status"] == "failed" else _headline(row)
        self.say(f"[{self._done}/{self._total}] {event.job.label()}: {outcome}{seconds}")
        if self._debug and event.traceback:
            self.say(event.traceback)

    def gone(self, model_id: str) -> None:
        """A model's actor has ended."""
        self._lines.pop(model_id, None)

    def _render(self) -> RenderableType:
        return Group(*(Text(_describe(line)) for line in self._lines.values()))


def _describe(line: _Line) -> str:
    event = line.progress
    counted = f" {event.done:,}/{event.total:,} tokens" if event.total else ""
    return f"{event.label}: {event.phase}{counted}, {time.monotonic() - line.since:.0f} s"


def _headline(row: dict[str, object]) -> str:
    if row["depth"] is not None:
        return f"{row['family']}, depth {row['depth']:.2f}, alignment {row['alignment']:.4f}"
    if row["final_norm"] is None:
        return f"no final norm ({row['error']})"
    if row["read"] == "functional":
        return f"{row['family']}, moved and put back"
    return f"{row['family']}, {row['num_zero_scales']} zero scales"
