"""Spectra of centred covariances from batches: nothing of size N x D is ever kept.

An accumulator takes rows, merges with another of its kind and is finished once; only `finish` divides or decomposes, so
one worker or eight give the same row. Shapes: N tokens, D hidden size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from suite.directions import FLOAT64_EPS

_CERTIFIED_RELATIVE_ERROR = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (descending) and eigenvectors (rows, same order) of `C = (1/N) sum (y - ybar)(y - ybar)^T`.

    `floor`: eigenvalues above it are certified to 1e-6 relative; below it, rounding may decide.
    """

    eigenvalues_D: NDArray[np.float64]
    eigenvectors_DD: NDArray[np.float64]
    num_tokens: int
    method: str
    floor: float

    @property
    def mean(self) -> float:
        """tr C / D."""
        return float(self.eigenvalues_D.mean())

    def num_dead(self, threshold: float) -> int:
        """`#{ l_i <= threshold * mean }`."""
        return int(np.sum(self.eigenvalues_D <= threshold * self.mean))


class TriangularFactor:
    """The streaming QR (TSQR) of the centred rows, in float64: exact at the bottom of the spectrum.

    State: n, the mean m relative to a fixed offset, and R with `R^T R = sum (y - ybar)(y - ybar)^T`. Two parts merge by
    `qr([R1; R2; sqrt(n1 n2 / (n1 + n2)) (m1 - m2)^T])`. Squaring is what loses the small eigenvalues of a Gram matrix;
    here nothing is squared. Rows are held back until 2D are there: a QR costs 2D^2 flops a row at best, and more the
    smaller the batch. Memory: 3 D^2 float64.
    """

    method = "tsqr"

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu"):
        self.hidden_size, self.device = hidden_size, torch.device(device)
        self.count = 0
        self.offset_D: Tensor | None = None
        self.mean_D = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self.factor_KD = torch.zeros(0, hidden_size, dtype=torch.float64, device=device)
        self._pending: list[Tensor] = []
        self._num_pending = 0

    def update(self, acts_ND: Float[Tensor, "N D"], mask_N: Bool[Tensor, " N"] | None = None) -> None:
        """Add rows of any float dtype; rows where `mask_N` is False (padding) are left out.

        Raises:
            ValueError: wrong width, or a value that is not finite.
        """
        if acts_ND.ndim != 2 or acts_ND.shape[1] != self.hidden_size:
            raise ValueError(f"activations of shape {tuple(acts_ND.shape)}; expected (N, {self.hidden_size})")
        rows = acts_ND if mask_N is None else acts_ND[mask_N]
        rows = rows.detach().to(self.device, torch.float64)
        if not bool(torch.isfinite(rows).all()):
            bad = int((~torch.isfinite(rows).all(-1)).sum())
            raise ValueError(f"activations are not finite in {bad} of {len(rows)} rows")
        if len(rows) == 0:
            return
        if self.offset_D is None:
            # Rounded to float32, so that taking it off float32 rows is exact.
            self.offset_D = rows.mean(0).float().double()
        self._pending.append(rows - self.offset_D)
        self._num_pending += len(rows)
        if self._num_pending >= 2 * self.hidden_size:
            self._absorb()

    def merge(self, other: "TriangularFactor") -> None:
        """Add what `other` saw; associative and commutative up to rounding. `other` keeps its state."""
        self._absorb()
        other._absorb()
        if other.count == 0:
            return
        assert other.offset_D is not None
        if self.offset_D is None:
            self.offset_D = other.offset_D
        shifted_mean_D = other.mean_D + (other.offset_D - self.offset_D)
        self._combine(other.factor_KD.to(self.device), other.count, shifted_mean_D.to(self.device))

    def finish(self) -> Spectrum:
        """Decompose: eigenvalues are the squared singular values of R over n.

        Raises:
            ValueError: no more rows than the hidden size, so that the rank is the sample's and not the model's.
        """
        self._absorb()
        if self.count <= self.hidden_size:
            raise ValueError(
                f"{self.count} tokens for hidden size {self.hidden_size}: the covariance is rank-deficient by "
                f"construction; give at least {4 * self.hidden_size} tokens"
            )
        _, sigma_D, rows_DD = torch.linalg.svd(self.factor_KD.cpu())
        eigenvalues_D = (sigma_D.square() / self.count).numpy()
        # An SVD moves every singular value by a few eps sigma_1: 2 * 4 eps sigma_1 / sigma <= 1e-6 is certified.
        floor = float(eigenvalues_D[0]) * (8 * FLOAT64_EPS / _CERTIFIED_RELATIVE_ERROR) ** 2
        return Spectrum(eigenvalues_D, rows_DD.numpy(), self.count, self.method, floor)

    def _absorb(self) -> None:
        if not self._pending:
            return
        rows = torch.cat(self._pending)
        self._pending, self._num_pending = [], 0
        mean_D = rows.mean(0)
        self._combine(rows - mean_D, len(rows), mean_D)

    def _combine(self, rows_KD: Tensor, count: int, mean_D: Tensor) -> None:
        total = self.count + count
        between_D = (self.count * count / total) ** 0.5 * (self.mean_D - mean_D)
        stacked = torch.cat([self.factor_KD, rows_KD, between_D[None]])
        self.factor_KD = torch.linalg.qr(stacked, mode="r").R
        self.mean_D = self.mean_D + (mean_D - self.mean_D) * (count / total)
        self.count = total
