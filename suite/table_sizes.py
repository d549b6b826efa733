"""How much the files of a table come to once they are read, found before they are; and what no run writes.

Rows that are alike take no room, and a long string, stored once, stands in any number of cells: a file of kilobytes can
be gigabytes. What a footer says of a whole file is not believed where it says otherwise of its parts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

# Of a table of one result set, in all its files. A row of `reads` is a read, and wide.
MAX_ROWS, MAX_READS = 10_000_000, 500_000
# Of values, where the files are small beside them; numbers are hardly compressed, what a run writes of names tenfold.
MAX_BYTES, _EXPANSION = 2**30, 50
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_VIEW = 16  # of a text, beside its letters
_ONCE = {"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"}  # each text is stored where it stands
_COUNTED = {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}  # without writing any twice
_BATCH_ROWS = 65_536


class FileSize(NamedTuple):
    """Of one file: its rows, its bytes, and those of its values once read."""

    rows: int
    stored: int = 0
    values: int = 0


def too_large(table: str, files: Mapping[str, FileSize]) -> str | None:
    """Why a table of these files, by their names, is no run's, in one line; None where it may be."""
    rows, most = sum(each.rows for each in files.values()), MAX_READS if table == "reads" else MAX_ROWS
    if rows > most:
        name = max(files, key=lambda each: files[each].rows)
        return (
            f"{table} has {rows:,} rows, {files[name].rows:,} of them in {name}, more than {most:,}; no run writes so "
            "many: move it away"
        )
    values, stored = sum(each.values for each in files.values()), sum(each.stored for each in files.values())
    if values > _allowed(stored):
        name = max(files, key=lambda each: files[each].values)
        return (
            f"{table} has {stored:,} bytes that stand for more than {_allowed(stored):,}, most of them in {name}; no "
            "run writes that: move it away"
        )
    return None


def _allowed(stored: int) -> int:
    """Bytes of values that so many bytes of files may stand for."""
    return max(MAX_BYTES, _EXPANSION * stored)


def rows_of(footer: Any) -> int:
    """Rows of a file, by what its row groups say, which is what readers go by."""
    return sum(footer.row_group(place).num_rows for place in range(footer.num_row_groups))


def size_of(footer: Any, source: str | BinaryIO) -> FileSize:
    """What a file comes to: by its footer where that is certain to be little, else counted and nothing kept.

    Raises:
        pa.ArrowException, OSError: it cannot be read, or its columns do not have as many values as it has rows.
    """
    stored = Path(source).stat().st_size if isinstance(source, str) else source.seek(0, 2)
    certain, texts = _of_footer(footer)
    at_most = certain + sum(each.letters for each in texts.values())
    left = _allowed(stored) - certain
    if at_most > _EXPANSION * stored and left >= 0:
        counted = [path for path, each in texts.items() if not each.ways <= _ONCE and each.ways <= _COUNTED]
        at_most -= sum(texts[path].letters for path in counted)
        at_most += _letters(source, counted, left) if counted else 0
    return FileSize(rows_of(footer), stored, at_most)


class _Texts(NamedTuple):
    """A column of texts: its letters at most, and the ways in which its pages are written."""

    letters: int
    ways: frozenset[str]


def _of_footer(footer: Any) -> tuple[int, dict[str, _Texts]]:
    """Bytes of all values but their letters, and the columns that have letters, by their paths."""
    import pyarrow as pa

    certain, texts = 0, dict[str, _Texts]()
    for group in (footer.row_group(place) for place in range(footer.num_row_groups)):
        for place in range(group.num_columns):
            chunk, column = group.column(place), footer.schema.column(place)
            if column.max_repetition_level == 0 and chunk.num_values != group.num_rows:
                raise pa.ArrowInvalid(f"{chunk.num_values} values of {chunk.path_in_schema} in {group.num_rows} rows")
            width = _WIDTHS.get(chunk.physical_type) or column.length
            certain += chunk.num_values * (width or _VIEW)
            if not width:
                before = texts.get(chunk.path_in_schema, _Texts(0, frozenset()))
                ways = frozenset(chunk.encodings)
                letters = chunk.total_uncompressed_size * (1 if ways <= _ONCE else chunk.num_values)
                texts[chunk.path_in_schema] = _Texts(before.letters + letters, before.ways | ways)
    return certain, texts


def _letters(source: str | BinaryIO, paths: list[str], enough: int) -> int:
    """Bytes of all texts of these columns, at least as many as `enough` where it is more; each text is held once."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not isinstance(source, str):
        source.seek(0)
    total = 0
    file = pq.ParquetFile(source, read_dictionary=paths)
    names = list(dict.fromkeys(path.partition(".")[0] for path in paths))
    for batch in file.iter_batches(_BATCH_ROWS, columns=names):
        for column in batch.columns:
            while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                column = column.flatten()
            if pa.types.is_dictionary(column.type):
                lengths = pc.binary_length(column.dictionary).to_numpy(zero_copy_only=False).astype(np.int64)
                used = column.indices.drop_null().to_numpy()
                total += int(np.bincount(used, minlength=len(lengths)) @ lengths) if len(used) else 0
            else:
                total += int(column.nbytes)
        if total > enough:
            break
    return total
