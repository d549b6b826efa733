"""Pictures of a Hub dataset, streamed from its parquet files: `DATASET[:CONFIG][:SPLIT]`."""

from collections.abc import Iterator
from typing import Any

from deadbench.suite.inputs.hub_files import DatasetError, dataset_files, values_once

_ROWS = 16  # decoded one by one, fetched together


def read_hub_pictures(spec: str, filesystem: Any = None) -> Iterator[tuple[str, bytes]]:
    """Yield name and encoded bytes of the first column of pictures, in order.

    A column of pictures is what the library datasets writes: the bytes of a file beside its path; or bytes alone.

    Args:
        spec: as `dataset_files` has it.
        filesystem: fsspec file system of the Hub; another one in tests.

    Raises:
        DatasetError: the dataset cannot be reached, has no parquet files, no pictures, or only their paths.
    """
    import pyarrow.parquet as pq

    filesystem, files = dataset_files(spec, filesystem)
    for path in files:
        with filesystem.open(path) as file:
            table = pq.ParquetFile(file)
            column = next((field.name for field in table.schema_arrow if _holds_pictures(field.type)), None)
            if column is None:
                raise DatasetError(
                    f"input 'hf:{spec}' has no column of pictures; its columns: {', '.join(table.schema_arrow.names)}"
                )
            place = 0
            for batch in values_once(file, column, _ROWS):
                for cell in (each.as_py() for each in batch):
                    encoded = cell.get("bytes") if isinstance(cell, dict) else cell
                    if encoded is None:
                        raise DatasetError(f"input 'hf:{spec}': {path}, row {place} has no bytes of a picture")
                    yield f"hf:{spec}, row {place} of {path.rsplit('/', 1)[-1]}", encoded
                    place += 1


def _holds_pictures(column: Any) -> bool:
    import pyarrow as pa

    def is_bytes(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    if pa.types.is_struct(column):
        return any(column.field(place).name == "bytes" and is_bytes(column.field(place).type)
                   for place in range(column.num_fields))  # fmt: skip
    return is_bytes(column)
