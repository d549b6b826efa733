"""A PEFT adapter as a checkpoint: its base, with what the adapter has trained as a whole in the place of the base's.

adapter_config.json is a stranger's, as all of a checkpoint is: of it the base's name is taken here, and nothing is
imported or built. Halves of low rank and the like stay apart, as changes of single maps, for who runs the model.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from deadbench.suite.checkpoints.adapter_tensors import AdapterTensors, adapter_tensors, is_whole_map
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.configurations import config_file
from deadbench.suite.checkpoints.dialects.table import Translation
from deadbench.suite.checkpoints.headers import read_contents
from deadbench.suite.checkpoints.no_weights import ADAPTER_FILE
from deadbench.suite.checkpoints.sources import hub_id_of, locate
from deadbench.suite.checkpoints.strict_json import MAX_JSON_BYTES, parse_object, shown
from deadbench.suite.checkpoints.tensors import Contents, TensorEntry
from deadbench.suite.checkpoints.weight_files import WeightFiles, has_weights, weights_file
from deadbench.suite.errors import CheckpointError, UnreachableError
from deadbench.suite.scratch import Scratch
from deadbench.suite.secrets import scrubbed
from deadbench.suite.storage import is_url

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE_BASE = "adapter"  # the folder in a prepared base that has the adapter's files, where no other program looks


def open_checkpoint(
    source: str,
    revision: str | None = None,
    base: Path | None = None,
    place: str | None = None,
    config: dict[str, Any] | None = None,
    model_type: str | None = None,
) -> Checkpoint:
    """What a SOURCE names, opened as `Checkpoint` opens it; an adapter with its base.

    Raises:
        CheckpointError: as `Checkpoint` does; an adapter that names no base, or one that is not there.
    """
    checkpoint = Checkpoint(source, revision, base, place, config, model_type)
    if _is_adapter(checkpoint):
        return AdaptedCheckpoint(checkpoint, _base_of(checkpoint, base, config, model_type))
    with contextlib.suppress(CheckpointError):  # which reading it will say
        beside = checkpoint.lists and ADAPTER_FILE in checkpoint.names() and set(_WEIGHTS) & set(checkpoint.names())
        if beside:
            checkpoint.remark = f"{checkpoint.source}: the weights without the adapter that lies beside them"
    return checkpoint


def open_prepared(folder: Path) -> Checkpoint:
    """What `local_copy` has prepared."""
    beside, base = folder / _BESIDE_BASE, Checkpoint(str(folder), place=str(folder))
    if (beside / ADAPTER_FILE).is_file():
        return AdaptedCheckpoint(Checkpoint(str(beside), place=str(beside)), base)
    return base


def read_config(told: str) -> dict[str, Any]:
    """The configuration in a file, or that of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = Path(os.path.expanduser(told))
    return config_file(path) if path.is_file() else open_checkpoint(told).config()


