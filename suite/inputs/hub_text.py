"""Text of a Hub dataset, streamed from its parquet files: `DATASET[:CONFIG][:SPLIT]`."""

from collections.abc import Iterator
from typing import Any

from deadbench.suite.errors import reason_of
from deadbench.suite.storage import is_hidden


class DatasetError(ValueError):
    """A Hub dataset that cannot be read as text; one line."""


def read_hub_text(spec: str, filesystem: Any = None) -> Iterator[str]:
    """Yield the documents of the first text column, file by file, row group by row group.

    The parquet files are the dataset's own, or those that the Hub makes of every dataset (`refs/convert/parquet`).

    Args:
        spec: dataset id, then optionally the configuration and the split (default: the first one, and `train`).
        filesystem: fsspec file system of the Hub; another one in tests.

    Raises:
        DatasetError: the dataset cannot be reached, has no parquet files, or no text column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    dataset, config, split = (*spec.split(":"), "", "")[:3]
    if filesystem is None:
        from huggingface_hub import HfFileSystem

        filesystem = HfFileSystem()
    try:
        files = _parquet_files(filesystem, dataset, config, split or "train")
    except Exception as error:
        raise DatasetError(f"input 'hf:{spec}' cannot be reached ({reason_of(error)})") from error
    if not files:
        raise DatasetError(f"input 'hf:{spec}': no parquet files for that configuration and split")
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


def _parquet_files(filesystem: Any, dataset: str, config: str, split: str) -> list[str]:
    """Parquet files whose path names the split and, if given, the configuration."""
    for revision in ("", "@refs%2Fconvert%2Fparquet"):
        root = f"datasets/{dataset}{revision}"
        found = sorted(path for path in filesystem.glob(f"{root}/**/*.parquet") if not is_hidden(path))
        below = [(path, path.removeprefix(root).strip("/")) for path in found]
        chosen = [path for path, rest in below if split in rest and (not config or f"{config}/" in f"{rest}/")]
        if chosen and not config:
            first = chosen[0].rsplit("/", 1)[0]
            chosen = [path for path in chosen if path.rsplit("/", 1)[0] == first]
        if chosen:
            return chosen
    return []
