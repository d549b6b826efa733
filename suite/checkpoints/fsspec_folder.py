"""A checkpoint folder that fsspec opens: this machine's, S3, and others; a file stays the one that was first read."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deadbench.suite.errors import ChangedError, CheckpointError, UnreachableError, first_line, reason_of
from deadbench.suite.scratch import is_scratch
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import is_hidden, open_place, server_failure

# By the names of their classes: the libraries that raise them are not imported before they are used.
_UNREACHED = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and the file is not in the cache",
    "LocalEntryNotFoundError": "the Hub cannot be reached and the file is not in the cache",
}
_ADVICE = {
    "GatedRepoError": "the model is gated: accept its terms on the Hub and set HF_TOKEN",
    "RepositoryNotFoundError": "no such repository on the Hub, or it is private and HF_TOKEN is not set",
    "RevisionNotFoundError": "the repository has no such revision",
    "FileNotFoundError": "no such file or directory",
    "PermissionError": "permission denied; set the store's credentials where it is a remote one",
    "NoCredentialsError": "no credentials for this store; set AWS_ACCESS_KEY_ID or AWS_PROFILE",
}
_PIECE_BYTES, _PIECES = 32 * 2**20, 4  # of a download from an object store: as many at once


class FsspecFolder:
    """The files of a folder that fsspec opens: local, s3://, gs://, memory:// and what else is installed.

    Attributes:
        bytes_read: bytes of file content read so far.
    """

    def __init__(self, source: str, location: str):
        """Open the folder at `location`; `source` is what the user called it."""
        self.bytes_read = 0
        self._source = shown_place(source)
        with one_line_errors(source):
            self._fs, self._root = open_place(location)
        self._infos: dict[str, dict[str, Any]] = {}
        self._first: dict[str, tuple[int, str]] = {}  # size and stamp of the files read

    def names(self) -> list[str]:
        """File names in the folder (not below it), less those that begin with a dot."""
        listed = self._fs.ls(self._root, detail=True)
        found = {f["name"].rsplit("/", 1)[-1]: f for f in listed if not is_hidden(f["name"])}
        links = [name for name, info in found.items() if info.get("islink") and Path(self._root, name).is_file()]
        for name in links:
            _check_link(Path(self._root), name)
        self._infos = {name: info for name, info in found.items() if info["type"] == "file" and name not in links}
        return sorted([*self._infos, *links])

    def has(self, name: str) -> bool:
        """Whether there is such a file, in the folder or below it."""
        folder = Path(self._root)
        if folder.is_absolute() and (folder / name).is_file():  # a bucket's is not
            _check_link(folder, name)
        return bool(self._fs.isfile(f"{self._root}/{name}"))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        known = self._infos.get(name, {}).get("size")
        return int(known if known is not None else self._fs.size(f"{self._root}/{name}"))

    def stamp(self, name: str) -> str:
        """What changes when the file does: its ETag or the time of its last change."""
        return self._version(name)[1]

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` (the end of the file for None).

        Raises:
            ChangedError: the file is another one than when it was first read.
        """
        with self._held(name):
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", start=start, end=end)
        self.bytes_read += len(data)
        return data

    def download(self, name: str, target: Path) -> None:
        """Complete `target` to the whole file: what is there of it is not read again.

        Raises:
            ChangedError: the file is another one than when it was first read; nothing of it is kept.
        """
        try:
            with self._held(name):
                self._complete(name, target)
        except ChangedError:
            target.unlink(missing_ok=True)
            raise

    def _version(self, name: str) -> tuple[int, str]:
        info = self._fs.info(f"{self._root}/{name}")
        stamp = info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("created")
        return int(info.get("size") or 0), str(stamp)

    @contextlib.contextmanager
    def _held(self, name: str) -> Iterator[None]:
        """The file is the same before and after as when it was first asked for."""
        first = self._first.get(name) or self._first.setdefault(name, self._version(name))
        try:
            yield
        except Exception:
            self._compare(name, first)  # of which that may be the cause
            raise
        self._compare(name, first)

    def _compare(self, name: str, first: tuple[int, str]) -> None:
        self._fs.invalidate_cache(self._root)
        now = self._version(name)
        if now != first:
            raise ChangedError(
                f"{self._source}: {name}: changed while it was read (from {first[0]:,} bytes of {first[1]} to "
                f"{now[0]:,} of {now[1]}); run again"
            )

    def _complete(self, name: str, target: Path) -> None:
        path, size = f"{self._root}/{name}", self.size(name)
        with target.open("ab") as file:
            while (start := file.tell()) < size:
                starts = range(start, min(start + _PIECES * _PIECE_BYTES, size), _PIECE_BYTES)
                ends = [min(each + _PIECE_BYTES, size) for each in starts]
                for piece in self._fs.cat_ranges([path] * len(ends), list(starts), ends, on_error="raise"):
                    file.write(piece)
                if file.tell() == start:  # it was longer when it was listed
                    return


def _check_link(folder: Path, name: str) -> None:
    """Refuse a link out of the folder, but for the Hub's cache: snapshots/COMMIT/NAME to the repository's blobs/."""
    folder, target = folder.resolve(), (folder / name).resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    if not target.is_relative_to(folder) and target.parent != blobs and not is_scratch(folder):
        raise CheckpointError(f"{folder / name}: a link to {target}, outside the checkpoint; put the file itself there")


@contextlib.contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn what fsspec, its backends and the Hub raise into one line that says what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        what, name = shown_place(what), type(error).__name__
        if name in _UNREACHED:
            raise UnreachableError(f"{what}: {_UNREACHED[name]}") from error
        advice = server_failure(error) or _ADVICE.get(name)
        if isinstance(error, ImportError):
            advice = str(error)
        if advice is None and isinstance(error, (OSError, ImportError, ValueError)):
            advice = f"cannot be read ({reason_of(error)})"
        if advice is None and not isinstance(error, (OSError, RuntimeError)):
            advice = f"cannot be read ({name})"
        raise CheckpointError(f"{what}: {advice or first_line(error)}") from error
