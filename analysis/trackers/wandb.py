"""Weights & Biases: one run a series of a project; offline too (WANDB_MODE=offline, then `wandb sync`).

What an offline run holds cannot be asked for, so what was logged is kept beside the results, in `_logged/wandb.json`.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import wandb

from deadbench.analysis.trackers.curves import Series
from deadbench.suite.storage import open_place, write_whole

_LEDGER = "_logged/wandb.json"
_STEP, _TOKENS = "checkpoint_step", "tokens_seen"


def log(series: Sequence[Series], project: str, results: str) -> int:
    """Log what `project` (`PROJECT` or `ENTITY/PROJECT`) was not yet given of `series`; returns how many values.

    A metric is over the column `checkpoint_step`; `tokens_seen` stands beside it where known.

    Raises:
        wandb.errors.Error: not logged in, no network, or the server refuses.
        OSError: `results` cannot be written.
    """
    ledger = _Ledger(results)
    written = 0
    for each in series:
        known = ledger.steps(project, each.name)
        new = [point for point in each.points if point.step not in known]
        if not new:
            continue
        with _run(project, each) as run:
            for point in new:
                tokens = {} if point.tokens is None else {_TOKENS: point.tokens}
                run.log({_STEP: point.step, **tokens, **point.values})
        ledger.add(project, each.name, [point.step for point in new])
        written += sum(len(point.values) for point in new)
    return written


@contextlib.contextmanager
def _run(project: str, series: Series) -> Any:
    entity, _, name = project.rpartition("/")
    run = wandb.init(
        entity=entity or None,
        project=name,
        id=hashlib.sha256(f"{project}\0{series.name}".encode()).hexdigest()[:16],
        name=series.name[:128],
        group=series.model[:128],
        resume="allow",
        reinit="create_new",
        config={"model": series.model, "series": series.name},
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True),
    )
    try:
        run.define_metric(_STEP)
        run.define_metric(_TOKENS)
        run.define_metric("*", step_metric=_STEP)
        yield run
    finally:
        run.finish()


class _Ledger:
    """Which steps of which series a project was given."""

    def __init__(self, results: str):
        self._filesystem, folder = open_place(results)
        self._path = f"{folder}/{_LEDGER}"
        self._given: dict[str, dict[str, list[int]]] = {}
        with contextlib.suppress(FileNotFoundError):
            self._given = json.loads(self._filesystem.cat_file(self._path))

    def steps(self, project: str, series: str) -> set[int]:
        return set(self._given.get(project, {}).get(series, []))

    def add(self, project: str, series: str, steps: list[int]) -> None:
        self._given.setdefault(project, {})[series] = sorted(self.steps(project, series) | set(steps))
        self._filesystem.makedirs(self._path.rpartition("/")[0], exist_ok=True)
        write_whole(self._path, json.dumps(self._given, indent=1).encode(), self._filesystem)
