"""What a census worker does: the parameters-only read of one source after another, by the atlas, without torch.

A source that cannot be read is a row with its error. What a host says of its limits is heard by all workers.
"""

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from deadbench.runners.results.versions import versions
from deadbench.suite.checkpoints.adapters import open_checkpoint
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.rate_limits import LIMITS
from deadbench.suite.checkpoints.sources import identify
from deadbench.suite.checkpoints.training_steps import checkpoint_step
from deadbench.suite.errors import one_line
from deadbench.suite.patience import Patience
from deadbench.suite.read_specs import READ_SPECS
from deadbench.suite.reads.parameters import ParametersRead, read_parameters
from deadbench.suite.schema import Row, to_table
from deadbench.suite.secrets import shown_place

PROTOCOL = "census"  # less than `run --reads parameters` stores: no norms but the final one, no count of parameters
PROTOCOL_HASH = hashlib.sha256(
    json.dumps({"read": "parameters", "protocol": PROTOCOL, "version": READ_SPECS["parameters"].version}).encode()
).hexdigest()[:12]
Given = tuple[dict[str, Any] | None, str | None]  # a configuration and a model type, for sources that have none
# A census has time: a limit is waited for, not reported; but not for days, nor for long where a host gives nothing.
_LONGEST_WAIT_SECONDS, _REFUSALS, _WAITED_SECONDS = 900.0, 1000, 7200.0
# By an answer. The Hub gives all who have no token 500 in five minutes: a worker of a hundred has five of them.
_EARNED_SECONDS = 60.0


class PauseBoard:
    """Where workers on any node tell each other which hosts want to be left alone; an actor."""

    def __init__(self) -> None:
        self._pauses: list[tuple[str, float]] = []  # host, until when
        self._news = asyncio.Condition()

    async def tell(self, host: str, seconds: float) -> None:
        """A host wants nobody to ask for so long."""
        async with self._news:
            self._pauses.append((host, time.monotonic() + seconds))
            self._news.notify_all()

    async def hear(self, known: int) -> list[tuple[str, float]]:
        """The pauses after the first `known`, as (host, seconds left), as soon as there are any."""
        async with self._news:
            await self._news.wait_for(lambda: len(self._pauses) > known)
            return [(host, until - time.monotonic()) for host, until in self._pauses[known:]]


class CensusWorker:
    """Reads batches of sources, as Ray Data calls it: a column `source` and their `place` in, rows of `reads` out."""

    def __init__(self, run_id: str, threads: int, board: Any, given: Given):
        """Read `threads` sources at once; `board` is the actor `PauseBoard`."""
        self._run_id, self._given = run_id, given
        self._threads = ThreadPoolExecutor(threads)
        LIMITS.longest_wait, LIMITS.attempts = _LONGEST_WAIT_SECONDS, _REFUSALS
        LIMITS.told = Patience(_LONGEST_WAIT_SECONDS, _WAITED_SECONDS, _WAITED_SECONDS, _EARNED_SECONDS, None)
        LIMITS.on_pause = lambda host, seconds: board.tell.remote(host, seconds)
        threading.Thread(target=listen, args=(board, LIMITS.pause), daemon=True).start()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The rows of a batch, in its order."""
        columns = (batch[name].to_pylist() for name in ("source", "place"))
        return to_table("reads", list(self._threads.map(self._read, *columns)))

    def _read(self, source: str, place: str) -> Row:
        return census_row(source, place, self._run_id, self._given)


def census_row(source: str, place: str, run_id: str, given: Given = (None, None)) -> Row:
    """The row of `reads` of one source, of which `locate` says `place`; never raises for what a source holds."""
    started_at = datetime.now(UTC)
    measured: Row
    try:
        config, model_type = given
        checkpoint = open_checkpoint(source, place=place, config=config, model_type=model_type)
        read = read_parameters(checkpoint)
        if read.final.family == "undetermined":
            raise ValueError(f"the final norm cannot be determined: {read.reason}")
        measured = read.columns() | checkpoint.origin()
        measured |= {"status": "ok", "error": read.reason, "dtype": read.stored_dtype}
        measured["source_fingerprint"] = checkpoint.fingerprint(_opened(checkpoint, read))
    except Exception as error:  # hostile files find what nobody foresaw; a census goes on
        measured = failure(error)
    known = outline(source, place, run_id) | measured
    known["checkpoint_step"] = (
        known.get("source_step") if known["checkpoint_step"] is None else known["checkpoint_step"]
    )
    return known | {"started_at": started_at, "finished_at": datetime.now(UTC)}


def outline(source: str, place: str, run_id: str) -> Row:
    """What is known of a source's row before it is read."""
    model, revision = identify(source, place)
    return {
        "run_id": run_id,
        "model": model,
        "revision": revision,
        "read": "parameters",
        "seed": 0,
        "protocol_hash": PROTOCOL_HASH,
        "engine": None,
        "source": shown_place(source),
        "checkpoint_step": checkpoint_step(revision or model.rsplit("/", 1)[-1]),
        "protocol": PROTOCOL,
        "versions": versions(),
        "attempt": 1,
    }


def failure(error: BaseException | str) -> Row:
    """Status and one-line error of a source that could not be read."""
    return {"status": "failed", "error": error if isinstance(error, str) else one_line(error)}


def _opened(checkpoint: Checkpoint, read: ParametersRead) -> set[str]:
    """The files that decided the answer."""
    files = {entry.file for entry in read.entries.values()}
    return files | ({"config.json"} if checkpoint.has("config.json") else set())


def listen(board: Any, pause: Callable[..., None]) -> None:
    """Take over the pauses that others heard of, until the board is gone."""
    import ray

    known = 0
    while True:
        try:
            news = ray.get(board.hear.remote(known))
        except ray.exceptions.RayError:
            return
        known += len(news)
        for host, seconds in news:
            pause(host, seconds, heard=False)
