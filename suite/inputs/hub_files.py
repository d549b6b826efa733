"""Parquet files of a Hub dataset, `DATASET[:CONFIG][:SPLIT]`: where they are, and whether they can be had."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from deadbench.suite.errors import reason_of
from deadbench.suite.storage import is_hidden
from deadbench.suite.table_pages import groups_of

_MAGIC = b"PAR1"  # the last bytes of a parquet file
_MOST_HELD = 2**28  # bytes of values of which each takes up what it shares


class DatasetError(ValueError):
    """A Hub dataset that cannot be read; one line."""


def dataset_files(spec: str, filesystem: Any = None) -> tuple[Any, list[str]]:
    """The file system of the Hub, and the parquet files of a dataset on it, in order.

    They are the dataset's own, or those that the Hub makes of every dataset (`refs/convert/parquet`).

    Args:
        spec: dataset id, then optionally the configuration and the split (default: the first one, and `train`).
        filesystem: fsspec file system of the Hub; another one in tests.

    Raises:
        DatasetError: the dataset cannot be reached, or has no parquet files.
    """
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
    return filesystem, files


@lru_cache
def why_unreachable(spec: str) -> str | None:
    """Why a dataset cannot be read from here (no network, gated, not there), in one line; None where it can.

    The end of its first file is read: of a gated dataset everything is listed, and nothing can be read.
    """
    try:
        filesystem, files = dataset_files(spec)
        if filesystem.cat_file(files[0], start=-len(_MAGIC)) != _MAGIC:
            return f"{files[0]}: not a parquet file"
    except DatasetError as error:
        return str(error)
    except Exception as error:  # whatever the Hub's client raises
        return f"input 'hf:{spec}' cannot be reached ({reason_of(error)})"
    return None


def values_once(file: Any, column: str, rows: int) -> Iterator[Any]:
    """A column, `rows` of them at a time: what many rows share, as parquet stores it once, is held once."""
    import pyarrow.parquet as pq

    chunks = [chunk for group in groups_of(file) for chunk in group.chunks if chunk.path.partition(".")[0] == column]
    ways = {way for chunk in chunks for way in chunk.ways}
    if "DELTA_BYTE_ARRAY" in ways:  # each value is what it adds to the one before
        rows = max(1, min(rows, _MOST_HELD // max(1, *(chunk.unpacked for chunk in chunks))))
    paths = {chunk.path for chunk in chunks if chunk.width is None}
    shared = [] if any(way.startswith("DELTA_") for way in ways) else sorted(paths)
    file.seek(0)
    for batch in pq.ParquetFile(file, read_dictionary=shared).iter_batches(batch_size=rows, columns=[column]):
        yield batch.column(0)


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
