"""A SOURCE becomes a checkpoint: a local folder, a Hub repository at a revision, or a folder behind a URL.

Everything is read through fsspec, by byte ranges, and counted. Nothing is executed from a checkpoint.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from suite.tensors import INDEX_FILE, SINGLE_FILE, CheckpointError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")
_STEP = re.compile(r"step[-_]?(\d+)", re.IGNORECASE)
_MAX_JSON_BYTES = 64_000_000  # index files of the largest checkpoints are a few megabytes
# What a listing-free web server is asked for.
_KNOWN_FILES = (
    "config.json", INDEX_FILE, SINGLE_FILE, "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
    "preprocessor_config.json",
)  # fmt: skip
LOADED_PATTERNS = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
]  # what a forward pass needs; never code, never pickles


class Checkpoint:
    """One checkpoint folder, wherever it is; counts the bytes it reads.

    Attributes:
        source: as the user gave it.
        revision: Hub revision, or the checkpoint folder below a series' source; None where there is only one.
        bytes_read: bytes of file content read so far.
    """

    def __init__(self, source: str, revision: str | None = None, base: Path | None = None):
        """Open `source`; a relative local path is looked up below `base` too (the registry's folder).

        Raises:
            CheckpointError: no such folder, or nothing that could be a Hub id or URL.
        """
        self.source, self.revision, self.bytes_read = source, revision, 0
        self._names: list[str] | None = None
        local = _local_folder(source, base)
        self._hub_id: str | None = None
        if local is not None:
            self._folder = local / revision if revision else local
            if not self._folder.is_dir():
                raise CheckpointError(f"{self._folder}: no such directory; the checkpoints are {_listing(local)}")
            self._fs, self._root = fsspec.filesystem("file"), str(self._folder)
        elif "://" in source:
            with _one_line_errors(source):
                self._fs, root = fsspec.core.url_to_fs(source)
            self._root = root.rstrip("/") + (f"/{revision}" if revision else "")
        elif _HUB_ID.match(source):
            from huggingface_hub import HfFileSystem

            self._hub_id, _, own_revision = source.partition("@")
            self.revision = own_revision or revision or "main"
            self._fs = HfFileSystem()
            self._root = f"{self._hub_id}@{self.revision.replace('/', '%2F')}"
        elif Path(source).exists():
            raise CheckpointError(f"{source}: not a directory; give the folder that holds config.json")
        else:
            raise CheckpointError(
                f"{source}: no such directory, and neither a Hub id (org/name[@revision]) nor a URL (s3://…)"
            )

    def names(self) -> list[str]:
        """File names in the folder (not below it)."""
        if self._names is None:
            with _one_line_errors(self.source):
                if self._fs.protocol in ("http", "https") or "http" in self._fs.protocol:
                    self._names = [name for name in _KNOWN_FILES if self._fs.exists(self._path(name))]
                else:
                    listed = self._fs.ls(self._root, detail=True)
                    self._names = sorted(f["name"].rsplit("/", 1)[-1] for f in listed if f["type"] == "file")
        return self._names

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with _one_line_errors(f"{self.source}: {name}"):
            return int(self._fs.size(self._path(name)) or 0)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` (the whole file for None) of a file."""
        with _one_line_errors(f"{self.source}: {name}"):
            data: bytes = self._fs.cat_file(self._path(name), start=start, end=end)
        self.bytes_read += len(data)
        return data

    def bytes_total(self) -> int:
        """Bytes of all weight files."""
        return sum(self.size(name) for name in self.names() if name.endswith(".safetensors"))

    def config(self) -> dict[str, Any]:
        """The contents of config.json.

        Raises:
            CheckpointError: missing, not JSON, or not an object.
        """
        if "config.json" not in self.names():
            raise CheckpointError(f"{self.source}: no config.json; not a transformers checkpoint")
        if self.size("config.json") > _MAX_JSON_BYTES:
            raise CheckpointError(f"{self.source}: config.json is larger than {_MAX_JSON_BYTES} bytes")
        try:
            config = json.loads(self.read("config.json"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.source}: config.json is not JSON ({error})") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.source}: config.json is not a JSON object")
        return config

    def fingerprint(self) -> str:
        """Hash that changes when the checkpoint does: the Hub's commit, else names, sizes and times of its files."""
        with _one_line_errors(self.source):
            if self._hub_id:
                from huggingface_hub import HfApi

                return str(HfApi().model_info(self._hub_id, revision=self.revision).sha)
            facts = []
            for name in self.names():
                if name.endswith((".safetensors", ".json")):
                    info = self._fs.info(self._path(name))
                    stamp = info.get("ETag") or info.get("mtime") or info.get("LastModified")
                    facts.append([name, info["size"], str(stamp)])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @contextlib.contextmanager
    def local_copy(self) -> Iterator[Path]:
        """A local folder with the configuration, weights and tokenizer; from the Hub through its cache."""
        if self._fs.protocol == "file" or "file" in self._fs.protocol:
            yield self._folder
        elif self._hub_id:
            from huggingface_hub import snapshot_download

            with _one_line_errors(self.source):
                folder = snapshot_download(self._hub_id, revision=self.revision, allow_patterns=LOADED_PATTERNS)
            yield Path(folder)
        else:
            with tempfile.TemporaryDirectory(prefix="deadbench-") as folder:
                with _one_line_errors(self.source):
                    for name in self.names():
                        if any(Path(name).match(pattern) for pattern in LOADED_PATTERNS):
                            self._fs.get_file(self._path(name), f"{folder}/{name}")
                yield Path(folder)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def list_revisions(source: str, base: Path | None = None) -> list[str]:
    """What checkpoints a series has: branches and tags of a Hub repository, else the folders below `source`.

    Raises:
        CheckpointError: they cannot be listed.
    """
    local = _local_folder(source, base)
    if local is not None:
        return sorted(p.name for p in local.iterdir() if p.is_dir())
    with _one_line_errors(source):
        if "://" in source:
            fs, root = fsspec.core.url_to_fs(source)
            return sorted(Path(f["name"]).name for f in fs.ls(root, detail=True) if f["type"] == "directory")
        from huggingface_hub import HfApi

        refs = HfApi().list_repo_refs(source)
        return [ref.name for ref in (*refs.branches, *refs.tags)]


def checkpoint_step(name: str | None) -> int | None:
    """Training step that a revision or folder name tells: 7 for `step7`, `global_step7` and `stage1-step7-…`."""
    match = _STEP.search(name or "")
    return int(match[1]) if match else None


def _local_folder(source: str, base: Path | None) -> Path | None:
    for candidate in (Path(source).expanduser(), *([base / source] if base else [])):
        if candidate.is_dir():
            return candidate.resolve()
    return None


def _listing(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())[:8]) or "none"


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turn what fsspec, its backends and the Hub raise into one line that says what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        name = type(error).__name__
        advice = {
            "GatedRepoError": "the model is gated: accept its terms on the Hub and set HF_TOKEN",
            "RepositoryNotFoundError": "no such repository on the Hub, or it is private and HF_TOKEN is not set",
            "RevisionNotFoundError": "the repository has no such revision",
            "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and the file is not in the cache",
            "LocalEntryNotFoundError": "the Hub cannot be reached and the file is not in the cache",
            "FileNotFoundError": "no such file or directory",
            "PermissionError": "permission denied",
        }.get(name)
        if advice is None and isinstance(error, (OSError, ImportError, ValueError)):
            advice = f"cannot be read ({name}: {(str(error).strip().splitlines() or [''])[0][:200]})"
        if advice is None and not isinstance(error, (OSError, RuntimeError)):
            advice = f"cannot be read ({name})"
        raise CheckpointError(f"{what}: {advice or str(error).splitlines()[0]}") from error
