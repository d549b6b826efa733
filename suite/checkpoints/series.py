"""A folder of checkpoints is a series: which of the folders in it are checkpoints, and in which order they were saved.

A checkpoint of a series is a folder whose name tells a training step (`checkpoint-7`, `global_step7`, `iter_7`, …) or
an epoch, or beside whose weights a Trainer wrote the step down; or, where no folder is one, a file of such a name.
Folders that just lie beside each other are no series.
"""

import json
import os
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.no_weights import ADAPTER_FILE
from deadbench.suite.checkpoints.opening import list_revisions
from deadbench.suite.checkpoints.shard_names import shard_of
from deadbench.suite.checkpoints.sources import locate
from deadbench.suite.checkpoints.strict_json import MAX_JSON_BYTES
from deadbench.suite.checkpoints.training_steps import LARGEST_STEP, checkpoint_step, epoch_of, steps_told
from deadbench.suite.checkpoints.weight_files import may_be_weights
from deadbench.suite.errors import CheckpointError
from deadbench.suite.plain_text import MAX_LINE, plain
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import is_url, read_file

_PASSING = re.compile(r"^tmp[-_]|[._-](tmp|temp|partial|incomplete)$", re.IGNORECASE)  # names until it is done
_VARIANT = re.compile(r"-v\d+(?=\.ckpt$)")  # of Lightning, which saved at a step before
_WEIGHTS = re.compile(r"(pytorch_model.*\.bin|.*\.(safetensors|gguf))")
_SHOWN = 4
_UNTOLD = "its name tells no step"
_UNNAMED = "its name is not UTF-8, which no table takes; rename it"


@dataclass(frozen=True)
class Series:
    """The checkpoints of one training run, in training order.

    Attributes:
        source: the folder that holds them, as it was given.
        names: the folders in it.
        order: by what they are in that order.
        left_out: folders beside them that are none of it, and why.
    """

    source: str
    names: tuple[str, ...]
    order: str
    left_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder, spelled in one way only."""
        if is_url(self.source):
            return self.source.rstrip("/")
        normal = os.path.normpath(self.source)
        return normal if os.path.basename(normal) not in ("", ".", "..") else Path(normal).resolve().name

    def sources(self) -> list[str]:
        """Each checkpoint as a SOURCE of its own, in training order."""
        above = self.source.rstrip("/") if is_url(self.source) else os.path.normpath(self.source)
        return [name if above == "." else f"{above}/{name}" for name in self.names]

    def told(self) -> str:
        """For people, in one line."""
        count = "1 checkpoint" if len(self.names) == 1 else f"{len(self.names)} checkpoints"
        few = len(self.names) <= _SHOWN
        names = ", ".join(self.names) if few else f"{self.names[0]}, {self.names[1]}, …, {self.names[-1]}"
        without = f"; left out: {', '.join(self.left_out[:_SHOWN])}" if self.left_out else ""
        without += f" and {len(self.left_out) - _SHOWN} more" if len(self.left_out) > _SHOWN else ""
        return plain(f"{shown_place(self.name)}: a series of {count}, {self.order}: {names}{without}", MAX_LINE)


def series_in(source: str, base: Path | None = None, *, beside_weights: bool = False) -> Series | None:
    """The checkpoints below `source`; None where it holds no series, or cannot be listed.

    What has weights of its own is a checkpoint, and its series counts only where it may lie `beside_weights`.
    """
    place = locate(source, base)
    if not (os.path.isabs(place) or is_url(place)) or place.startswith(("hf://", "http://", "https://")):
        return None  # the Hub's branches are listed by the registry; a web server's folders cannot be
    try:
        there = Checkpoint(source, base=base, place=place).names()
        files = [name for name in there if may_be_weights(name) and not shard_of(name)]
        saved = _steps(place, files)
        saved = saved if len(saved) > 1 else {}  # one alone is the folder's weights
        if not beside_weights and any(_WEIGHTS.fullmatch(name) and name not in saved for name in there):
            return None
        folders = list_revisions(source, base)
    except (CheckpointError, OSError):
        return None  # which opening it will say
    steps = _steps(place, folders)
    if not steps:
        return _ordered(source, saved, dict.fromkeys((name for name in files if name not in saved), _UNTOLD))
    left_out = {name: "still being written, by its name" for name in steps if is_passing(name)}
    whole = [name for name in folders if name not in left_out and _has_config(source, name, base, place)]
    left_out |= {name: "no config.json in it" for name in steps if name not in (*left_out, *whole)}
    left_out |= {name: _UNTOLD for name in whole if name not in steps}
    return _ordered(source, {name: step for name, step in steps.items() if name not in left_out}, left_out)


def gathered(names: Sequence[str], known: Container[str] = ()) -> list[str | Series]:
    """`names` in their order, with folders of checkpoints, and two or more checkpoints of one folder, as series.

    Those that are `known` mean something else.
    """
    siblings: dict[str, list[str]] = {}
    unknown = [name for name in names if name not in known]
    places = {name: os.path.normpath(place) for name in unknown if os.path.isabs(place := locate(name))}
    for name, place in places.items():
        siblings.setdefault(os.path.dirname(place), []).append(name)
    of: dict[str, Series] = {}
    for folder, given in siblings.items():
        steps = _steps(folder, sorted({os.path.basename(places[name]) for name in given}))
        source = os.path.dirname(os.path.normpath(given[0])) or "."
        series = _ordered(source, steps, {}) if len(steps) > 1 else None
        if series is not None:
            of |= {os.path.join(folder, name): series for name in series.names}
    found = {name: of.get(places.get(name, "")) or series_in(name) or name for name in unknown}
    return list(dict.fromkeys(found.get(name, name) for name in names))


def trainer_step(folder: Path) -> int | None:
    """`global_step` of the `trainer_state.json` that transformers' Trainer leaves in a local checkpoint."""
    return _trainers_count(folder, "global_step")


