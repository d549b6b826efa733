"""Accumulators as Arrow: exact states, so that what is loaded goes on as if it had never stopped.

A state is a record batch of one row; that of what holds accumulators holds theirs as structs. Every number comes back
bit for bit. Shapes: D hidden size, K rows of a factor.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

VECTOR = pa.large_list(pa.float64())  # D^2 float64 of a large model overflow 32-bit offsets


class StateError(ValueError):
    """A state that is not what it says it is."""


def vector(values: Tensor | None) -> pa.Array:
    """One row of a `VECTOR` column."""
    if values is None:
        return pa.nulls(1, VECTOR)
    flat = values.detach().cpu().flatten().numpy()
    return pa.LargeListArray.from_arrays(pa.array([0, len(flat)], pa.int64()), pa.array(flat))


def triangle(upper_KD: Tensor | None) -> pa.Array:
    """One row of a `VECTOR` column: the upper triangle of the first K rows, what is below the diagonal left out."""
    if upper_KD is None:
        return pa.nulls(1, VECTOR)
    rows_KD = upper_KD.detach().cpu().numpy()
    parts = [row[number:] for number, row in enumerate(rows_KD)]
    return vector(torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.float64))


def struct(columns: Mapping[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    """One row of `schema` from Arrow columns of one row, plain values, record batches (structs) and None."""
    arrays = []
    for field in schema:
        value = columns[field.name]
        if isinstance(value, pa.RecordBatch):
            value = value.to_struct_array()
        elif not isinstance(value, pa.Array):
            value = pa.array([value], field.type)
        arrays.append(value)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def fields(state: pa.RecordBatch | pa.StructScalar, schema: pa.Schema) -> dict[str, Any]:
    """The scalars of a state by name.

    Raises:
        StateError: it has not the columns of `schema`.
    """
    if isinstance(state, pa.RecordBatch):
        if state.schema != schema or state.num_rows != 1:
            raise StateError("a state of another kind or version")
        return {name: state.column(name)[0] for name in schema.names}
    if not state.is_valid or state.type != pa.struct(schema):
        raise StateError("a state of another kind or version")
    return {name: state[name] for name in schema.names}


def array(scalar: pa.Scalar, size: int) -> NDArray[np.float64]:
    """The `size` numbers of a `VECTOR`, writable.

    Raises:
        StateError: there are not so many.
    """
    values: NDArray[np.float64] = scalar.values.to_numpy().copy() if scalar.is_valid else np.zeros(0)
    if len(values) != size:
        raise StateError(f"{len(values)} numbers where {size} belong")
    return values


def tensor(scalar: pa.Scalar, *shape: int, device: torch.device | None = None) -> Tensor:
    """A `VECTOR` as a tensor of `shape`."""
    return torch.from_numpy(array(scalar, int(np.prod(shape)))).reshape(shape).to(device)


def upper(scalar: pa.Scalar, num_rows: int, hidden_size: int, device: torch.device | None = None) -> Tensor:
    """The `num_rows` x D upper triangular matrix of which `triangle` kept the triangle."""
    lengths = hidden_size - np.arange(num_rows)
    values, stops = array(scalar, int(lengths.sum())), np.cumsum(lengths)
    matrix_KD = np.zeros((num_rows, hidden_size))
    for number, (stop, length) in enumerate(zip(stops, lengths, strict=True)):
        matrix_KD[number, number:] = values[stop - length : stop]
    return torch.from_numpy(matrix_KD).to(device)
