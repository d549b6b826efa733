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
_WAITING = 2**20  # rows that wait on a device, 8 MB
_MIX = (0x1F3D5B79, 0x2545F491, 0x369DEA0F)  # odd: a cell's three numbers become one


class DistinctRows:
    """Counts rows that differ, up to `limit`: a set of rounded random projections, which is mergeable by union."""

    def __init__(self, hidden_size: int, limit: int, device: torch.device | str = "cpu"):
        """`limit`: as many as nobody needs to tell apart; rows come on `device`."""
        self.limit = limit
        self._cells = torch.zeros(0, dtype=torch.int64, device=device)
        self._waiting: list[Tensor] = []  # on a device: how many differ is known to who waits for it
        generator = torch.Generator().manual_seed(0)
        self._probes_DK = torch.randn(hidden_size, _PROBES, generator=generator, dtype=torch.float64).to(device)
        self._mix_K = torch.tensor(_MIX).to(device)

    @property
    def cells(self) -> Tensor:
        """What rows were seen as, each once, at most `limit`."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._cells = torch.cat([self._cells, *waiting]).unique()[: self.limit]
        return self._cells

    def update(self, rows_ND: Float[Tensor, "N D"]) -> None:
        """Add float64 rows."""
        if len(self._cells) >= self.limit:
            return
        lengths_N1 = torch.linalg.vector_norm(rows_ND, dim=-1, keepdim=True).clamp_min(1e-300)
        seen_NK = torch.round(rows_ND @ self._probes_DK / (_CELL * lengths_N1)).long()
        self._waiting.append((seen_NK * self._mix_K).sum(-1))
        if rows_ND.device.type == "cpu" or sum(map(len, self._waiting)) > max(_WAITING, self.limit):
            self._cells = self.cells

    def merge(self, other: "DistinctRows") -> None:
        """Add what another worker saw."""
        self._waiting.append(other.cells.to(self._cells.device))
        self._cells = self.cells

    def to_arrow(self) -> pa.Array:
        """One row of a `CELLS` column."""
        return vector(self.cells)

    def restore(self, scalar: pa.Scalar) -> None:
        """Take what `to_arrow` packed in the place of one's own."""
        self._cells, self._waiting = torch.from_numpy(scalar.values.to_numpy().copy()).to(self._cells.device), []

    def count(self) -> int:
        """Different rows seen, at most `limit`."""
        return len(self.cells)
