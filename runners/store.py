"""Result sets: `OUT/<table>/*.parquet`, each file written whole or not at all, by the driver alone.

A local file is written aside, flushed to the disk and renamed into place; an object store gets one write of the
finished buffer. The row of `reads` goes last: it is what makes a read exist.
"""

import io
import os
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from suite.schema import KEY, SCHEMA_VERSION, TABLES


class StoreError(ValueError):
    """A result set that cannot be written or continued; one line, exit code 2."""


class ResultStore:
    """One result set, in a local folder or behind an fsspec URI."""

    def __init__(self, location: str):
        """Open or create the result set.

        Raises:
            StoreError: not writable, or written by a newer version.
        """
        self.location = location
        try:
            self._fs, root = fsspec.core.url_to_fs(location)
        except (ImportError, ValueError) as error:
            raise StoreError(f"--out {location}: {error}") from error
        self._root, self._local = root.rstrip("/"), "file" in (self._fs.protocol, *self._fs.protocol)
        try:
            self._fs.makedirs(self._root, exist_ok=True)
            self._probe()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StoreError(f"--out {location}: cannot be written ({reason}); choose another folder") from error
        self._check_version()

    def finished(self) -> set[tuple[Any, ...]]:
        """Identities (key and fingerprint) of the reads that are done and need no second measurement."""
        columns = [*KEY, "source_fingerprint", "status"]
        identities = set()
        for path in self._files("reads"):
            for row in self._read(path, columns).to_pylist():
                if row["status"] == "ok":
                    identities.add(tuple(row[name] for name in columns[:-1]))
        return identities

    def write(self, tables: dict[str, pa.Table], stamp: str | None = None) -> None:
        """Store the tables of one read, `reads` last. With the same `stamp` again, what is there is replaced.

        Raises:
            OSError: the disk is full or gone; nothing half-written is left where readers look.
        """
        stamp = stamp or f"{time.time_ns()}-{uuid.uuid4().hex[:12]}"
        for name in sorted(tables, key=lambda table: table == "reads"):
            if tables[name].num_rows:
                buffer = io.BytesIO()
                pq.write_table(tables[name], buffer)
                self._write_whole(f"{name}/{stamp}.parquet", buffer.getvalue())

    def write_text(self, path: str, text: str) -> None:
        """Store a document beside the tables, in place of what was there.

        Raises:
            OSError: as `write`.
        """
        self._write_whole(path, text.encode())

    def _write_whole(self, path: str, contents: bytes) -> None:
        target = f"{self._root}/{path}"
        if not self._local:
            self._fs.pipe_file(target, contents)
            return
        final, aside = Path(target), Path(self._root) / "_tmp" / uuid.uuid4().hex
        for folder in (final.parent, aside.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(final)
        finally:
            aside.unlink(missing_ok=True)
        descriptor = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the new name itself
        finally:
            os.close(descriptor)

    def _probe(self) -> None:
        """Fail now, not after the first hour: write a small file and take it away."""
        name = f"{self._root}/.deadbench-{uuid.uuid4().hex[:8]}"
        self._fs.pipe_file(name, b"")
        self._fs.rm_file(name)

    def _files(self, table: str) -> list[str]:
        folder = f"{self._root}/{table}"
        if not self._fs.exists(folder):
            return []
        return sorted(p for p in self._fs.ls(folder, detail=False) if p.endswith(".parquet"))

    def _check_version(self) -> None:
        for table in TABLES:
            for path in self._files(table):
                metadata = self._open(path).schema_arrow.metadata or {}
                version = metadata.get(b"schema_version", b"").decode()
                if not version.isdigit():
                    raise StoreError(f"--out {self.location}: {path} is not a deadbench result; choose another folder")
                if int(version) > SCHEMA_VERSION:
                    raise StoreError(
                        f"--out {self.location}: written by a newer deadbench (schema {version}, this one writes "
                        f"{SCHEMA_VERSION}); upgrade deadbench or choose another folder"
                    )

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(io.BytesIO(self._fs.cat_file(path)))
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"--out {self.location}: {path} cannot be read as parquet; move it away") from error

    def _read(self, path: str, columns: list[str]) -> pa.Table:
        return self._open(path).read(columns=columns)
