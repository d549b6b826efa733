"""`deadbench census`: the parameters-only read over thousands of sources on Ray Data, streaming, resumable.

The driver alone writes, what has come in every few seconds, each file whole. A source is finished when its `ok` row is
there; nothing else is remembered, so a census can be killed at any time and given again.
"""

import logging
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from deadbench.runners.census.worker import PROTOCOL_HASH, CensusWorker, Given, PauseBoard, failure, listen, outline
from deadbench.runners.results.outbox import PATIENCE_SECONDS, Outbox, UnwritableError
from deadbench.runners.results.store import ResultStore
from deadbench.suite.checkpoints.sources import identify, locate
from deadbench.suite.errors import message
from deadbench.suite.plain_text import plain
from deadbench.suite.schema import arrow_schema, to_table
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import is_hidden, is_local, open_place, read_file

_BLOCK = 16  # sources that one task reads
_TASKS = 4  # that a worker has at once: a slow source holds up its block, not the worker
_MOST_LETTERS = 4096  # of a source; a path has no more
_MOST_BYTES = 256_000_000  # of a file of sources: some millions
_WRITE_ROWS, _WRITE_SECONDS = 2000, 5.0
_TOLD_SECONDS = 60.0  # between two lines that tell of the same host
_COUNTED = ["model", "revision", "source", "status", "family", "error"]


class CensusError(ValueError):
    """A file of sources that cannot be used; one line, exit code 2."""


@dataclass
class Outcome:
    """What a census came to, so far."""

    run_id: str
    total: int
    ok: int = 0
    failed: int = 0
    skipped: int = 0
    families: Counter[str] = field(default_factory=Counter)
    errors: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0


