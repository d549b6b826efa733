"""How much the files of a table come to once they are read, found before they are; and what no run writes.

Rows that are alike take no room, and a long string, stored once, stands in any number of cells: a file of kilobytes can
be gigabytes. What a footer says of a whole file is not believed where it says otherwise of its parts, and of these only
what their pages say too.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, BinaryIO, NamedTuple

from deadbench.suite.table_pages import Group, check_pages, groups_of

# Of a table of one result set, in all its files. A row of `reads` is a read, and wide.
MAX_ROWS, MAX_READS = 10_000_000, 500_000
# Of values, for each byte that is stored (what a run writes of names is tenfold), and where little is stored.
_EXPANSION, _LITTLE = 50, 2**26
# Of values of `reads`, whose rows are held together: half a million of the widest that a run writes are 0.9 GB.
MAX_BYTES = 2**30
_VIEW = 16  # of a text, beside its letters
_COPIES = 2  # of letters: those of Arrow are still there while polars has its own
_ONCE = {"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"}  # each text is stored where it stands
_COUNTED = {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}  # without writing any twice
_BATCH_ROWS = 65_536
_BUFFER = 2**17  # most files are smaller, and the headers of their pages lie close together


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
    allowed = _allowed(table, stored)
    if values > allowed:
        name = max(files, key=lambda each: files[each].values)
        return (
            f"{table} has {stored:,} bytes that stand for more than {allowed:,}, most of them in {name}; no run writes "
            "that: move it away"
        )
    return None


def _allowed(table: str, stored: int) -> int:
    """Bytes of values that so many bytes of a table's files may stand for."""
    most = max(_LITTLE, _EXPANSION * stored)
    return min(most, MAX_BYTES) if table == "reads" else most


def rows_of(footer: Any) -> int:
    """Rows of a file, by what its row groups say, which is what readers go by."""
    return sum(footer.row_group(place).num_rows for place in range(footer.num_row_groups))


def size_of(source: str | BinaryIO, table: str) -> FileSize:
    """What a file of a table comes to: by its footer where that is certain to be little, else counted and nothing kept.

    Its pages are then known to be what the footer says, so that it may be decoded. Of `reads` little is no more than is
    stored: their limit is for all files together, and a footer tells of each row all the texts that any has.

    Raises:
        pa.ArrowException, OSError, ValueError: it cannot be read, or its footer, its pages and its rows do not agree.
    """
    with open(source, "rb", _BUFFER) if isinstance(source, str) else nullcontext(source) as file:
        stored = file.seek(0, 2)
        groups = groups_of(file)
        check_pages(file, (chunk for group in groups for chunk in group.chunks))
    certain, texts = _of_groups(groups)
    letters = sum(each.letters for each in texts.values())
    left = _allowed(table, stored) - certain
    if certain + letters > (1 if table == "reads" else _EXPANSION) * stored and left >= 0:
        counted = [path for path, each in texts.items() if not each.ways <= _ONCE and each.ways <= _COUNTED]
        found = _letters(source, counted, left, len(groups)) if counted else None
        if found is not None:
            letters += found - sum(texts[path].letters for path in counted)
    return FileSize(sum(group.rows for group in groups), stored, certain + _COPIES * letters)


class _Texts(NamedTuple):
    """A column of texts: its letters at most, and the ways in which its pages are written."""

    letters: int
    ways: frozenset[str]


def _of_groups(groups: Iterable[Group]) -> tuple[int, dict[str, _Texts]]:
    """Bytes of all values but their letters, and the columns that have letters, by their paths."""
    certain, texts = 0, dict[str, _Texts]()
    for chunk in (each for group in groups for each in group.chunks):
        if chunk.width:
            certain += max(chunk.values * chunk.width, chunk.unpacked)
            continue
        certain += chunk.values * _VIEW
        before = texts.get(chunk.path, _Texts(0, frozenset()))
        letters = chunk.unpacked * (1 if chunk.ways <= _ONCE else chunk.values)
        texts[chunk.path] = _Texts(before.letters + letters, before.ways | chunk.ways)
    return certain, texts


def _letters(source: str | BinaryIO, paths: list[str], enough: int, num_groups: int) -> int | None:
    """Bytes of all texts of these columns, at least as many as `enough` where it is more; each text is held once.

    None where Arrow cannot hold them so: lists of texts whose dictionary changes within a group of rows.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not isinstance(source, str):
        source.seek(0)
    total = 0
    try:
        file = pq.ParquetFile(source, read_dictionary=paths)
    except KeyError as error:
        raise ValueError("its row groups and its schema name other columns") from error
    names = list(dict.fromkeys(path.partition(".")[0] for path in paths))
    batches = (
        batch
        for group in range(num_groups)  # a batch of several has several dictionaries
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names, use_threads=False)
    )
    while True:
        try:
            batch = next(batches, None)
        except pa.ArrowNotImplementedError:
            return None
        if batch is None or total > enough:
            return total
        for column in batch.columns:
            while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                column = column.flatten()
            if pa.types.is_dictionary(column.type):
                lengths = pc.binary_length(column.dictionary).to_numpy(zero_copy_only=False).astype(np.int64)
                used = column.indices.drop_null().to_numpy()
                total += int(np.bincount(used, minlength=len(lengths)) @ lengths) if len(used) else 0
            else:
                total += int(column.nbytes)
