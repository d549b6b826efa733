"""How many different rows a read has seen: repeated rows add nothing to a rank, and what they lack looks dead."""

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from deadbench.suite.spectra.arrow_state import vector

MIN_DISTINCT = 4  # in D: fewer distinct rows, and the rank is that of the input
CELLS = pa.large_list(pa.int64())
_PROBES = 3  # random directions on which a row is seen
_CELL = 2.0**-16  # of a row's length: wider than float32's noise between batches, finer than what tells rows apart
_MIX = (0x1F3D5B79, 0x2545F491, 0x369DEA0F)  # odd: a cell's three numbers become one


class DistinctRows:
    """Counts rows that differ, up to `limit`: a set of rounded random projections, which is mergeable by union."""

    def __init__(self, hidden_size: int, limit: int):
        """`limit`: as many as nobody needs to tell apart."""
        self.limit = limit
        self.cells = torch.zeros(0, dtype=torch.int64)
        generator = torch.Generator().manual_seed(0)
        self._probes_DK = torch.randn(hidden_size, _PROBES, generator=generator, dtype=torch.float64)

    def update(self, rows_ND: Float[Tensor, "N D"]) -> None:
        """Add float64 rows."""
        if len(self.cells) >= self.limit:
            return
        lengths_N1 = torch.linalg.vector_norm(rows_ND, dim=-1, keepdim=True).clamp_min(1e-300)
        seen_NK = torch.round(rows_ND @ self._probes_DK / (_CELL * lengths_N1)).long()
        self._add((seen_NK * torch.tensor(_MIX)).sum(-1))

    def merge(self, other: "DistinctRows") -> None:
        """Add what another worker saw."""
        self._add(other.cells)

    def _add(self, cells: Tensor) -> None:
        self.cells = torch.cat([self.cells, cells]).unique()[: self.limit]

    def to_arrow(self) -> pa.Array:
        """One row of a `CELLS` column."""
        return vector(self.cells)

    def restore(self, scalar: pa.Scalar) -> None:
        """Take what `to_arrow` packed in the place of one's own."""
        self.cells = torch.from_numpy(scalar.values.to_numpy().copy())

    def count(self) -> int:
        """Different rows seen, at most `limit`."""
        return len(self.cells)
