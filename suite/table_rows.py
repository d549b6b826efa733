"""What a row of a stranger's has and no writer of ours: numbers that no read comes to, lists that disagree, no name.

A column's type says neither. What is found here is settled once, before any analysis computes with it.
"""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LARGEST = 1e100  # of a magnitude: squares of float32 end at 1e77, and squares of this can be summed
# Lists of a row that go together, place by place; of lists of lists the inner ones too.
_PARALLEL: dict[str, list[tuple[str, ...]]] = {
    "spectra": [("dead_coordinates", "dead_weights")],
    "blocks": [("bottom_coordinates", "bottom_weights")],
    "norms": [("zero_coordinates", "zero_scales")],
    "samples": [("num_tokens", "sum_along", "squares_along", "squares_total")],
}


def check_parallel(table: str, batch: pa.RecordBatch) -> None:
    """Refuse rows whose parallel lists differ in length; a null, as of an older file, goes with any.

    Args:
        batch: rows of `table`, with any of its columns.

    Raises:
        ValueError: which columns differ.
    """
    for names in _PARALLEL.get(table, ()):
        for one, other in pairwise(name for name in names if name in batch.schema.names):
            if not _agree(batch.column(one), batch.column(other)):
                raise ValueError(f"{one} and {other} of a row differ in length")


def check_named(table: str, batch: pa.RecordBatch) -> None:
    """Refuse reads that are of no model: they would be judged by nothing, and missed by nobody.

    Args:
        batch: rows of `table`, with any of its columns.

    Raises:
        ValueError: some row has none.
    """
    if table == "reads" and "model" in batch.schema.names and batch.column("model").null_count:
        raise ValueError("a row has no model")


def with_known_numbers(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with null for each number that is not finite or beyond `LARGEST`, in lists too."""
    columns = [_known(column) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _agree(one: pa.Array, other: pa.Array) -> bool:
    lengths = [pc.list_value_length(each) for each in (one, other)]
    if not pc.all(pc.equal(*lengths), min_count=0).as_py():
        return False
    if not all(pa.types.is_list(each.type.value_type) for each in (one, other)):
        return True
    both = pc.and_(one.is_valid(), other.is_valid())
    return _agree(*(each.filter(both).flatten() for each in (one, other)))


def _known(column: pa.Array) -> pa.Array:
    if pa.types.is_list(column.type):
        values = column.flatten()
        known = _known(values)
        if known is values:
            return column
        lengths = column.value_lengths().fill_null(0).to_numpy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, known, type=column.type, mask=column.is_null())
    if not pa.types.is_floating(column.type):
        return column
    numbers = column.to_numpy(zero_copy_only=False)  # null as NaN
    strange = ~(np.abs(numbers) <= LARGEST)
    if int(strange.sum()) == column.null_count:
        return column
    return pa.array(numbers, column.type, mask=strange)
