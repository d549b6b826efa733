"""Opening a result set: `LOCATION/<table>/*.parquet` as one lazy frame with the columns of `suite/schema.py`.

Every file's footer is checked first, so that a stranger's, a torn or a newer file is named and not averaged in.
"""

import io
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import resources
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from deadbench.analysis.panics import untold
from deadbench.suite.errors import message
from deadbench.suite.schema import KEY, SCHEMA_VERSION, TABLES, arrow_schema
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import REFERENCE, is_hidden, is_local, open_place, refusal
from deadbench.suite.table_sizes import FileSize, size_of, too_large

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
        # Through fsspec, which has the credentials; polars would open a URI with a client of its own.
        with _Explained(location):
            sources = list(filesystem.cat(files).values())
    sizes = {
        _name(path): _check_file(location, path, source, table) for path, source in zip(files, sources, strict=True)
    }
    if why := too_large(table, sizes):
        raise ResultsError(f"{shown_place(location)}: {why}")
    # Neither the brackets nor the `key=value` of a folder's name mean anything here.
    found = pl.scan_parquet(
        sources,
        schema=_polars_schema(table),
        missing_columns="insert",
        extra_columns="ignore",
        glob=False,
        hive_partitioning=False,
    )
    return found.with_columns(
        pl.when(pl.col(name).to_physical().is_between(_FIRST, _LAST)).then(pl.col(name))
        for name, dtype in _polars_schema(table).items()
        if dtype == pl.Datetime
    )


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
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
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


def _check_file(location: str, path: str, source: str | bytes, table: str) -> FileSize:
    """What a file comes to; one that is torn, a stranger's, or newer than this version is refused."""
    where = f"{shown_place(location)}: {table}/{_name(path)}"
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        footer = pq.read_metadata(opened)
        schema = footer.schema.to_arrow_schema()
        size = size_of(footer, opened)
    except (pa.ArrowException, OSError, ValueError) as error:  # names that are no text, too
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "torn, or not parquet"
        raise ResultsError(f"{where} cannot be read as parquet ({reason}); move it away") from error
    version = (schema.metadata or {}).get(b"schema_version", b"").decode(errors="replace")
    if not version.isdecimal():
        raise ResultsError(f"{where} is not a deadbench result (no schema_version); move it away")
    if int(version) > SCHEMA_VERSION:
        raise ResultsError(
            f"{where} was written by a newer deadbench (schema {version}, this one reads {SCHEMA_VERSION}): "
            "upgrade deadbench"
        )
    ours = arrow_schema(table)
    for field in schema:
        expected = ours.field(field.name).type if field.name in ours.names else field.type
        if field.type != expected:
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
