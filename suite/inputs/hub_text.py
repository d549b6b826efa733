"""Text of a Hub dataset, streamed from its parquet files: `DATASET[:CONFIG][:SPLIT]`."""

from collections.abc import Iterator
from typing import Any

from deadbench.suite.inputs.hub_files import DatasetError, dataset_files, values_once

_ROWS = 256  # documents in a piece
_LONGEST = 2**24  # letters of one


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
            for batch in values_once(file, column, _ROWS):
                yield from _pieces(text.as_py() for text in batch)


def _pieces(texts: Iterator[str | None]) -> Iterator[str]:
    """Documents one below another, in one piece unless they are long."""
    held, letters = list[str](), 0
    for text in filter(None, texts):
        for start in range(0, len(text), _LONGEST):
            if letters > _LONGEST:
                yield "\n".join(held) + "\n"
                held, letters = [], 0
            held.append(text[start : start + _LONGEST])
            letters += len(held[-1])
    yield "\n".join(held) + "\n"
