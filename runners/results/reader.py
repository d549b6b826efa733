"""What is in a result set, for those who write there and for those who only look: nothing here writes."""

import contextlib
import io
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from deadbench.suite.checkpoints.strict_json import MAX_OBJECTS
from deadbench.suite.schema import KEY, arrow_schema
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import is_hidden, is_local, open_place, read_file, refusal
from deadbench.suite.table_files import batches_of
from deadbench.suite.table_sizes import FileSize, size_of, too_large

_FOOTER_BYTES = 2**17  # as much of a remote file's end as holds its schema
# Of a document; the record of a run has up to a kilobyte and three objects a read. With so many objects at most it is
# at most ten times as much in memory.
_DOCUMENT_BYTES = 2**27


class StoreError(ValueError):
    """A result set that cannot be written or continued; one line, exit code 2."""


class DamagedError(StoreError):
    """A file of a result set that is not one of ours, which asking again does not mend."""


class ResultReader:
    """One result set, in a local folder or behind an fsspec URI."""

    def __init__(self, location: str, option: str = ""):
        """`option`: what stands before the location where errors name it.

        Raises:
            StoreError: no such file system, or its library is not installed.
        """
        self.location, self._named = shown_place(location), f"{option}{shown_place(location)}"
        try:
            self._fs, self._root = open_place(location)
        except Exception as error:
            raise StoreError(f"{self._named}: {refusal(error)}") from error
        self._local = is_local(self._fs)
        self._sizes: dict[str, dict[str, FileSize]] = {}  # of each table's files that were looked into
        self._ahead: dict[tuple[Any, ...], datetime] = {}  # ends of rows, by key, that this clock has not come to
        self._passed: set[str] = set()  # files of `reads` whose rows were asked for, or were there when this run began

    def place(self) -> tuple[Any, str]:
        """The file system, and the result set's path on it."""
        return self._fs, self._root

    def finished(self) -> set[tuple[Any, ...]]:
        """Identities (key and fingerprint) of the reads that are done and need no second measurement."""
        columns = [*KEY, "source_fingerprint", "status", "finished_at"]
        identities, now = set(), datetime.now(UTC)
        for path, source in self._sources("reads"):
            rows = self._read(path, source, columns)
            identities |= {tuple(row[name] for name in columns[:-2]) for row in rows if row["status"] == "ok"}
            for row in rows:
                if row["finished_at"] is not None and row["finished_at"] > now:
                    key = tuple(row[name] for name in KEY)
                    self._ahead[key] = max(row["finished_at"], self._ahead.get(key, now))
        return identities

    def come(self) -> list[dict[str, Any]]:
        """Outcomes of reads (key, fingerprint, run, status, attempt, error, depth, end) that came since, each once."""
        if self._local:
            # NFS remembers listings for up to a minute, but not of a folder that this machine has just changed.
            with contextlib.suppress(OSError):
                os.utime(f"{self._root}/reads")
        new = [path for path in self._files("reads") if path not in self._passed]
        outcomes = self._outcomes(new)
        self._passed |= set(new)
        return outcomes

    def earlier(self, runs: set[str]) -> list[dict[str, Any]]:
        """The same of what these `runs` had stored when this was opened."""
        return [row for row in self._outcomes(sorted(self._passed)) if row["run_id"] in runs]

    def _outcomes(self, paths: list[str]) -> list[dict[str, Any]]:
        columns = [*KEY, "source_fingerprint", "run_id", "status", "attempt", "error", "depth", "finished_at"]
        rows = []
        for path, source in self._opened("reads", paths):
            rows += self._read(path, source, columns)
        return rows

    def _read(self, path: str, source: Any, columns: list[str]) -> list[dict[str, Any]]:
        """Rows of a file of `reads`, which may have come a moment ago and be anybody's."""
        ours = arrow_schema("reads")
        schema = pa.schema([ours.field(name) for name in columns])
        with self._readable(path):
            size = size_of(source, "reads")
        self._count("reads", path, size)
        with self._readable(path):
            return [row for batch in batches_of(source, schema) for row in batch.to_pylist()]

    def _count(self, table: str, path: str, size: FileSize) -> None:
        """Raise StoreError where a table is larger than any run's, with this file."""
        sizes = self._sizes.setdefault(table, {})
        sizes[path] = size
        if why := too_large(table, sizes):
            del sizes[path]  # it may be moved away
            raise DamagedError(f"{self._named}: {why}")

    def read_text(self, path: str) -> str | None:
        """A document that `write_text` stored; None where there is none.

        Raises:
            StoreError: it cannot be read, or is larger than any that is written.
        """
        whole = f"{self._root}/{path}"
        try:
            if self._local:
                raw = read_file(Path(whole), _DOCUMENT_BYTES)
            else:
                raw = bytes(self._fs.cat_file(whole, start=0, end=_DOCUMENT_BYTES + 1))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise StoreError(f"{self._named}: {path} cannot be read ({refusal(error)})") from error
        if len(raw) > _DOCUMENT_BYTES or raw.count(b"{") + raw.count(b"[") > MAX_OBJECTS:
            raise StoreError(
                f"{self._named}: {path} has more than {_DOCUMENT_BYTES:,} bytes or {MAX_OBJECTS:,} lists; no run "
                "writes that: move it away"
            )
        return raw.decode("utf-8", "replace")

    def run_ids(self) -> list[str]:
        """The runs that have a folder here, oldest first.

        Raises:
            StoreError: they cannot be listed.
        """
        try:
            listed = self._fs.ls(f"{self._root}/runs", detail=False, refresh=True)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise StoreError(f"{self._named}: its runs cannot be listed ({refusal(error)})") from error
        return sorted(name for path in listed if not is_hidden(name := path.rstrip("/").rsplit("/", 1)[-1]))

    def _files(self, table: str) -> list[str]:
        folder = f"{self._root}/{table}"
        try:
            listed = self._fs.ls(folder, detail=True, refresh=True)  # what others wrote meanwhile is there too
        except FileNotFoundError:
            return []
        files = (entry["name"] for entry in listed if entry["type"] != "directory")
        return sorted(path for path in files if path.endswith(".parquet") and not is_hidden(path))

    def _sources(self, table: str) -> list[tuple[str, Any]]:
        """(path, what pyarrow opens) of a table's files."""
        return self._opened(table, self._files(table))

    def _opened(self, table: str, files: list[str]) -> list[tuple[str, Any]]:
        """The same of these `files`; remote ones are fetched together."""
        if self._local or not files:
            return [(path, path) for path in files]
        try:
            return [(path, io.BytesIO(data)) for path, data in self._fs.cat(files).items()]
        except Exception as error:
            raise StoreError(f"{self._named}: {table} cannot be read ({refusal(error)})") from error

    def _footers(self, table: str) -> list[tuple[str, Any]]:
        """(path, what pyarrow reads a schema from) of a table's files; of remote ones only the end."""
        files = self._files(table)
        if self._local or not files:
            return [(path, path) for path in files]
        ends = self._fs.cat_ranges(files, [-_FOOTER_BYTES] * len(files), [None] * len(files), on_error="return")
        return [(p, io.BytesIO(end if isinstance(end, bytes) else b"")) for p, end in zip(files, ends, strict=True)]

    @contextlib.contextmanager
    def _readable(self, path: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
            raise DamagedError(f"{self._named}: {path} cannot be read as parquet; move it away") from error
