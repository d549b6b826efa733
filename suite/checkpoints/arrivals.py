"""Checkpoints that appear while a training writes them: which are there, and which of them are whole.

Who writes a checkpoint writes for a while, and a half is not to be read. `FORMS` says, a line a form, how it is known
that one is whole: by what its framework writes last, or by the framework's pointer, which it moves when it is done;
where there is neither, by headers that are whole and by nothing changing from one look to the next.
"""

import contextlib
import os
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.fsspec_folder import one_line_errors
from deadbench.suite.checkpoints.no_weights import ADAPTER_FILE
from deadbench.suite.checkpoints.opening import list_revisions
from deadbench.suite.checkpoints.series import (
    cannot_be_stored,
    in_training_order,
    is_passing,
    tells_place,
    trainer_step,
)
from deadbench.suite.checkpoints.sources import hub_id_of, is_file_of
from deadbench.suite.checkpoints.strict_json import MAX_JSON_BYTES, parse_object
from deadbench.suite.checkpoints.training_steps import checkpoint_step, steps_told
from deadbench.suite.checkpoints.weight_files import has_weights
from deadbench.suite.errors import CheckpointError, message
from deadbench.suite.storage import file_pieces, is_hidden, is_local, is_url, open_place

_TRAINER, _TRACKER, _LATEST = "trainer_state.json", "latest_checkpointed_iteration.txt", "latest"
_BESIDE_TRAINER = {_TRAINER, "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
_FIRST_LOOK = "seen once; it is read when it has not changed by the next look"


@dataclass(frozen=True)
class Arrival:
    """A checkpoint that is there.

    Attributes:
        name: of the folder, file or branch.
        step: of training, None where nothing tells it.
        waits_for: what it lacks, for people; None: it is whole.
        settling: it lacks a second look alone.
    """

    name: str
    step: int | None
    waits_for: str | None = None
    settling: bool = False


@dataclass(frozen=True)
class _Found:
    """A checkpoint as one look finds it, beside the folder that it is in."""

    name: str
    step: int | None
    checkpoint: Checkpoint
    beside: Callable[[str], str | None]  # the text of a small file beside it
    is_branch: bool
    is_file: bool


@dataclass(frozen=True)
class Form:
    """A form in which checkpoints are written; of several that fit, the first in `FORMS` counts.

    Attributes:
        name: for people.
        whole: how it is known that one is whole.
        fits: whether a checkpoint is of it.
        lacks: what it still lacks, None for nothing.
        settles: whether it must also be the same at two looks.
    """

    name: str
    whole: str
    fits: Callable[[_Found], bool]
    lacks: Callable[[_Found], str | None]
    settles: bool = False


def _missing_shard(found: _Found) -> str | None:
    """A shard that an index names and that is not there."""
    names = found.checkpoint.names()
    for index in (name for name in names if name.endswith(".index.json")):
        told = parse_object(found.checkpoint.read(index), f"{index}: the index").get("weight_map")
        for shard in sorted({str(shard) for shard in told.values()} if isinstance(told, dict) else ()):
            if shard not in names:
                return f"{shard}, which {index} names"
    return None


def _branch_lacks(found: _Found) -> str | None:
    there = has_weights(found.checkpoint) or found.checkpoint.has(ADAPTER_FILE)
    return _missing_shard(found) if there else "weights"


def _trainer_lacks(found: _Found) -> str | None:
    if not found.checkpoint.has(_TRAINER):
        return f"{_TRAINER}, which the Trainer writes last"
    if found.checkpoint.size(_TRAINER) <= MAX_JSON_BYTES:
        parse_object(found.checkpoint.read(_TRAINER), _TRAINER)
    return _missing_shard(found)


def _megatron_lacks(found: _Found) -> str | None:
    told = found.beside(_TRACKER)
    if told is None:
        return f"{_TRACKER}, which Megatron writes last"
    done = told.strip() == "release" or (told.strip().isdecimal() and int(told) >= (found.step or 0))
    return None if done else f"{_TRACKER} to name it"


def _deepspeed_lacks(found: _Found) -> str | None:
    told = found.beside(_LATEST)
    if told is None:
        return f"{_LATEST}, which DeepSpeed writes last"
    step = checkpoint_step(told.strip())
    done = told.strip() == found.name or (step is not None and step >= (found.step or 0))
    return None if done else f"{_LATEST} to name it"


def _header_lacks(found: _Found) -> str | None:
    if found.checkpoint.has(ADAPTER_FILE):
        return (
            None if any(n.startswith("adapter_model.") for n in found.checkpoint.names()) else "the adapter's tensors"
        )
    found.checkpoint.contents()
    return None


def _has(found: _Found, *names: str) -> bool:
    return any(found.checkpoint.has(name) for name in names)


FORMS = (
    Form("branch of a Hub repository", "a commit is there or not; its index's shards are all in it",
         lambda f: f.is_branch, _branch_lacks),
    Form("one file (.safetensors, .pt, .ckpt, …)", "its header is whole, and two looks find it the same",
         lambda f: f.is_file, _header_lacks, settles=True),
    Form("Trainer of transformers (checkpoint-N)", "trainer_state.json, written last, and every shard are there",
         lambda f: not _BESIDE_TRAINER.isdisjoint(f.checkpoint.names()), _trainer_lacks),
    Form("Megatron (iter_N)", "latest_checkpointed_iteration.txt beside it names it or a later one",
         lambda f: f.name.startswith("iter_") and (f.beside(_TRACKER) is not None or _has(
             f, "mp_rank_00/model_optim_rng.pt", "mp_rank_00_000/model_optim_rng.pt")), _megatron_lacks),
    Form("DeepSpeed, GPT-NeoX (global_stepN)", "latest beside it names it or a later one",
         lambda f: f.name.startswith("global_step"), _deepspeed_lacks),
    Form("torch.distributed.checkpoint", ".metadata, written last, is there",
         lambda f: _has(f, ".metadata") or any(n.endswith(".distcp") for n in f.checkpoint.names()),
         lambda f: None if _has(f, ".metadata") else ".metadata, which is written last"),
    Form("any other folder", "its weights' index, shards and headers are whole, and two looks find it the same",
         lambda f: True, _header_lacks, settles=True),
)  # fmt: skip


class Arrivals:
    """The checkpoints below a place, look by look; what a look saw of an unfinished one, the next one compares."""

    def __init__(self, place: str, config: dict[str, Any] | None = None, model_type: str | None = None):
        """`place` is a folder that need not be there yet, a URL of one, or `hf://ORG/NAME`.

        Raises:
            CheckpointError: a place whose folders cannot be listed.
        """
        if place.startswith(("http://", "https://")):
            raise CheckpointError(f"{place}: the folders of a web server cannot be listed; give a folder or a bucket")
        self._place, self._config, self._model_type = place, config, model_type
        self._hub = hub_id_of(place) is not None
        self._before: dict[str, str] = {}

    def look(self, known: Container[str] = ()) -> list[Arrival]:
        """The checkpoints that are there, less those `known`, in training order.

        Raises:
            CheckpointError: the place is there, or should be, and cannot be listed.
        """
        names = self._names()
        steps = steps_told(names)
        if not (self._hub or is_url(self._place)):
            named = set(steps.values()) - {None}
            for name in (name for name, step in steps.items() if step is None):
                step = trainer_step(Path(self._place, name))
                steps[name] = None if step in named else step  # `best`, `last`: a copy, or a link
        series = [name for name, step in steps.items() if step is not None or tells_place(name)]
        order = in_training_order({name: steps[name] for name in series})
        return [self._arrival(name, steps[name]) for name in order if name not in known]

    def has(self, name: str) -> bool:
        """Whether a checkpoint is still there.

        Raises:
            CheckpointError: the place cannot be listed.
        """
        return name in self._names()

    def _names(self) -> list[str]:
        if self._hub:
            return list_revisions(self._place)
        with one_line_errors(self._place):
            fs, root = open_place(self._place)
            fs.invalidate_cache()  # of what lies in the checkpoints too
            try:
                listed = fs.ls(root, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        kinds = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["type"] for entry in listed}
        names = [name for name in kinds if not is_hidden(name) and not is_passing(name)]
        folders = [n for n in names if kinds[n] == "directory" or os.path.isdir(os.path.join(self._place, n))]
        files = [name for name in names if name not in folders and is_file_of(self._place, name)]
        if is_local(fs):  # a pipe or a device would be waited for
            files = [name for name in files if os.path.isfile(os.path.join(root, name))]
        return folders + files

    def _arrival(self, name: str, step: int | None) -> Arrival:
        if why := cannot_be_stored(name):
            return Arrival(name, step, f"another name: {why}")
        try:
            checkpoint = Checkpoint(
                self._place, name, place=self._place, config=self._config, model_type=self._model_type
            )
            is_file = not self._hub and is_file_of(self._place, name)
            found = _Found(name, step, checkpoint, self._beside, self._hub, is_file)
            form = next(form for form in FORMS if form.fits(found))
            lacks = form.lacks(found)
            if lacks is None and form.settles:
                now, before = checkpoint.fingerprint(checkpoint.names()), self._before.get(name)
                self._before[name] = now
                return Arrival(name, step) if now == before else Arrival(name, step, _FIRST_LOOK, settling=True)
        except (CheckpointError, OSError) as error:  # half of it is there, or it goes while it is looked at
            self._before.pop(name, None)
            return Arrival(name, step, message(error))
        return Arrival(name, step, lacks)

    def _beside(self, name: str) -> str | None:
        with contextlib.suppress(CheckpointError, OSError):
            fs, root = open_place(self._place)
            if is_local(fs):  # a pipe of that name would be waited for
                return b"".join(file_pieces(Path(root, name), 200, cut=True)).decode("utf-8", "replace")
            return bytes(fs.cat_file(f"{root}/{name}", end=200)).decode("utf-8", "replace")
        return None
