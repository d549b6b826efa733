"""A run as those see it who only read its result set: its record, the rows that come, its driver's signs of life."""

import time
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from deadbench.runners.jobs.events import Progress
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.reporting.run_record import read_record
from deadbench.runners.results.claims import BEAT_SECONDS, FOLDER, LEASE_SECONDS
from deadbench.runners.results.reader import DamagedError, ResultReader, StoreError
from deadbench.runners.results.signs_of_life import facts_of, has_died
from deadbench.suite.schema import KEY
from deadbench.suite.secrets import scrubbed
from deadbench.suite.storage import is_url

_LOOK_SECONDS = 2.0  # between two looks at a folder of this machine; at a remote place it is a beat
_PATIENCE_SECONDS = 600.0  # for which a place that does not answer is asked again
_MOST = 2**63  # which no count is
_LATEST = 50  # runs among which one that goes on is looked for

Ending = Literal["finished", "interrupted", "stopped", "gone"]


@dataclass(frozen=True)
class Followed:
    """What a run came to; `gone`: its driver gives no sign of life, and its record has no end."""

    run_id: str
    ending: Ending
    record: dict[str, Any]
    host: str

    def counts(self) -> dict[str, int]:
        """How many of its reads it made, failed at, and found made by other runs (of those failed, all)."""
        reads = self.record["reads"]
        others = sum(each["status"] == "ok" and "by" in each for each in reads)
        ok = sum(each["status"] == "ok" for each in reads) - others
        return {"ok": ok, "failed": sum(each["status"] == "failed" for each in reads), "by_others": others}


def latest_run(reader: ResultReader) -> str:
    """The run of a result set to follow: the newest that goes on, else the newest.

    Raises:
        ValueError: there is none, or the place cannot be read.
    """
    newest = None
    for run_id in reversed(reader.run_ids()[-_LATEST:]):
        try:
            record = _record(reader, run_id)
        except StoreError:
            raise
        except ValueError:  # somebody else's folder
            continue
        newest = newest or run_id
        if record["status"] == "running" and _beat(reader, run_id) is not None:
            return run_id
    if newest is None:
        raise ValueError(f"{reader.location}: no run has left its record here; give the --out of a run")
    return newest


def follow(location: str, run_id: str | None, kind: type[Reporter] = Reporter) -> Followed:
    """Tell of a run until it ends; of `run_id`, else of the latest one in the result set at `location`.

    Raises:
        ValueError: there is no such run, a file there is damaged, or the place cannot be read for longer than the
            patience.
        KeyboardInterrupt: the run does not notice.
    """
    reader = ResultReader(location)
    run_id = run_id or latest_run(reader)
    record = _record(reader, run_id)
    with kind(len(record["reads"])) as reporter:
        host = str(record.get("host") or "a machine")
        reporter.say(f"run {run_id} on {host}, started {record.get('started_at')}: {len(record['reads'])} reads")
        return _Watch(reader, run_id, host, record, reporter).go(
            _LOOK_SECONDS if not is_url(location) else BEAT_SECONDS
        )


class _Watch:
    """One run that is followed, and what of it was told."""

    def __init__(self, reader: ResultReader, run_id: str, host: str, record: dict[str, Any], reporter: Reporter):
        self._reader, self._run_id, self._host, self._record = reader, run_id, host, record
        self._reporter = reporter
        self._left = {_key(each) for each in record["reads"]}
        self._stored: dict[tuple[Any, ...], dict[str, Any]] = {}  # its reads' rows, as they came
        self._shown: set[str] = set()
        self._beat: bytes | None = None
        self._heard = self._answered = time.monotonic()
        self._doubted = False

    def go(self, pause: float) -> Followed:
        """Look every `pause` seconds."""
        while True:
            try:
                ending = self._look()
                self._answered = time.monotonic()
            except StoreError as error:
                if isinstance(error, DamagedError) or time.monotonic() - self._answered > _PATIENCE_SECONDS:
                    raise
                self._reporter.say(f"{error}; tried again")
                ending = None
            if ending is not None:
                return Followed(self._run_id, ending, self._record, self._host)
            time.sleep(pause)

    def _look(self) -> Ending | None:
        """What is new; the ending, if there is one."""
        beat, now = _beat(self._reader, self._run_id), time.monotonic()
        if beat != self._beat:
            self._beat, self._heard = beat, now
        facts = facts_of(beat)
        silent = beat is not None and (now - self._heard > LEASE_SECONDS or has_died(facts))
        if beat is None or silent:  # else it goes on, and its record has no news
            self._record = _record(self._reader, self._run_id)
        self._tell_rows()  # after the record: what that calls finished is there
        if (ending := self._record["status"]) in get_args(Ending):
            return ending  # type: ignore[no-any-return]
        if silent:
            self._count_rows()
            return "gone"
        self._tell_progress(facts.get("at"))
        if beat is None and now - self._heard > LEASE_SECONDS and not self._doubted:
            self._doubted = True
            self._reporter.say("its driver leaves no signs of life here: whether it goes on, only new rows will tell")
        return None

    def _tell_rows(self) -> None:
        started = _time(self._record.get("started_at"))
        for row in self._reader.come():
            ours = row["run_id"] == self._run_id
            if _key(row) in self._left and (ours or (row["finished_at"] and row["finished_at"] >= started)):
                self._left.discard(_key(row))
                self._stored[_key(row)] = row
                label = " ".join(part for part in (row["model"], row["revision"], row["read"]) if part)
                self._reporter.stored(label, row, by_another=not ours)

    def _count_rows(self) -> None:
        """Put what is stored into a record that its driver did not live to end."""
        for each in self._record["reads"]:
            if (row := self._stored.get(_key(each))) is not None and each["status"] == "planned":
                by = {} if row["run_id"] == self._run_id else {"by": row["run_id"]}
                each |= {"status": row["status"], "error": scrubbed(row["error"]) if row["error"] else None} | by

    def _tell_progress(self, at: Any) -> None:
        events = {event.label: event for each in (at if isinstance(at, list) else ()) if (event := _progress(each))}
        for label in self._shown - events.keys():
            self._reporter.gone(label)
        for label, event in events.items():
            self._reporter.progress(label, event)
        self._shown = {*events}


def _record(reader: ResultReader, run_id: str) -> dict[str, Any]:
    return read_record(reader.read_text(f"runs/{run_id}/run.json"), f"{reader.location}: run {run_id}")


def _beat(reader: ResultReader, run_id: str) -> bytes | None:
    text = reader.read_text(f"{FOLDER}/{run_id}.beat")
    return None if text is None else text.encode()


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _progress(told: Any) -> Progress | None:
    """What a sign of life says of one model; None where it is of another version."""
    names = {field.name for field in fields(Progress)}
    if not isinstance(told, dict) or told.keys() != names:
        return None
    counts = (told["done"], told["total"], told["device_bytes"] or 0)
    words = (told["label"], told["phase"], told["unit"])
    fits = all(isinstance(each, str) for each in words) and all(
        isinstance(each, (int, float)) and 0 <= each < _MOST for each in counts
    )
    return Progress(**told) if fits else None


def _time(told: Any) -> datetime:
    """A record's time; long ago where it is none."""
    try:
        time = datetime.fromisoformat(told)
    except (TypeError, ValueError):
        time = datetime.min
    return time if time.tzinfo else time.replace(tzinfo=UTC)
