"""Rows of a parquet file, by Arrow: what it cannot decode raises, where polars would end the process."""

from collections.abc import Iterator, Mapping
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

BATCH_ROWS = 16_384
_VERSION_DIGITS = 10


def batches_of(source: str | BinaryIO, schema: pa.Schema, rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """The rows of a file that `size_of` has passed, with the columns of `schema`: null where the file lacks one.

    Args:
        source: a path, or an open file.
        rows: at most, of a batch.

    Raises:
        pa.ArrowException, OSError, ValueError, MemoryError: it cannot be decoded, or a column is of another type.
    """
    if not isinstance(source, str):
        source.seek(0)
    with pq.ParquetFile(source, pre_buffer=False) as file:
        for batch in file.iter_batches(rows, columns=schema.names, use_threads=False):
            batch.validate(full=True)  # polars believes that texts are UTF-8 and that lists end where they say
            yield _with_columns(batch, schema)


def schema_version(metadata: Mapping[bytes, bytes] | None) -> int | None:
    """The version of our schema that a file says it was written with; None of a stranger's."""
    version = (metadata or {}).get(b"schema_version", b"").decode(errors="replace")
    return int(version) if version.isdecimal() and len(version) < _VERSION_DIGITS else None


def _with_columns(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    if batch.schema.equals(schema):
        return batch
    there = {field.name: place for place, field in enumerate(batch.schema)}
    columns = [
        batch.column(there[field.name]) if field.name in there else pa.nulls(len(batch), field.type) for field in schema
    ]
    if len(there) < batch.num_columns or any(
        each.type != field.type for each, field in zip(columns, schema, strict=True)
    ):
        raise ValueError("a column twice, or of another type")
    return pa.RecordBatch.from_arrays(columns, schema=schema)
