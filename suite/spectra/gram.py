"""Gram matrices that say what they lost: squaring halves the digits, and only where kappa is small is that for nothing.

An eigenvalue of `G = sum w w^T` is only known to 32 eps of the largest. In which coordinates w that costs nothing is
the routes' to choose. Shapes: N tokens, D hidden size, K dead directions.
"""

import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from deadbench.suite.spectra.solver_checks import check_gram, probe, square_along
from deadbench.suite.spectra.solvers import Checked, add_gram, solvers
from deadbench.suite.spectra.triangular import (
    CERTIFIED_RELATIVE_ERROR,
    GRAM_ERROR,
    directions_below,
    smallest_singular_pair,
)

_GATE = 1e4  # a row whose square is this many times the typical one would lose the bottom: it is not added
_FEW = 8  # dead directions that are lifted one by one; where there are more, rows are whitened
_LANCZOS_STEPS = 24


class Gram:
    """`G = sum w w^T` of rows w, and what it takes to centre it."""

    def __init__(self, hidden_size: int, device: torch.device, typical_square: float):
        """`typical_square` is the mean |w|^2 expected."""
        self.count, self.typical_square = 0, typical_square
        self.sum_D = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self.upper_DD = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)  # of the rows: the trace, formed otherwise
        # Where what forms it is to be checked: of the rows along a random vector, which sees all of the matrix.
        self.along = torch.zeros_like(self.squares)
        checked = isinstance(solvers(self.squares), Checked)
        self._probe_D1 = probe(self.upper_DD)[:, :1].contiguous() if checked else None

    def empty_copy(self) -> "Gram":
        """One that expects the same rows, and has none."""
        after = copy.copy(self)
        after.count = 0
        after.sum_D, after.upper_DD = torch.zeros_like(self.sum_D), torch.zeros_like(self.upper_DD)
        after.squares, after.along = torch.zeros_like(self.squares), torch.zeros_like(self.along)
        return after

    def mean(self) -> Float[Tensor, " D"]:
        """The mean w."""
        return self.sum_D / self.count

    def add(self, rows_ND: Float[Tensor, "N D"]) -> bool:
        """Add rows; False, with nothing added, where a row is too long to be squared safely."""
        square_N = torch.linalg.vector_norm(rows_ND, dim=-1).square()
        if not self.resolves(square_N):
            return False
        self.add_resolved(rows_ND, square_N)
        return True

    def resolves(self, square_N: Float[Tensor, " N"]) -> bool:
        """Whether no row of these |w|^2 is too long to be squared safely."""
        return float(square_N.max()) <= _GATE * self.typical_square

    def add_resolved(self, rows_ND: Float[Tensor, "N D"], square_N: Float[Tensor, " N"]) -> None:
        """Add rows, and what their |w|^2 are, that it `resolves`."""
        self._square(rows_ND, square_N)
        self.count += len(rows_ND)

    def offer(self, rows_ND: Float[Tensor, "N D"], fine: Bool[Tensor, ""] | None = None) -> Bool[Tensor, ""]:
        """`add` that does not wait for the device: whether it refused. Where it did not, `count` is yet to be raised.

        Refused rows, also those that are not finite or not `fine`, are added as zeros.
        """
        length_N = torch.linalg.vector_norm(rows_ND, dim=-1)
        taken = length_N.max().square() <= _GATE * self.typical_square
        if fine is not None:
            taken = taken & fine
        rows_ND, length_N = torch.where(taken, rows_ND, 0.0), torch.where(taken, length_N, 0.0)
        self._square(rows_ND, length_N.square())
        refused: Tensor = ~taken
        return refused

    def _square(self, rows_ND: Tensor, square_N: Tensor) -> None:
        add_gram(self.upper_DD, rows_ND)
        self.squares += square_N.sum()
        self.sum_D += rows_ND.sum(0)
        if self._probe_D1 is not None:
            self.along += (rows_ND @ self._probe_D1).square().sum()

    def check(self) -> None:
        """Compare the matrix with what its rows gave otherwise.

        Raises:
            DeviceError: the device's matrix products are wrong.
        """
        check_gram(self.upper_DD, self.squares, None if self._probe_D1 is None else self.along)

    def take_for_right(self) -> None:
        """What the matrix itself says, as what its rows gave: it is restored, or of parts that were checked."""
        self.squares = self.upper_DD.diagonal().sum()
        if self._probe_D1 is not None:
            self.along = square_along(self.upper_DD)

    def add_gram(self, other: "Gram", shift_D: Float[Tensor, " D"] | None) -> None:
        """Add the rows of another Gram matrix, each with `shift_D` added to it.

        The rows need not be there for that: `sum (w + d)(w + d)^T = G + s d^T + d s^T + n d d^T`.

        Raises:
            DeviceError: the device's matrix products are wrong.
        """
        self.check()
        other.check()
        self.upper_DD += other.upper_DD
        self.sum_D += other.sum_D
        self.count += other.count
        if shift_D is not None:
            self.upper_DD.addr_(other.sum_D + other.count * shift_D, shift_D).addr_(shift_D, other.sum_D)
            self.sum_D += other.count * shift_D
        self.take_for_right()

    def scatter(self) -> Float[Tensor, "D D"]:
        """`sum (w - mean w)(w - mean w)^T`: its upper triangle; what is below the diagonal means nothing.

        Raises:
            DeviceError: the device's matrix products are wrong.
        """
        self.check()
        return self.upper_DD.addr(self.sum_D, self.sum_D, alpha=-1 / self.count)

    def off_centre(self) -> float:
        """`|mean w|^2`: what is squared is as far from its mean as that, and its rounding is of that size too."""
        return float((self.sum_D / max(self.count, 1)).square().sum())

    def certified(self) -> bool:
        """Whether the Gram matrix resolves its smallest eigenvalue to 1e-7: `32 eps kappa^2 <= 1e-7`.

        Where the rows are further from their mean's place than from each other, that distance is what kappa is of.
        """
        factor_DD, exists = solvers(self.upper_DD).cholesky(self.scatter())
        return exists and self.certifies(factor_DD)

    def root(self) -> tuple[Float[Tensor, "D D"], bool]:
        """(F with `F^T F` the scatter, whether it is the Cholesky factor).

        Rank-deficient rows have none; the square root by eigenvectors is defined all the same.
        """
        scatter_DD = self.scatter()
        factor_DD, exists = solvers(scatter_DD).cholesky(scatter_DD)
        if not exists:
            values_D, vectors_DD = solvers(scatter_DD).eigh(scatter_DD, "U")
            return values_D.clamp(min=0).sqrt()[:, None] * vectors_DD.T, False
        return factor_DD, True

    def unresolved(self) -> Float[Tensor, "D K"] | None:
        """The few directions, K >= 0, that this Gram matrix does not resolve to 1e-7; None where they are many."""
        scatter_DD = self.scatter().triu_()
        norm = float(2 * scatter_DD.square().sum() - scatter_DD.diagonal().square().sum()) ** 0.5
        largest = max(norm, self.count * self.off_centre())  # from above
        scatter_DD.diagonal().add_(GRAM_ERROR * largest)  # below its own rounding it need not be positive
        factor_DD, exists = solvers(scatter_DD).cholesky(scatter_DD)
        if not exists:
            return None
        resolved = (GRAM_ERROR * largest / (0.1 * CERTIFIED_RELATIVE_ERROR)) ** 0.5
        dead_DK = directions_below(factor_DD, resolved, _LANCZOS_STEPS)
        return dead_DK if dead_DK.shape[1] <= _FEW else None

    def certifies(self, factor_DD: Float[Tensor, "D D"]) -> bool:
        """`certified`, given `chol(G)`."""
        smallest, _ = smallest_singular_pair(factor_DD, steps=20, tolerance=1e-2)
        allowed = (0.1 * CERTIFIED_RELATIVE_ERROR / GRAM_ERROR) ** 0.5 * smallest  # but for a percent
        if self.count * self.off_centre() > allowed**2:
            return False
        # The largest singular value, from above: by the quicker bound, and by the one that may be closer.
        if float(factor_DD.norm()) <= allowed:
            return True
        sums = torch.linalg.matrix_norm(factor_DD, 1) * torch.linalg.matrix_norm(factor_DD, torch.inf)
        return bool(sums <= allowed**2)
