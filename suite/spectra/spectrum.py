"""What a covariance is decomposed into."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (descending) and eigenvectors (rows, same order) of `C = (1/N) sum (y - ybar)(y - ybar)^T`.

    `resolution`: eigenvalues below it are the accumulator's own rounding; `floor`: those above it are certified to 1e-6
    relative. `mean_square_D` is E y_i^2, the mean not taken off.
    """

    eigenvalues_D: NDArray[np.float64]
    eigenvectors_DD: NDArray[np.float64]
    mean_square_D: NDArray[np.float64]
    num_tokens: int
    method: str
    resolution: float
    floor: float

    @property
    def mean(self) -> float:
        """tr C / D."""
        return float(self.eigenvalues_D.mean())

    def num_dead(self, threshold: float) -> int:
        """`#{ l_i <= threshold * mean }`."""
        return int(np.sum(self.eigenvalues_D <= threshold * self.mean))