def trainer_tokens(folder: Path) -> int | None:
    """`num_input_tokens_seen` of the same; 0 is what a Trainer writes that was not told to count them: None."""
    return _trainers_count(folder, "num_input_tokens_seen") or None


def tells_place(name: str) -> bool:
    """Whether a name tells a place in training that is no step: an epoch."""
    return epoch_of(name) is not None


def cannot_be_stored(name: str) -> str | None:
    """Why no row can name a checkpoint so; None: one can."""
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of a file system that are no letters
        return _UNNAMED
    return None


def is_passing(name: str) -> bool:
    """Whether a checkpoint has this name only until it is whole."""
    return _PASSING.search(name) is not None


def in_training_order(steps: Mapping[str, int | None]) -> list[str]:
    """Names by their steps; those without one last, in their natural order."""
    return sorted(steps, key=lambda name: (steps[name] is None, steps[name] or 0, _natural(name)))


def _trainers_count(folder: Path, key: str) -> int | None:
    try:
        count = json.loads(read_file(folder / "trainer_state.json", MAX_JSON_BYTES))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # it is no Trainer's, or not here
    return count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= LARGEST_STEP else None


def _steps(place: str, folders: Sequence[str]) -> dict[str, int | None]:
    """Training step, where one is known, of those of `folders` in `place` that are checkpoints of a series."""
    steps: dict[str, int | None] = {}
    for name, told in steps_told(folders).items():
        step = told
        if step is None and os.path.isabs(place):
            step = trainer_step(Path(place, name))
        if step is not None or tells_place(name):
            steps[name] = step
    return steps


def _has_config(source: str, name: str, base: Path | None, place: str) -> bool:
    try:
        folder = Checkpoint(source, name, base, place)
        return folder.has("config.json") or folder.has(ADAPTER_FILE)
    except CheckpointError:
        return False


def _ordered(source: str, steps: Mapping[str, int | None], left_out: Mapping[str, str]) -> Series | None:
    """The series of `steps`; None where it is none: no checkpoint, or those of several runs in one folder."""
    without = dict(left_out) | {name: why for name in steps if (why := cannot_be_stored(name))}
    steps = {name: step for name, step in steps.items() if name not in without}
    taken: dict[int, str] = {}
    for name in sorted(steps, key=lambda name: (checkpoint_step(name) is None, _natural(name))):
        step = steps[name]
        if step is None:
            continue
        first = taken.setdefault(step, name)
        if first == name or _shape(first) == _shape(name):
            continue
        if checkpoint_step(name) is not None:
            return None
        without[name] = f"step {step} is {first}"  # `best`, `latest`: a copy, or a link
    names = [name for name in steps if name not in without]
    if not names:
        return None
    names = in_training_order({name: steps[name] for name in names})
    unknown = sum(steps[name] is None for name in names)
    by_trainer = any(steps[name] is not None and checkpoint_step(name) is None for name in names)
    written = " (of trainer_state.json)" if by_trainer else ""
    order = f"by step{written}"
    if unknown:
        anew = any(steps[name] is None and checkpoint_step(name) is not None for name in names)
        why = "whose steps begin anew in each epoch" if anew else "which tell no step"
        order = f"in the natural order of their names, {why}"
        order = order if unknown == len(names) else f"by step where one is known{written}, then {order}"
    return Series(source, tuple(names), order, tuple(f"{name} ({why})" for name, why in without.items()))


def _shape(name: str) -> str:
    """A name without its numbers: what the checkpoints of one run share."""
    return re.sub(r"\d+", "#", _VARIANT.sub("", name))


def _natural(name: str) -> list[str | int]:
    """A key by which numbers in names are ordered as numbers: text and number in turn."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]
