"""Result sets: `OUT/<table>/*.parquet`, each file written whole or not at all, by the driver alone.

A local file is written aside, flushed to the disk and renamed into place, and so is one on a remote file system that
renames (sftp, hdfs); an object store gets one write of the finished buffer, which it publishes when it has all of it.
Names are unique, so that two runs may write to one place. The row of `reads` goes last: it is what makes a read exist.
"""

import io
import time
import uuid
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deadbench.runners.results.reader import ResultReader, StoreError
from deadbench.suite.schema import KEY, SCHEMA_VERSION, TABLES
from deadbench.suite.storage import refusal, renames, sweep, write_whole
from deadbench.suite.table_files import schema_version
from deadbench.suite.table_sizes import FileSize, rows_of

__all__ = ["ResultStore", "StoreError"]

_TICK = timedelta(milliseconds=1)


class ResultStore(ResultReader):
    """One result set, in a local folder or behind an fsspec URI."""

    def __init__(self, location: str):
        """Open or create the result set.

        Raises:
            StoreError: not writable, or written by a newer version.
        """
        super().__init__(location, "--out ")
        self._renames = renames(self._fs)
        try:
            self._probe()
        except Exception as error:
            advice = "choose another folder" if self._local else "check bucket, path and credentials"
            raise StoreError(f"{self._named}: cannot be written ({refusal(error)}); {advice}") from error
        self._passed = set(self._files("reads"))  # what was there when this run began, and what was looked at since
        self._check_version()

    def write(self, tables: dict[str, pa.Table], stamp: str | None = None) -> None:
        """Store the tables of one read, `reads` last. With the same `stamp` again, what is there is replaced.

        Raises:
            OSError: the disk is full or gone, or the store refuses; nothing half-written is left where readers look.
        """
        stamp = stamp or f"{time.time_ns()}-{uuid.uuid4().hex[:12]}"
        for name in sorted(tables, key=lambda table: table == "reads"):
            if tables[name].num_rows:
                buffer = io.BytesIO()
                pq.write_table(tables[name] if name != "reads" else self._newest(tables[name]), buffer)
                if name == "reads":
                    self._passed.add(f"{self._root}/{name}/{stamp}.parquet")
                self._write_whole(f"{name}/{stamp}.parquet", buffer.getvalue())

    def _newest(self, reads: pa.Table) -> pa.Table:
        """Rows that come after those of their keys which `finished` saw, where this clock is behind those rows' ends.

        The newest row of a key is told by its end, and a clock may have been set back, or be another machine's.
        """
        if not self._ahead:
            return reads
        place = reads.schema.get_field_index("finished_at")
        ends = reads.column(place).to_pylist()
        for number, row in enumerate(reads.select(KEY).to_pylist()):
            ahead = self._ahead.get(tuple(row[name] for name in KEY))
            if ahead is not None and ends[number] is not None and ends[number] <= ahead:
                ends[number] = ahead + _TICK
        field = reads.schema.field(place)
        return reads.set_column(place, field, pa.array(ends, field.type))

    def write_text(self, path: str, text: str) -> None:
        """Store a document beside the tables, in place of what was there.

        Raises:
            OSError: as `write`.
        """
        self._write_whole(path, text.encode())

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
            sweep([*Path(self._root, "_tmp").glob("*"), *Path(self._root).glob(".deadbench-*")])

    def _check_version(self) -> None:
        for table in TABLES:
            for path, source in self._footers(table):
                with self._readable(path):
                    footer = pq.read_metadata(source)
                self._count(table, path, FileSize(rows_of(footer)))
                version = schema_version(footer.metadata)
                if version is None:
                    raise StoreError(f"{self._named}: {path} is not a deadbench result; choose another folder")
                if version > SCHEMA_VERSION:
                    raise StoreError(
                        f"{self._named}: written by a newer deadbench (schema {version}, this one writes "
                        f"{SCHEMA_VERSION}); upgrade deadbench or choose another folder"
                    )
