"""Result sets: `OUT/<table>/*.parquet`, each file written whole or not at all, by the driver alone.

A local file is written aside, flushed to the disk and renamed into place, and so is one on a remote file system that
renames (sftp, hdfs); an object store gets one write of the finished buffer, which it publishes when it has all of it.
Names are unique, so that two runs may write to one place. The row of `reads` goes last: it is what makes a read exist.
"""

import contextlib
import io
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deadbench.suite.schema import KEY, MAX_ROWS, SCHEMA_VERSION, TABLES
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import is_hidden, is_local, open_place, refusal, renames, write_whole

_OLD_SECONDS = 86_400.0  # of a file that was on its way when its writer was killed
_FOOTER_BYTES = 2**17  # as much of a remote file's end as holds its schema


class StoreError(ValueError):
    """A result set that cannot be written or continued; one line, exit code 2."""


class ResultStore:
    """One result set, in a local folder or behind an fsspec URI."""

    def __init__(self, location: str):
        """Open or create the result set.

        Raises:
            StoreError: not writable, or written by a newer version.
        """
        self.location = shown_place(location)
        try:
            self._fs, self._root = open_place(location)
        except Exception as error:
            raise StoreError(f"--out {self.location}: {refusal(error)}") from error
        self._local = is_local(self._fs)
        self._renames = renames(self._fs)
        try:
            self._probe()
        except Exception as error:
            advice = "choose another folder" if self._local else "check bucket, path and credentials"
            raise StoreError(f"--out {self.location}: cannot be written ({refusal(error)}); {advice}") from error
        self._passed = set(self._files("reads"))  # what was there when this run began, and what was looked at since
        self._check_version()

    def place(self) -> tuple[Any, str]:
        """The file system, and the result set's path on it."""
        return self._fs, self._root

    def finished(self) -> set[tuple[Any, ...]]:
        """Identities (key and fingerprint) of the reads that are done and need no second measurement."""
        columns = [*KEY, "source_fingerprint", "status"]
        identities = set()
        for path, source in self._sources("reads"):
            with self._readable(path):
                rows = pq.read_table(source, columns=columns, partitioning=None).to_pylist()
            identities |= {tuple(row[name] for name in columns[:-1]) for row in rows if row["status"] == "ok"}
        return identities

    def come(self) -> list[dict[str, Any]]:
        """Outcomes of reads (key, fingerprint, run, status, error, depth) that others stored meanwhile, each once."""
        if self._local:
            # NFS remembers listings for up to a minute, but not of a folder that this machine has just changed.
            with contextlib.suppress(OSError):
                os.utime(f"{self._root}/reads")
        new = [path for path in self._files("reads") if path not in self._passed]
        self._passed |= set(new)
        return self._outcomes(new)

    def earlier(self, runs: set[str]) -> list[dict[str, Any]]:
        """The same of what these `runs` had stored when this was opened."""
        return [row for row in self._outcomes(sorted(self._passed)) if row["run_id"] in runs]

    def _outcomes(self, paths: list[str]) -> list[dict[str, Any]]:
        columns = [*KEY, "source_fingerprint", "run_id", "status", "error", "depth"]
        rows = []
        for path, source in self._opened("reads", paths):
            with self._readable(path):
                rows += pq.read_table(source, columns=columns, partitioning=None).to_pylist()
        return rows

    def write(self, tables: dict[str, pa.Table], stamp: str | None = None) -> None:
        """Store the tables of one read, `reads` last. With the same `stamp` again, what is there is replaced.

        Raises:
            OSError: the disk is full or gone, or the store refuses; nothing half-written is left where readers look.
        """
        stamp = stamp or f"{time.time_ns()}-{uuid.uuid4().hex[:12]}"
        for name in sorted(tables, key=lambda table: table == "reads"):
            if tables[name].num_rows:
                buffer = io.BytesIO()
                pq.write_table(tables[name], buffer)
                if name == "reads":
                    self._passed.add(f"{self._root}/{name}/{stamp}.parquet")
                self._write_whole(f"{name}/{stamp}.parquet", buffer.getvalue())

    def write_text(self, path: str, text: str) -> None:
        """Store a document beside the tables, in place of what was there.

        Raises:
            OSError: as `write`.
        """
        self._write_whole(path, text.encode())

    def read_text(self, path: str) -> str | None:
        """A document that `write_text` stored; None where there is none.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{path}")).decode("utf-8", "replace")
        except FileNotFoundError:
            return None
        except Exception as error:
            raise StoreError(f"--out {self.location}: {path} cannot be read ({refusal(error)})") from error

    def _write_whole(self, path: str, contents: bytes) -> None:
        target, aside = f"{self._root}/{path}", f"{self._root}/_tmp/{uuid.uuid4().hex}"
        try:
            if self._renames:
                for name in (target, aside):
                    self._fs.makedirs(name.rpartition("/")[0], exist_ok=True)
            write_whole(target, contents, self._fs, aside)
        except Exception as error:
            if self._local:
                raise
            raise OSError(f"{self.location}/{path}: not stored ({refusal(error)}); nothing of it is there") from error

    def _probe(self) -> None:
        """Fail now, not after the first hour: write a small file and take it away."""
        if "hf" in (self._fs.protocol, *self._fs.protocol):  # each write would be a commit
            self._fs.ls("/".join(self._root.split("/")[:3]), detail=False)
            return
        if self._renames:
            self._fs.makedirs(self._root, exist_ok=True)  # elsewhere it would make buckets
        name = f"{self._root}/.deadbench-{uuid.uuid4().hex[:8]}"
        self._fs.pipe_file(name, b"")
        self._fs.rm_file(name)
        if self._local:
            self._sweep()

    def _sweep(self) -> None:
        """Remove what writers that were killed left; one that lives writes for seconds."""
        for path in (*Path(self._root, "_tmp").glob("*"), *Path(self._root).glob(".deadbench-*")):
            with contextlib.suppress(OSError):
                facts = path.lstat()
                if stat.S_ISREG(facts.st_mode) and time.time() - facts.st_mtime > _OLD_SECONDS:
                    path.unlink()

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
            raise StoreError(f"--out {self.location}: {table} cannot be read ({refusal(error)})") from error

    def _footers(self, table: str) -> list[tuple[str, Any]]:
        """(path, what pyarrow reads a schema from) of a table's files; of remote ones only the end."""
        files = self._files(table)
        if self._local or not files:
            return [(path, path) for path in files]
        ends = self._fs.cat_ranges(files, [-_FOOTER_BYTES] * len(files), [None] * len(files), on_error="return")
        return [(p, io.BytesIO(end if isinstance(end, bytes) else b"")) for p, end in zip(files, ends, strict=True)]

    def _check_version(self) -> None:
        for table in TABLES:
            for path, source in self._footers(table):
                with self._readable(path):
                    footer = pq.read_metadata(source)
                metadata = footer.metadata or {}
                if footer.num_rows > MAX_ROWS:
                    raise StoreError(
                        f"--out {self.location}: {path} has {footer.num_rows:,} rows, more than {MAX_ROWS:,}; no run "
                        "writes so many: move it away"
                    )
                version = metadata.get(b"schema_version", b"").decode()
                if not version.isdigit():
                    raise StoreError(f"--out {self.location}: {path} is not a deadbench result; choose another folder")
                if int(version) > SCHEMA_VERSION:
                    raise StoreError(
                        f"--out {self.location}: written by a newer deadbench (schema {version}, this one writes "
                        f"{SCHEMA_VERSION}); upgrade deadbench or choose another folder"
                    )

    @contextlib.contextmanager
    def _readable(self, path: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"--out {self.location}: {path} cannot be read as parquet; move it away") from error
