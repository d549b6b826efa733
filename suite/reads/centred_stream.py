"""Whether what writes to the residual stream sums to zero over its coordinates, by a few rows of stored tensors.

An RMSNorm of a stream without a mean is a LayerNorm: `gamma^-1` is its kernel then. So it is where a LayerNorm model
was converted, the mean folded into the embedding and into each map that writes. Nothing is run, and no architecture is
built: what writes is told by the names of tensors, so that a centred stream is a hint and no verdict. A model whose
embedding is not centred, as nearly every one, costs eight rows. Shapes: D hidden size, N rows.
"""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.tensors import (
    DTYPE_NAMES,
    ITEM_BYTES,
    TensorEntry,
    read_floats,
    read_rows,
    read_vector,
)
from deadbench.suite.spectra.directions import UNIT_ROUNDOFF

CENTRED = "centred stream: gamma^-1 may be a kernel although the norm is RMSNorm"
CENTRED_WRITERS = "what writes to the stream is centred (center_writing_weights), which no LayerNorm sees"
ROWS, _FIRST_ROWS = 64, 8
_ROUNDINGS = 8  # times u |w|: rounding D stored values leaves a twentieth, a mean taken off in float32 a quarter
_EMBEDDING = re.compile(r"(^|\.)(\w*emb\w*|wte|wpe)\.(\w+\.)?weight$")
_NOT_INPUT = re.compile(r"(head|embed_out|output|rotary|rel)")
_IN_BLOCK = re.compile(r"\.(\d+)\.")
_WRITER = re.compile(
    r"\.(o_proj|out_proj|c_proj|wo|w2|down_proj|fc2|fc_out|out_lin|lin2|dense_4h_to_h|attention\.dense|output\.dense|"
    r"attn_output|ffn_down)"
    r"\.weight$"
)
_MOST_BYTES, _MOST_WRITERS = 2**27, 8  # of one map that is read whole; of a block, experts being many


def writes_centred(files: Files, entries: Mapping[str, TensorEntry], hidden_size: int) -> bool | None:
    """Whether 64 rows of each embedding, and the maps of the first and the last block that write, sum to zero.

    A row of an embedding is one range of bytes, as is an output of a transposed map; an `nn.Linear` writes by its
    columns and is read whole, which only a centred embedding asks for. None where the names tell no embedding or none
    of the maps, or where these do not lie as they can be read.

    Raises:
        CheckpointError: a file is cut off.
    """
    matrices = [e for e in entries.values() if len(e.shape) == 2 and hidden_size in e.shape and e.dtype in DTYPE_NAMES]
    embeddings = [
        e for e in matrices if e.shape[1] == hidden_size and _EMBEDDING.search(e.name)
        and not _IN_BLOCK.search(e.name) and not _NOT_INPUT.search(e.name)
    ]  # fmt: skip
    if not embeddings:
        return None
    for count in (_FIRST_ROWS, ROWS):
        for embedding in embeddings if count == ROWS else embeddings[:1]:
            count = min(count, embedding.shape[0])
            rows_ND = read_rows(files, embedding, (embedding.shape[0] - count) // 2, count)
            if rows_ND is None:
                return None
            if not _sums_to_zero(rows_ND, embedding.dtype):
                return False
    writers = [e for e in matrices if _WRITER.search(e.name) and _IN_BLOCK.search(e.name)]
    blocks = sorted({_block(e.name) for e in writers})
    if not blocks:
        return None
    of_blocks = [[e for e in writers if _block(e.name) == block][:_MOST_WRITERS] for block in {blocks[0], blocks[-1]}]
    for writer in itertools.chain(*of_blocks):
        rows = _outputs(files, writer, hidden_size)
        if rows is None:
            return None
        if not any(_sums_to_zero(rows_ND, writer.dtype) for rows_ND in rows):
            return False
        bias = entries.get(f"{writer.name.removesuffix('weight')}bias")
        shift = None if bias is None else read_vector(files, bias)
        if bias is not None and shift is not None and shift.any() and not _sums_to_zero(shift[None], bias.dtype):
            return False
    return True


def _outputs(files: Files, writer: TensorEntry, hidden_size: int) -> list[NDArray[np.float64]] | None:
    """What a map writes for each of some inputs, as rows: of a square one, stored either way, both readings."""
    found = []
    if writer.shape[1] == hidden_size:  # in x out
        found.append(_rows(files, writer, min(ROWS, writer.shape[0])))
    if writer.shape[0] == hidden_size and _num_bytes(writer) <= _MOST_BYTES:  # out x in
        whole = _rows(files, writer, hidden_size)
        found.append(None if whole is None else whole.T)
    known = [each for each in found if each is not None]
    return known if known and len(known) == len(found) else None


def _rows(files: Files, writer: TensorEntry, count: int) -> NDArray[np.float64] | None:
    """The first rows of a map; one that is stored in another form is read whole."""
    if writer.made is not None and _num_bytes(writer) <= _MOST_BYTES:
        return read_floats(files, writer)[:count]
    return read_rows(files, writer, 0, count)


def _num_bytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * ITEM_BYTES[entry.dtype]


def _sums_to_zero(rows_ND: NDArray[np.float64], dtype: str) -> bool:
    """Whether each row sums to zero but for the rounding of its values; rows of zeros alone say nothing."""
    sizes_N = np.linalg.norm(rows_ND, axis=1)
    limit_N = _ROUNDINGS * UNIT_ROUNDOFF[DTYPE_NAMES[dtype]] * sizes_N
    return bool(np.isfinite(sizes_N).all() and (np.abs(rows_ND.sum(1)) <= limit_N).all() and sizes_N.any())


def _block(name: str) -> int:
    match = _IN_BLOCK.search(name)
    assert match is not None
    return int(match[1])
