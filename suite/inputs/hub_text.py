"""Text of a Hub dataset, streamed from its parquet files: `DATASET[:CONFIG][:SPLIT]`."""

from collections.abc import Iterator
from typing import Any

from deadbench.suite.inputs.hub_files import DatasetError, dataset_files


def read_hub_text(spec: str, filesystem: Any = None) -> Iterator[str]:
    """Yield the documents of the first text column, file by file, row group by row group.

    Args:
        spec: as `dataset_files` has it.
        filesystem: fsspec file system of the Hub; another one in tests.

    Raises:
        DatasetError: the dataset cannot be reached, has no parquet files, or no text column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, files = dataset_files(spec, filesystem)
    for path in files:
        with filesystem.open(path) as file:
            table = pq.ParquetFile(file)
            names = [
                f.name for f in table.schema_arrow if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
            ]
            if not names:
                raise DatasetError(
                    f"input 'hf:{spec}' has no text column; its columns: {', '.join(table.schema_arrow.names)}"
                )
            column = "text" if "text" in names else names[0]
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                yield "\n".join(text for text in batch.column(0).to_pylist() if text) + "\n"
