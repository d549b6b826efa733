"""The route by QR, that takes any rows: R and the mean, and the rows that wait to get into it. Nothing is squared.

Shapes: N tokens, D hidden size, K rows of a factor.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deadbench.suite.spectra.arrow_state import StateError, tensor, triangle, upper, vector
from deadbench.suite.spectra.solvers import solvers, spaced_rows
from deadbench.suite.spectra.triangular import decompose, smallest_singular_pair

_METHODS = ("qr", "whitened-gram", "lifted-gram", "gram")  # the later, the weaker its certificate


class Qr:
    """R and the mean of rows, and rows that wait until a QR of them is worth its cost; nothing is squared.

    `R^T R = sum (z - mean)(z - mean)^T`. Two parts merge by `qr([R1; R2; sqrt(n1 n2 / (n1 + n2)) (m1 - m2)^T])`. What
    the routes that square rows have collected is joined to R as well. `method` is the one whose certificate R carries
    then, and `off_centre` the largest |mean|^2 of what was squared and not whitened.
    """

    def __init__(self, hidden_size: int, device: torch.device, method: str = "qr"):
        """No rows, of the kind that others took by `method`."""
        self.count, self.method, self.off_centre = 0, method, 0.0
        self.mean_D = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self.factor_KD = torch.zeros(0, hidden_size, dtype=torch.float64, device=device)
        self.waiting: list[Tensor] = []
        self.num_waiting = 0

    def hold(self, rows_ND: Float[Tensor, "N D"]) -> None:
        """Let rows wait."""
        self.waiting.append(rows_ND)
        self.num_waiting += len(rows_ND)

    def release(self) -> Float[Tensor, "N D"]:
        """The rows that waited, at least one; none wait any more."""
        rows_ND = self.waiting[0]
        if len(self.waiting) > 1:
            rows_ND = torch.cat(self.waiting, out=spaced_rows((self.num_waiting, rows_ND.shape[1]), rows_ND.device))
        self.waiting, self.num_waiting = [], 0
        return rows_ND

    def add(self, rows_KD: Float[Tensor, "K D"], count: int, mean_D: Float[Tensor, " D"]) -> None:
        """Add `count` rows around `mean_D` to R: themselves, centred, or a factor of their scatter."""
        total = self.count + count
        between_D = (self.count * count / total) ** 0.5 * (self.mean_D - mean_D)
        stacked = torch.cat([self.factor_KD, rows_KD, between_D[None]])
        self.factor_KD = solvers(stacked).triangle(stacked)
        self.mean_D = self.mean_D + (mean_D - self.mean_D) * (count / total)
        self.count = total

    def merge(self, other: "Qr", shift_D: Float[Tensor, " D"]) -> None:
        """Add the R of another, each of its rows with `shift_D` added to it; what waits there is not added."""
        device = self.mean_D.device
        self.method = other.method if self.count == 0 else weaker(self.method, other.method)
        self.add(other.factor_KD.to(device), other.count, other.mean_D.to(device) + shift_D)

    def decompose(
        self, offset_D: Float[Tensor, " D"]
    ) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"], Float[Tensor, " D"]]:
        """(eigenvalues, descending; eigenvectors as rows; mean squares of rows with `offset_D` added to them)."""
        values_D, rows_DD = decompose(self.factor_KD)
        mean_square_D = self.factor_KD.square().sum(0) / self.count + (offset_D + self.mean_D).square()
        return values_D / self.count, rows_DD, mean_square_D

    def eigenvalues(self) -> Float[Tensor, " D"]:
        """The eigenvalues alone, descending."""
        return torch.linalg.svdvals(self.factor_KD.cpu()).square() / self.count  # type: ignore[no-any-return]

    def bottom(self) -> tuple[float, Float[Tensor, " D"]]:
        """(smallest eigenvalue, its unit eigenvector)."""
        smallest, bottom_D = smallest_singular_pair(self.factor_KD)
        return smallest**2 / self.count, bottom_D

    def columns(self) -> dict[str, Any]:
        """The exact state, as columns of the accumulator's."""
        return {
            "count": self.count,
            "method": self.method,
            "mean": vector(self.mean_D),
            "factor_rows": len(self.factor_KD),
            "factor": triangle(self.factor_KD),
            "pending": vector(torch.cat(self.waiting) if self.waiting else None),
        }

    @classmethod
    def from_columns(cls, row: dict[str, Any], hidden_size: int, device: torch.device) -> "Qr":
        """What `columns` packed.

        Raises:
            StateError: it is not whole.
        """
        self = cls(hidden_size, device, row["method"].as_py())
        if self.method not in _METHODS:
            raise StateError(f"method {self.method!r} is unknown")
        self.count = row["count"].as_py()
        self.mean_D = tensor(row["mean"], hidden_size, device=device)
        self.factor_KD = upper(row["factor"], row["factor_rows"].as_py(), hidden_size, device)
        if row["pending"].is_valid:
            num_rows = len(row["pending"].values) // hidden_size
            self.hold(tensor(row["pending"], num_rows, hidden_size, device=device))
        return self


def weaker(a: str, b: str) -> str:
    """The method whose certificate a merged factor carries."""
    return max(a, b, key=_METHODS.index)