def list_sources(file: str) -> list[str]:
    """The sources that a text file (a path or fsspec URI) names, one a line.

    Blank lines, `#` comments and names that begin with a dot are left out.

    Of two spellings of one checkpoint the first stays.

    Raises:
        CensusError: it cannot be read, is not text, or names nothing.
    """
    shown = shown_place(file)
    try:
        fs, path = open_place(file)
        told = read_file(Path(path), _MOST_BYTES) if is_local(fs) else fs.cat_file(path, end=_MOST_BYTES + 1)
        if len(told) > _MOST_BYTES:
            raise OSError(f"more than {_MOST_BYTES:,} bytes")
        lines = told.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CensusError(f"{shown}: not UTF-8 text; give a file with one SOURCE a line") from error
    except (OSError, ValueError, ImportError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else message(error, None)
        raise CensusError(f"{shown}: cannot be read ({reason}); give a file with one SOURCE a line") from error
    sources: dict[tuple[str, str | None], str] = {}
    different: dict[str, int] = {}  # a line that comes again is not looked up again
    for number, line in enumerate(lines, 1):
        different.setdefault(line, number)
    for line, number in different.items():
        source = line.partition(" #")[0].strip()
        if not source or source.startswith("#") or is_hidden(source):
            continue
        if len(source) > _MOST_LETTERS:
            raise CensusError(
                f"{shown}:{number}: a line of {len(source):,} letters, at most {_MOST_LETTERS}; give one SOURCE a line"
            )
        if not source.isprintable():
            raise CensusError(f"{shown}:{number}: not printable text; give a file with one SOURCE a line")
        sources.setdefault(identify(source), source)
    if not sources:
        raise CensusError(f"{shown}: names no sources; give one SOURCE a line")
    return list(sources.values())


def unfinished(sources: list[str], store: ResultStore) -> list[str]:
    """The sources whose `ok` row is not in the store."""
    done = {(model, revision) for model, revision, _, _, hash, *_ in store.finished() if hash == PROTOCOL_HASH}
    return [source for source in sources if identify(source) not in done]


def new_outcome(total: int, skipped: int) -> Outcome:
    """An outcome of nothing yet."""
    return Outcome(f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}", total, skipped=skipped)


def take_census(
    sources: list[str],
    store: ResultStore,
    outcome: Outcome,
    threads: int,
    given: Given = (None, None),
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Outcome]:
    """Read all `sources` on the Ray that is joined; yields the outcome each time that rows have come in.

    Which hosts limit requests is told to `say`, of each once a minute at most.

    Sources whose process died are read again, each by itself; who dies again is a failed row.

    What cannot be written is kept and tried again, which is told by `say`.

    Raises:
        UnwritableError: it could not be for too long.
    """
    import ray

    started = time.monotonic()
    places = {source: locate(source) for source in sources}
    left = {identify(source, places[source]): source for source in sources}
    board = ray.remote(num_cpus=0)(PauseBoard).remote()
    threading.Thread(target=listen, args=(board, _Pauses(say).tell), daemon=True).start()
    writer = _Writer(store, say)
    try:
        for block in (_BLOCK, 1):
            arguments = (outcome.run_id, threads, board, given)
            for table in (
                _stream({source: places[source] for source in left.values()}, block, arguments) if left else ()
            ):
                writer.add(table)
                rows = table.select(_COUNTED).to_pylist()
                for row in rows:
                    left.pop((row["model"], row["revision"]), None)
                yield _count(outcome, rows, started)
        if left:
            now = {"started_at": datetime.now(UTC), "finished_at": datetime.now(UTC), "attempt": 2}
            died = failure("the process that read it died twice (killed, crashed or out of memory)")
            rows = [outline(source, places[source], outcome.run_id) | now | died for source in left.values()]
            writer.add(to_table("reads", rows))
            yield _count(outcome, rows, started)
        writer.drain()
    finally:
        with suppress(UnwritableError):
            writer.flush()
        ray.kill(board)


class _Pauses:
    """Hosts that want to be left alone, as a person is told of them."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._told = say, dict[str, float]()

    def tell(self, host: str, seconds: float, **_: object) -> None:
        now = time.monotonic()
        if now - self._told.get(host, -_TOLD_SECONDS) >= _TOLD_SECONDS:
            self._told[host] = now
            name = plain(host)
            self._say(f"{name} limits requests: nobody asks it for {seconds:.0f} s; sources elsewhere go on")


def _stream(places: dict[str, str], block: int, arguments: tuple[Any, ...]) -> Iterator[pa.Table]:
    """Tables of the rows of sources, by where they are, as Ray Data finishes them, in whatever order."""
    import ray
    from ray.util.annotations import RayDeprecationWarning

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # what a dead process took with it is read again
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    blocks = -(-len(places) // block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # without a successor for max_task_retries, in 2.60
        read = ray.data.from_items(
            [{"source": source, "place": place} for source, place in places.items()], override_num_blocks=blocks
        ).map_batches(
            CensusWorker,
            fn_constructor_args=arguments,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=min(workers, blocks),
                max_tasks_in_flight_per_actor=2 * _TASKS,
                max_concurrent_calls_per_actor=_TASKS,
                enable_true_multi_threading=True,
            ),
            ray_remote_args_fn=_actor_options,
        )
    yield from read.iter_batches(batch_size=None, batch_format="pyarrow")


def _actor_options() -> dict[str, Any]:
    """A process that dies comes again; what it was at does not, or one source could kill process after process."""
    return {"num_cpus": 1, "max_restarts": -1, "max_task_retries": 0}


def _count(outcome: Outcome, rows: list[dict[str, Any]], started: float) -> Outcome:
    for row in rows:
        if row["status"] == "ok":
            outcome.ok += 1
            outcome.families[row["family"]] += 1
        else:
            outcome.failed += 1
            outcome.errors.append({"source": row["source"], "error": row["error"]})
    outcome.seconds = time.monotonic() - started
    return outcome


@dataclass(frozen=True)
class _Rows:
    """What came in a few seconds, which is stored together."""

    tables: dict[str, pa.Table]


class _Writer:
    """Rows on their way to the store: a file for what came in a few seconds, not one for each source."""

    def __init__(self, store: ResultStore, say: Callable[[str], None]):
        self._outbox, self._since = Outbox[_Rows](store, say, PATIENCE_SECONDS), time.monotonic()
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table.cast(arrow_schema("reads")))
        late = time.monotonic() - self._since > _WRITE_SECONDS
        if late or sum(each.num_rows for each in self._waiting) >= _WRITE_ROWS:
            self.flush()

    def flush(self) -> None:
        tables, self._waiting, self._since = self._waiting, [], time.monotonic()
        if tables:
            self._outbox.put(_Rows({"reads": pa.concat_tables(tables)}))
        else:
            self._outbox.flush()

    def drain(self) -> None:
        self.flush()
        self._outbox.drain()
