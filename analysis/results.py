"""Opening a result set: `LOCATION/<table>/*.parquet` as one lazy frame with the columns of `suite/schema.py`.

Every file's footer is checked first, so that a stranger's, a torn or a newer file is named and not averaged in.
"""

import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import resources
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from polars.io.plugins import register_io_source

from deadbench.analysis.panics import untold
from deadbench.analysis.steps import STEPS
from deadbench.suite.errors import message
from deadbench.suite.schema import KEY, SCHEMA_VERSION, TABLES, arrow_schema
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import REFERENCE, is_hidden, is_local, open_place, refusal
from deadbench.suite.table_files import BATCH_ROWS, batches_of, schema_version
from deadbench.suite.table_pages import PagesError
from deadbench.suite.table_rows import check_named, check_parallel, with_known_numbers
from deadbench.suite.table_sizes import FileSize, size_of, too_large

_FRAME_BYTES = 2**26  # decoded together
_MOST_LETTERS, _FIRST_LETTERS = 2**13, 2**12  # of one text, and of what is left of a longer one; ours have a thousand
_KEPT_BYTES = 2**26  # of a table that is decoded once: many files of a few rows take longer to open than to hold
# Microseconds from 1970 of the years that there are dates of; what a stranger's file has beyond is no time.
_FIRST, _LAST = (
    (datetime(*day, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    for day in ((1, 1, 1), (9999, 12, 31))
)


class ResultsError(ValueError):
    """A result set or a request that cannot be answered; one line that says where, what, and what to do."""


def scan(locations: str | Sequence[str], table: str = "reads") -> pl.LazyFrame:
    """Table `table` of the result sets at `locations` (folders or fsspec URIs), all rows of all files.

    Columns that an older file lacks are null; columns that this version does not know are left out. A result set
    without rows in a table other than `reads` gives an empty frame: a read of parameters has no spectrum.

    Raises:
        ResultsError: no such folder, not a result set, a torn file, or one written by a newer deadbench.
    """
    if table not in TABLES:
        raise ResultsError(f"a result set has no table {table!r}; choose {', '.join(TABLES)}")
    if isinstance(locations, str):
        return _scan_one(locations, table)
    return pl.concat([_scan_one(location, table) for location in dict.fromkeys(locations)])


def _scan_one(location: str, table: str) -> pl.LazyFrame:
    filesystem, files = _list_files(location, table)
    if not files:
        return pl.LazyFrame(schema=_polars_schema(table))
    sources: list[Any]
    if is_local(filesystem):
        sources = list(files)
    else:
        # Through fsspec, which has the credentials.
        with _Explained(location):
            sources = list(filesystem.cat(files).values())
    named = [
        (f"{shown_place(location)}: {table}/{_name(path)}", source) for path, source in zip(files, sources, strict=True)
    ]
    sizes = {_name(path): _check_file(*each, table) for path, each in zip(files, named, strict=True)}
    if why := too_large(table, sizes):
        raise ResultsError(f"{shown_place(location)}: {why}")
    rows = _Rows(table, named, list(sizes.values()))
    found = register_io_source(rows, schema=_polars_schema(table), is_pure=True)
    return found.with_columns(
        pl.when(pl.col(name).to_physical().is_between(_FIRST, _LAST)).then(pl.col(name))
        for name, dtype in _polars_schema(table).items()
        if dtype == pl.Datetime
    )


class _Rows:
    """The rows of a table's files for polars, which decodes none of them itself."""

    def __init__(self, table: str, files: Sequence[tuple[str, Any]], sizes: Sequence[FileSize]):
        """`files`: what errors call each, and its path or its bytes."""
        self._table, self._schema, self._files, self._sizes = table, arrow_schema(table), files, sizes
        self._small = sum(each.values for each in sizes) <= _KEPT_BYTES
        self._kept: list[pa.Table] | None = None

    def __call__(
        self, columns: list[str] | None, predicate: pl.Expr | None, count: int | None, _batch_rows: int | None
    ) -> Iterator[pl.DataFrame]:
        """Frames of these columns (all for None) of the rows that the predicate keeps, `count` at most, in order."""
        names = self._schema.names if columns is None else columns
        left = sys.maxsize if count is None else count
        for table in STEPS.each(self._tables(names)):
            frame = pl.DataFrame(pl.from_arrow(table))
            frame = (frame if predicate is None else frame.filter(predicate)).head(left)
            left -= len(frame)
            yield frame
            if left <= 0:
                return

    def _tables(self, names: list[str]) -> Iterator[pa.Table]:
        """The rows, some files at a time; of a small table all columns at once, which later scans of it have too."""
        if not self._small:
            yield from self._decoded(pa.schema([self._schema.field(name) for name in names]))
            return
        if self._kept is None:
            self._kept = [each.combine_chunks() for each in self._decoded(self._schema)]
        yield from (each.select(names) for each in self._kept)

    def _decoded(self, schema: pa.Schema) -> Iterator[pa.Table]:
        held, share = list[pa.RecordBatch](), 0.0  # of a frame
        for (where, source), size in zip(self._files, self._sizes, strict=True):
            # Of its own: a table of many small files may have a large one.
            frame_rows = max(1, min(BATCH_ROWS, _FRAME_BYTES * size.rows // (size.values or 1)))
            try:
                for batch in batches_of(_opened(source), schema, frame_rows):
                    check_named(self._table, batch)
                    check_parallel(self._table, batch)
                    held.append(with_known_numbers(_with_short_texts(batch)))
                    share += len(batch) / frame_rows
                    if share >= 1:
                        yield pa.Table.from_batches(held, schema)
                        held, share = [], 0.0
            except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
                raise ResultsError(
                    f"{where} cannot be read to its end ({message(error, 200)}); move it away"
                ) from error
        yield pa.Table.from_batches(held, schema)


def latest(reads: pl.LazyFrame) -> pl.LazyFrame:
    """One row a key: the newest ok row, else the newest failed one; `finished_at` tells newest, nulls are oldest.

    Null is a value of a key like any other. NaN and infinities, which no writer of ours leaves, become null.
    """
    newest_first = [pl.col("status").eq_missing("ok"), pl.col("finished_at"), pl.col("attempt"), pl.col("run_id")]
    ordered = reads.sort(newest_first, descending=True, nulls_last=True, maintain_order=True)
    return finite(ordered.unique(KEY, keep="first", maintain_order=True))


def finite(frame: pl.LazyFrame) -> pl.LazyFrame:
    """The frame with null for every NaN and infinity."""
    real = pl.selectors.float()
    return frame.with_columns(pl.when(real.is_finite()).then(real))


def collected(frame: pl.LazyFrame) -> pl.DataFrame:
    """The frame, computed.

    Raises:
        ResultsError: a file whose footer was whole and whose data are not, or that has gone meanwhile.
    """
    return collected_all([frame])[0]


def collected_all(frames: Sequence[pl.LazyFrame]) -> list[pl.DataFrame]:
    """The frames, computed together; raises like `collected`."""
    try:
        with untold():
            return pl.collect_all(frames)
    except BaseException as error:
        STEPS.wait()
        if not isinstance(error, (pl.exceptions.PolarsError, pl.exceptions.PanicException)):
            raise
        reason = message(error, 300)
        raise ResultsError(f"the result set cannot be read to its end ({reason}); move the file away") from error


def place_of(location: str) -> str:
    """Where a result set lies: `location` itself, or what comes with deadbench; a folder so called is ./reference."""
    if location != REFERENCE:
        return location
    return str(resources.files("deadbench.suite") / "data" / REFERENCE)


def _list_files(location: str, table: str) -> tuple[Any, list[str]]:
    """The file system and the table's parquet files in order of their names, which is order of time."""
    shown = shown_place(location)
    with _Explained(location):
        filesystem, root = open_place(place_of(location))
        if filesystem.isfile(root):
            raise ResultsError(f"{shown}: is a file; give the result set's folder")
        if not filesystem.exists(root):
            raise ResultsError(f"{shown}: no such result set; `deadbench run --out {shown}` makes one")
        files = {name: _parquet_files(filesystem, f"{root}/{name}") for name in {"reads", table}}
    if not files["reads"]:
        raise ResultsError(
            f"{shown}: not a result set, or one without reads yet (no reads/*.parquet); "
            "give the folder that was given to `deadbench run --out`"
        )
    return filesystem, files[table]


def _parquet_files(filesystem: Any, folder: str) -> list[str]:
    if not filesystem.isdir(folder):
        return []
    entries = [(entry["name"], entry["type"]) for entry in filesystem.ls(folder, detail=True, refresh=True)]
    names = [name for name, kind in entries if kind != "directory" and name.endswith(".parquet")]
    return sorted(name for name in names if not is_hidden(name))


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _opened(source: str | bytes) -> str | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _with_short_texts(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with a stranger's longest texts cut: every table and plot goes through all of each name."""
    for place, column in enumerate(batch.columns):
        if pa.types.is_string(column.type) and (pc.max(pc.binary_length(column)).as_py() or 0) > _MOST_LETTERS:
            short = pa.array(map(_short, column.to_pylist()), pa.string())
            batch = batch.set_column(place, batch.schema.field(place), short)
    return batch


def _short(words: str | None) -> str | None:
    """A text's beginning where it is too long, with what tells it from another that begins so."""
    if words is None or len(words) <= _MOST_LETTERS:
        return words
    told = hashlib.sha256(words.encode()).hexdigest()[:16]
    return f"{words[:_FIRST_LETTERS]}… ({len(words):,} letters, {told})"


def _check_file(where: str, source: str | bytes, table: str) -> FileSize:
    """What a file comes to; one that is torn, a stranger's, or newer than this version is refused."""
    try:
        footer = pq.read_metadata(_opened(source))
        schema = footer.schema.to_arrow_schema()
        size = size_of(_opened(source), table)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:  # names that are no text, too
        reason = "torn, or not parquet"
        if isinstance(error, PagesError):
            reason = message(error, 100)
        elif isinstance(error, OSError) and error.errno:
            reason = os.strerror(error.errno)
        raise ResultsError(f"{where} cannot be read as parquet ({reason}); move it away") from error
    version = schema_version(schema.metadata)
    if version is None:
        raise ResultsError(f"{where} is not a deadbench result (no schema_version); move it away")
    if version > SCHEMA_VERSION:
        raise ResultsError(
            f"{where} was written by a newer deadbench (schema {version}, this one reads {SCHEMA_VERSION}): "
            "upgrade deadbench"
        )
    ours = arrow_schema(table)
    if schema.equals(ours):
        return size
    types = {field.name: field.type for field in ours}
    for field in schema:
        if field.type != (expected := types.get(field.name, field.type)):
            raise ResultsError(f"{where}: column {field.name!r} is {field.type}, expected {expected}; move it away")
    return size


@cache
def _polars_schema(table: str) -> pl.Schema:
    empty = pl.from_arrow(arrow_schema(table).empty_table())
    assert isinstance(empty, pl.DataFrame)
    return empty.schema


class _Explained:
    """Turns what fsspec and its backends raise for `location` into one line."""

    def __init__(self, location: str):
        self._location = shown_place(location)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ResultsError) or not isinstance(error, Exception):  # stores raise what they like
            return
        raise ResultsError(f"{self._location}: cannot be opened ({refusal(error)}); check the path or URI") from error