class AdaptedCheckpoint(Checkpoint):
    """An adapter and its base as one checkpoint, of the base's architecture and names.

    Attributes:
        adapter: the adapter's own files.
        base: what it was trained on.
    """

    def __init__(self, adapter: Checkpoint, base: Checkpoint):
        """Put `adapter` on `base`; nothing of its weights is opened."""
        self.adapter, self.base = adapter, base
        self.source, self.revision = adapter.source, adapter.revision
        remarks = [each.remark for each in (adapter, base) if each.remark]
        self.remark = "; ".join(remarks) or None
        self._contents: Contents | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of both that have been read so far."""
        return self.adapter.bytes_read + self.base.bytes_read

    @property
    def folder(self) -> Path | None:
        """The base's folder on this machine, None where it is elsewhere."""
        return self.base.folder

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The contents of adapter_config.json."""
        return _settings(self.adapter)

    @cached_property
    def tensors(self) -> AdapterTensors:
        """What the adapter holds, beside its base."""
        with self._telling():
            stored = self.base.headers()
        return adapter_tensors(self._held, stored, self.kind, self.source, self.base.source)

    @property
    def kind(self) -> str:
        """The kind of adapter, as PEFT calls it: LORA, IA3, …"""
        return shown(self.settings.get("peft_type")).strip("'\"")[:40]

    def names(self) -> list[str]:
        """File names of the base, and the adapter's weights."""
        with self._telling():
            return sorted({*self.base.names(), self._file_name})

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        with self._telling():
            return name == self._file_name or self.base.has(name)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with self._telling():
            return self._holder(name).size(name)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` (the whole file for None) of a file."""
        with self._telling():
            return self._holder(name).read(name, start, end)

    def weights(self) -> WeightFiles:
        """The base's files; other programs know them alone, so that the format is another."""
        with self._telling():
            found = self.base.weights()
        return replace(found, format=replace(found.format, name="peft", scattered=True))

    def contents(self) -> Contents:
        """The base's tensors, of which those that the adapter has whole are the adapter's."""
        if self._contents is None:
            with self._telling():
                contents = self.base.contents()
            entries = {entry.name: entry for entry in contents.entries}
            entries |= self._whole
            trained = f", which has {len(self._whole)} of its tensors whole" if self._whole else ""
            remark = f"{self.kind} adapter {self.source}{trained}, on its base {self.base.source}"
            both = "; ".join(each for each in (remark, contents.remark) if each)
            self._contents = replace(contents, entries=list(entries.values()), step=None, remark=both)
        return self._contents

    def translation(self) -> Translation:
        """The base's tensors by transformers' names, of which those that the adapter has whole are the adapter's."""
        with self._telling():
            of_base = self.base.translation()
        entries = {entry.name: entry for entry in of_base.entries} | self._whole
        return replace(of_base, entries=list(entries.values()))

    def bytes_total(self) -> int:
        """Bytes of all files that hold the weights of both."""
        with self._telling():
            return self.base.bytes_total() + self.adapter.size(self._file_name)

    def config(self) -> dict[str, Any]:
        """The base's configuration, with as many words as the adapter's embedding where it has one of its own."""
        with self._telling():
            config, stored = self.base.config(), self.base.headers() if self._has_whole_maps else {}
        for name, entry in self.tensors.whole.items() if stored else ():
            own = stored[name].shape
            if len(own) == 2 and entry.shape[1:] == own[1:] and config.get("vocab_size") == own[0] != entry.shape[0]:
                return config | {"vocab_size": entry.shape[0]}
        return config

    def fingerprint(self, names: Iterable[str] | None = None) -> str:
        """Hash that changes when the adapter or its base does."""
        own = [ADAPTER_FILE, self._file_name]
        of_base = None if names is None else [name for name in names if name != self._file_name]
        with self._telling():
            return f"{self.adapter.fingerprint(own)}+{self.base.fingerprint(of_base)}"

    @contextlib.contextmanager
    def local_copy(self, *, weights: bool = True) -> Iterator[Path]:
        """A folder with the base's files, and the adapter's in one below, which transformers does not look into."""
        with contextlib.ExitStack() as stack:
            with self._telling():
                prepared = stack.enter_context(self.base.local_copy(weights=weights))
            if not weights:
                yield prepared
                return
            view = stack.enter_context(Scratch())
            for path in prepared.iterdir():
                if path.name not in (ADAPTER_FILE, _BESIDE_BASE, "in-use"):
                    os.symlink(path.absolute(), view / path.name)
            if (config := self.config()) != self.base.config():
                (view / "config.json").unlink()
                (view / "config.json").write_text(json.dumps(config), encoding="utf-8")
            (view / _BESIDE_BASE).mkdir()
            for name in (ADAPTER_FILE, self._file_name):
                (view / _BESIDE_BASE / name).write_bytes(self.adapter.read(name))
            try:
                yield view
            except ValueError as error:
                told = str(error).replace(str(view / _BESIDE_BASE), self.source).replace(str(view), self.source)
                raise (type(error)(told) if told != str(error) else error) from error

    @cached_property
    def _file_name(self) -> str:
        """The file of the adapter's weights."""
        for name in _WEIGHTS:
            if self.adapter.has(name):
                return name
        raise CheckpointError(f"{self.source}: {ADAPTER_FILE} without {' or '.join(_WEIGHTS)}; download it again")

    @cached_property
    def _held(self) -> list[TensorEntry]:
        """The adapter's tensors, from their headers."""
        return read_contents(self.adapter, weights_file(self.adapter, self._file_name)).entries

    @property
    def _whole(self) -> dict[str, TensorEntry]:
        """The adapter's tensors that take the place of the base's, called as the base calls them."""
        return {name: replace(entry, name=name) for name, entry in self.tensors.whole.items()}

    @property
    def _has_whole_maps(self) -> bool:
        return any(map(is_whole_map, self._held))

    def _holder(self, name: str) -> Checkpoint:
        return self.adapter if name in (self._file_name, ADAPTER_FILE) else self.base

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """What goes wrong with the base is told as such, and what to do."""
        try:
            yield
        except CheckpointError as error:
            if str(error).startswith(f"{self.source}:"):
                raise
            raise type(error)(_no_base(self.source, self.base.source, error)) from error


def _is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an adapter alone: weights of its own, or a configuration where nothing lists, are not."""
    try:
        if checkpoint.has("config.json") and not checkpoint.lists:
            return False
        return checkpoint.has(ADAPTER_FILE) and not has_weights(checkpoint)
    except UnreachableError:
        raise  # which would be waited for once more
    except CheckpointError:
        return False  # which reading it will say


def _settings(adapter: Checkpoint) -> dict[str, Any]:
    if adapter.size(ADAPTER_FILE) > MAX_JSON_BYTES:
        raise CheckpointError(f"{adapter.source}: {ADAPTER_FILE} is larger than {MAX_JSON_BYTES} bytes")
    return parse_object(adapter.read(ADAPTER_FILE), f"{adapter.source}: {ADAPTER_FILE}")


def _base_of(
    adapter: Checkpoint, base: Path | None, config: dict[str, Any] | None, model_type: str | None
) -> Checkpoint:
    """The checkpoint that an adapter's configuration names: a folder beside or below it, one here, or on the Hub.

    Raises:
        CheckpointError: it names none, or one that is not there.
    """
    settings = _settings(adapter)
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named or not named.isprintable() or len(named) > 4096:
        raise CheckpointError(
            f"{adapter.source}: {ADAPTER_FILE} names no base ({shown(named)}); write its folder or Hub id under "
            "base_model_name_or_path"
        )
    beside = adapter.folder / named if adapter.folder else None
    place = str(beside.resolve()) if beside and beside.is_dir() else locate(named, base)
    try:
        if is_url(place) and not hub_id_of(place):
            raise CheckpointError("it is a URL, which an adapter may not have opened; give a folder or a Hub id")
        revision = settings.get("revision") if hub_id_of(place) else None
        if place == str(adapter.folder):
            raise CheckpointError("it is the adapter itself")
        told = place if hub_id_of(place) or os.path.isdir(place) else None
        return Checkpoint(named, revision if isinstance(revision, str) else None, base, told, config, model_type)
    except UnreachableError:
        raise
    except CheckpointError as error:
        raise CheckpointError(_no_base(adapter.source, named, error)) from error


def _no_base(adapter: str, named: str, error: CheckpointError) -> str:
    return (
        f"{adapter}: its base {scrubbed(named)} cannot be read: {error}; have it there, or name another place under "
        f"base_model_name_or_path of {ADAPTER_FILE}"
    )
