"""A SOURCE becomes a checkpoint: a folder here or behind a URL, one file of it, or a Hub repository at a revision.

Everything is read through fsspec, by byte ranges, and counted. Nothing is executed from a checkpoint.
"""

import contextlib
import copy
import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deadbench.suite.checkpoints.configurations import checked, config_file
from deadbench.suite.checkpoints.dialects.table import Translation, translate
from deadbench.suite.checkpoints.download_cache import fetch_once, lease
from deadbench.suite.checkpoints.fsspec_folder import FsspecFolder, one_line_errors
from deadbench.suite.checkpoints.headers import read_contents
from deadbench.suite.checkpoints.http_folder import HttpFolder
from deadbench.suite.checkpoints.no_weights import called, no_config, weights_alone
from deadbench.suite.checkpoints.opening import cached_snapshot, open_source
from deadbench.suite.checkpoints.other_configurations import other_config, read_object
from deadbench.suite.checkpoints.prepared_folder import as_transformers_expects
from deadbench.suite.checkpoints.tensor_kinds import model_types_of
from deadbench.suite.checkpoints.tensors import Contents, TensorEntry
from deadbench.suite.checkpoints.weight_files import NAMED_BY, WeightFiles, weight_files, weights_file
from deadbench.suite.errors import CheckpointError, UnreachableError
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import is_hidden

LOADED_PATTERNS = ["*.json", "*.txt", "*.model"]  # what a forward pass needs beside weights; never code


