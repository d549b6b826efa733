"""What the final norm is fed, by its moments alone: is the stream centred, and which of its coordinates are massive?

A LayerNorm takes the mean over the coordinates off. Where the stream has none, as where what writes to it was centred,
an RMSNorm computes the same function, and gamma^-1 is a kernel of it too. Shapes: N tokens, D hidden size.
"""

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from deadbench.suite.spectra.arrow_state import VECTOR, fields, struct, tensor, vector

STREAM_MOMENTS_STATE = pa.schema({"roundoff": pa.float64(), "sums": VECTOR})
MASSIVE = 1000  # times the median second moment
# Of the rounding floor, in variance: as for dead directions of the stream, 8 floors of its spread in bfloat16, else 32.
_COARSE, _FLOORS_COARSE, _FLOORS_FINE = 2.0**-12, 8.0**2, 32.0**2


def massive_coordinates(mean_square_D: NDArray[np.float64]) -> list[int]:
    """Coordinates whose second moment is above 1000 times the median one, the largest first.

    Sun, Chen, Kolter, Liu 2024 (arXiv 2402.17762) call activations massive that are above 100 and 1000 times the median
    magnitude; here it is the mean square over the tokens.

    Example:
        >>> massive_coordinates(np.array([1.0, 1.0, 5000.0, 999.0]))
        [2]
    """
    order_D = np.argsort(-mean_square_D, kind="stable")
    return order_D[mean_square_D[order_D] > MASSIVE * np.median(mean_square_D)].tolist()  # type: ignore[no-any-return]


class StreamMoments:
    """Sums over rows: n, sum x_i, sum x_i^2 of each coordinate; sum and sum of squares of `x . 1/sqrt(D)`."""

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu"):
        """No rows, which will come on `device`."""
        self.roundoff = 0.0  # of the coarsest dtype that rows came in
        self.sums = torch.zeros(2 * hidden_size + 3, dtype=torch.float64, device=device)

    def update(self, rows_ND: Float[Tensor, "N D"], dtype: torch.dtype) -> None:
        """Add float64 rows that were computed in `dtype`."""
        self.roundoff = max(self.roundoff, torch.finfo(dtype).eps / 2)
        sum_N = rows_ND.sum(1) / rows_ND.shape[1] ** 0.5
        along = torch.stack([torch.full_like(sum_N[0], len(rows_ND)), sum_N.sum(), sum_N.square().sum()])
        self.sums += torch.cat([along, rows_ND.sum(0), torch.linalg.vector_norm(rows_ND, dim=0).square()])

    def merge(self, other: "StreamMoments") -> None:
        """Add another worker's rows."""
        self.roundoff = max(self.roundoff, other.roundoff)
        self.sums += other.sums

    def to_arrow(self) -> pa.RecordBatch:
        """The exact state as one Arrow row."""
        return struct({"roundoff": self.roundoff, "sums": vector(self.sums)}, STREAM_MOMENTS_STATE)

    def restore(self, state: pa.StructScalar) -> None:
        """Take what `to_arrow` packed in the place of one's own."""
        row = fields(state, STREAM_MOMENTS_STATE)
        self.roundoff, self.sums = row["roundoff"].as_py(), tensor(row["sums"], len(self.sums), device=self.sums.device)

    def mean_square(self) -> NDArray[np.float64]:
        """E x_i^2 of each coordinate."""
        squares_D: NDArray[np.float64] = (self.sums[3:] / self.sums[0]).chunk(2)[1].cpu().numpy()
        return squares_D

    def mean_share(self) -> tuple[float | None, bool | None]:
        """(variance along 1/sqrt(D) over the mean variance, whether that is rounding alone); None where nothing varies.

        Rounding of x leaves `0.18 u^2 mean(E x_i^2)` along any direction; that, eight or thirty-two times over in the
        spread (the stream is a sum of many rounded ones), is the limit.
        """
        count, along, along_square = self.sums[:3].cpu().tolist()
        mean_D = self.sums[3:].chunk(2)[0].cpu().numpy() / count
        variance = float(np.mean(self.mean_square() - mean_D**2))
        if variance <= 0:
            return None, None
        share = max(along_square / count - (along / count) ** 2, 0.0) / variance
        floors = _FLOORS_COARSE if self.roundoff > _COARSE else _FLOORS_FINE
        floor = 0.18 * self.roundoff**2 * float(np.mean(self.mean_square())) / variance
        return share, share <= floors * floor