class Checkpoint:
    """One checkpoint, a folder or a file of one, wherever it is; counts the bytes it reads.

    Attributes:
        source: as the user gave it.
        revision: Hub revision, or the checkpoint, a folder or a file, below a series' source; None where there is only
            one.
        remark: what is to be said of where it was read; None mostly.
        candidates: the model types that the tensors' names could be of, where no configuration says it.
    """

    remark: str | None
    candidates: list[str] | None = None

    def __init__(
        self,
        source: str,
        revision: str | None = None,
        base: Path | None = None,
        place: str | None = None,
        config: dict[str, Any] | None = None,
        model_type: str | None = None,
    ):
        """Open `source`; a relative local path is looked up below `base` too (the registry's folder).

        With `place`, what `locate` found elsewhere, nothing is looked up: it is opened, or it is not there. A `config`
        takes the place of the checkpoint's config.json, and `model_type` is what a configuration without one is of.

        Raises:
            CheckpointError: no such folder, or nothing that could be a Hub id or URL.
        """
        self.source = shown_place(source)
        self._called = f"{source}@{revision}"
        self._names: list[str] | None = None
        self._config = None if config is None else checked(config, self.source, model_type)
        self._model_type = model_type
        self._own_config = config is None
        self._as_stored = False  # the configuration is what the folder's config.json says
        self._weights: WeightFiles | None = None
        self._contents: Contents | None = None
        self._translation: Translation | None = None
        found = open_source(source, revision, base, place)
        self.revision, self.remark, self._file = found.revision, found.remark, found.file
        self._folder, self._local, self._hub_id = found.folder, found.local, found.hub_id

    @property
    def bytes_read(self) -> int:
        """Bytes of file content read so far."""
        return self._folder.bytes_read

    @property
    def folder(self) -> Path | None:
        """The folder on this machine, None where it is elsewhere."""
        return self._local

    @property
    def lists(self) -> bool:
        """Whether the place tells which files it has, so that asking for one more costs nothing."""
        return not isinstance(self._folder, HttpFolder) or self._folder.lists

    def names(self) -> list[str]:
        """File names in the folder (not below it)."""
        if self._names is None:
            with one_line_errors(self.source):
                try:
                    self._names = self._folder.names()
                except UnreachableError:
                    if not self._take_from_cache():
                        raise
                    self._names = self._folder.names()
            if self._file is not None:  # what lies beside it are other weights
                self._names = [
                    n for n in self._names if n == self._file or n.endswith((".json", ".txt", ".model", ".yaml"))
                ]
        return self._names

    def _take_from_cache(self) -> bool:
        """Where the Hub cannot be reached, take what its cache has of the repository, as the Hub's own library does."""
        folder = cached_snapshot(self._hub_id, str(self.revision), always=True) if self._hub_id else None
        if folder is not None:
            self._local, self._folder = folder, FsspecFolder(self.source, str(folder))
            self.remark = f"the Hub cannot be reached: read from its cache, {folder}"
        return folder is not None

    def has(self, name: str) -> bool:
        """Whether there is such a file; a server without listings is asked for this one alone."""
        if (self._names is None and not self.lists) or "/" in name or is_hidden(name):
            with one_line_errors(called(self, name)):
                return self._folder.has(name)
        return name in self.names()

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with one_line_errors(called(self, name)):
            return self._folder.size(name)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` (the whole file for None) of a file."""
        with one_line_errors(called(self, name)):
            return self._folder.read(name, start, end)

    def weights(self) -> WeightFiles:
        """The files that hold the weights: those that transformers would open, or the one that was given.

        Raises:
            CheckpointError: there are none, or a broken index.
        """
        if self._weights is None:
            if self._file is not None:
                self._weights = weights_file(self, self._file)
            else:
                named = self.config().get(NAMED_BY) if self._own_config and self.has("config.json") else None
                self._weights = weight_files(self, named)
        return self._weights

    def contents(self) -> Contents:
        """What the headers of the weights tell; raises as `weights` does, and for malformed headers."""
        if self._contents is None:
            self._contents = read_contents(self, self.weights())
        return self._contents

    def translation(self) -> Translation:
        """The tensors as transformers' model has them, whosever form they are stored in; raises as `contents` does."""
        if self._translation is None:
            self._translation = translate(self.contents(), self.config)
        return self._translation

    def headers(self) -> dict[str, TensorEntry]:
        """All tensors by transformers' names, from the headers alone; raises as `contents` does."""
        return {entry.name: entry for entry in self.translation().entries}

    def origin(self) -> dict[str, Any]:
        """The columns that say what was read: the format, and the training step where it records one."""
        return {"source_format": self.weights().format.name, "source_step": self.contents().step}

    def bytes_total(self) -> int:
        """Bytes of all files that hold the weights."""
        return sum(self.size(name) for name in self._weight_names())

    def config(self) -> dict[str, Any]:
        """The contents of config.json, or what the weights record in its place.

        Raises:
            CheckpointError: missing, not JSON, or not an object.
        """
        if self._config is None and not self.has("config.json"):
            self._config = self._recorded_config()
        elif self._config is None:
            told = read_object(self, self.source, "config.json")
            self._config = checked(told, f"{self.source}: config.json", self._model_type)
            self._as_stored = told.get("model_type") == self._config.get("model_type")
        if "model_type" not in self._config and self.candidates is None:
            self._of_names(self._config)
        return copy.deepcopy(self._config)

    def _of_names(self, config: dict[str, Any]) -> None:
        """Complete a configuration without model_type where the tensors' names are those of one architecture alone."""
        self.candidates = []  # before the headers are read, which asks for the configuration
        with contextlib.suppress(CheckpointError):
            self.candidates = model_types_of(entry.name for entry in self.contents().entries)
        if len(self.candidates) == 1:
            config["model_type"], self._as_stored = self.candidates[0], False

    def fingerprint(self, names: Iterable[str] | None = None) -> str:
        """Hash that changes when the checkpoint does: the Hub's commit, else sizes and times of its files.

        Args:
            names: only these; None for all that hold configuration or weights.
        """
        with one_line_errors(self.source):
            there = self.names() if names is None else sorted(names)
            commit = getattr(self._folder, "commit", None)
            if commit:
                return str(commit)
            chosen = there
            if names is None:
                chosen = [name for name in there if name.endswith((".safetensors", ".json"))]
                chosen += sorted(set(self._shards()) - set(chosen))
            if names is None and self._file is not None and self._file == self.revision:
                chosen = [name for name in there if name in (self._file, "config.json")]  # a run's logs lie there too
            facts = [[name, self._folder.size(name), self._folder.stamp(name)] for name in chosen]
        told = facts if self._own_config else [facts, self._config]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    @contextlib.contextmanager
    def local_copy(self, *, weights: bool = True) -> Iterator[Path]:
        """A local folder with the configuration, weights and tokenizer: downloaded once for all processes of a node.

        Without `weights`, what is not here already comes without them.

        What comes from the Hub is in the Hub's cache, everything else below `cache_folder`.
        """
        if self._local is None:
            self.names()  # which are the cache's where the Hub cannot be reached
        if self._local is not None:
            folder = self._local
        else:
            chosen = list(self._shards()) if weights else []
            with one_line_errors(self.source):
                beside = [name for name in self.names() if any(Path(name).match(p) for p in LOADED_PATTERNS)]
                commit = getattr(self._folder, "commit", None)
                if self._hub_id and commit:
                    folder = self._snapshot(self._hub_id, [*LOADED_PATTERNS, *map(glob.escape, chosen)])
                    if folder.name != commit:
                        raise CheckpointError(f"{self.source}: the repository moved on while it was read; run again")
                else:
                    folder = fetch_once(self._folder, self._called, self.fingerprint(), [*beside, *chosen])
        if weights and self._shards():
            config = self.config()
            complete = self._as_stored and self._file is None
            with as_transformers_expects(folder, self.weights(), config, self._shards(), complete=complete) as prepared:
                yield prepared
        else:
            yield folder

    def _recorded_config(self) -> dict[str, Any]:
        """What the weights record of their architecture."""
        try:
            recorded = self.contents().config
        except UnreachableError:
            raise
        except CheckpointError as error:
            several = any(name.endswith(".gguf") for name in self.names())  # which would record it
            if not self._file and (several or (self._weights is not None and self._weights.format.records)):
                raise CheckpointError(f"{self.source}: {str(error).removeprefix(f'{self.source}: ')}") from error
            raise (error if self._file else no_config(self)) from error
        recorded = recorded or other_config(self, self.source)
        if recorded is None and self._local and self._file is None:  # trainers leave it a folder above
            above = self._local.parent / "config.json"
            recorded = config_file(above) if above.is_file() else None
        if recorded is None:
            raise weights_alone(self, self.contents().remark)
        return checked(recorded, self.source, self._model_type)

    def _weight_names(self) -> list[str]:
        """The files that hold values, and those that say where."""
        return sorted({*self.weights().shards, *(file for e in self.contents().entries for file in e.files())})

    def _shards(self) -> list[str]:
        """The files that hold the weights; none where there are none that can be read."""
        try:
            return self._weight_names() if self.weights().format.scattered else list(self.weights().shards)
        except UnreachableError:
            raise
        except CheckpointError:
            return []

    def _snapshot(self, hub_id: str, patterns: list[str]) -> Path:
        """The folder in the Hub's cache, completed by one process at a time: its own locks are flock's."""
        from huggingface_hub import constants, snapshot_download

        name = f"{hub_id}@{self.revision}".replace("/", "--")
        with lease(Path(constants.HF_HUB_CACHE) / ".locks" / f"deadbench-{name}.lock"):
            return Path(snapshot_download(hub_id, revision=self.revision, allow_patterns=patterns))
