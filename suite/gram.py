"""Gram matrices that lose nothing at the bottom: of rows whitened by a factor that is already known.

Squaring halves the digits: an eigenvalue of `sum z z^T` is only known to 32 eps of the largest. Rows whitened by the R
of earlier rows have a Gram matrix near the identity, where that costs nothing. Shapes: N tokens, D hidden size.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from suite.directions import FLOAT64_EPS

CERTIFIED_RELATIVE_ERROR = 1e-6
GRAM_ERROR = 32 * FLOAT64_EPS  # |error of an eigenvalue| <= this * l_1, when rows enter a Gram matrix unwhitened
_PANELS = 8
_GATE = 1e4  # a row whose square is this many times the typical one would lose the bottom: it is taken by QR


class Gram:
    """`G = sum w w^T` of rows `w = z R^-1` (or of `z` itself), with what is needed to centre it and to undo R."""

    def __init__(
        self, hidden_size: int, device: torch.device, whitener_DD: Float[Tensor, "D D"] | None, typical_square: float
    ):
        """`whitener_DD` is R of unit-variance rows, None for no whitening; `typical_square` the mean |w|^2 expected."""
        self.count, self.typical_square = 0, typical_square
        self.whitener_DD = None if whitener_DD is None else _regularised(whitener_DD)
        self.sum_D = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self._upper_DD = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)

    def empty_copy(self) -> "Gram":
        """The same whitening, no rows."""
        after = object.__new__(Gram)
        after.__dict__ |= self.__dict__
        after.count = 0
        after.sum_D, after._upper_DD = torch.zeros_like(self.sum_D), torch.zeros_like(self._upper_DD)
        return after

    def add(self, rows_ND: Float[Tensor, "N D"]) -> bool:
        """Add rows; False, with nothing added, where a row is too long to be squared safely."""
        white_ND = rows_ND
        if self.whitener_DD is not None:
            # w R = z as R^T w^T = z^T: the transposes are views, and the solve costs half a matrix product.
            white_ND = torch.linalg.solve_triangular(self.whitener_DD.T, rows_ND.T, upper=False).T
        if float(torch.linalg.vector_norm(white_ND, dim=-1).max()) ** 2 > _GATE * self.typical_square:
            return False
        _add_gram(self._upper_DD, white_ND)
        self.sum_D += white_ND.sum(0)
        self.count += len(rows_ND)
        return True

    def add_gram(self, other: "Gram") -> None:
        """Add the rows of another Gram matrix with the same whitening."""
        self._upper_DD += other._upper_DD
        self.sum_D += other.sum_D
        self.count += other.count

    def scatter(self) -> Float[Tensor, "D D"]:
        """`sum (w - mean w)(w - mean w)^T`."""
        upper_DD = (self._upper_DD - torch.outer(self.sum_D, self.sum_D / self.count)).triu_()
        return upper_DD + upper_DD.triu(1).T

    def certified(self) -> bool:
        """Whether the Gram matrix, unwhitened, resolves its smallest eigenvalue to 1e-7: `32 eps kappa_F^2 <= 1e-7`."""
        factor_DD, failed = torch.linalg.cholesky_ex(self.scatter(), upper=True)
        if int(failed):
            return False
        identity = torch.eye(len(factor_DD), dtype=torch.float64, device=factor_DD.device)
        inverse_DD = torch.linalg.solve_triangular(factor_DD, identity, upper=True)
        condition = float(factor_DD.norm() * inverse_DD.norm())
        return GRAM_ERROR * condition**2 <= 0.1 * CERTIFIED_RELATIVE_ERROR

    def factor(self) -> tuple[Float[Tensor, "D D"], Float[Tensor, " D"]]:
        """(R, mean) of the rows: `R^T R` is their centred scatter."""
        mean_D = self.sum_D / self.count
        scatter_DD = self.scatter()
        factor_DD, failed = torch.linalg.cholesky_ex(scatter_DD, upper=True)
        if int(failed):  # rank-deficient rows: the square root by eigenvectors is defined all the same
            values_D, vectors_DD = torch.linalg.eigh(scatter_DD)
            factor_DD = values_D.clamp(min=0).sqrt()[:, None] * vectors_DD.T
        if self.whitener_DD is None:
            return factor_DD, mean_D
        return factor_DD @ self.whitener_DD, mean_D @ self.whitener_DD


def smallest_singular_pair(
    factor_DD: Float[Tensor, "D D"], steps: int = 80, tolerance: float = 1e-12
) -> tuple[float, Float[Tensor, " D"]]:
    """Smallest singular value of an upper triangular R and its right singular vector, without the rest.

    Lanczos on `(R^T R)^-1`, two triangular solves a step, with full reorthogonalisation (Golub, Van Loan, 10.3): the
    smallest of R is the largest there, and the best separated. Stops when the residual is below `tolerance` relative.
    """
    D = len(factor_DD)
    factor_DD = factor_DD.clone()
    # An exactly dead direction would divide by zero; 1e-60 of the size is zero for all purposes and squares safely.
    diagonal_D, least = factor_DD.diagonal(), 1e-60 * float(factor_DD.norm())
    diagonal_D[diagonal_D.abs() < least] = least
    steps = min(steps, D)
    basis_KD = torch.zeros(steps, D, dtype=torch.float64, device=factor_DD.device)
    tridiagonal_KK = torch.zeros(steps, steps, dtype=torch.float64)
    vector_D = torch.randn(D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(factor_DD.device)
    weights_K = torch.ones(1, dtype=torch.float64)
    for step in range(steps):
        basis_KD[step] = vector_D / vector_D.norm()
        vector_D = torch.linalg.solve_triangular(factor_DD.T, basis_KD[step][:, None], upper=False)
        vector_D = torch.linalg.solve_triangular(factor_DD, vector_D, upper=True)[:, 0]
        known_KD = basis_KD[: step + 1]
        tridiagonal_KK[step, step] = float(vector_D @ basis_KD[step])
        for _ in range(2):
            vector_D = vector_D - known_KD.T @ (known_KD @ vector_D)
        values_K, vectors_KK = torch.linalg.eigh(tridiagonal_KK[: step + 1, : step + 1])
        largest, weights_K = float(values_K[-1]), vectors_KK[:, -1]
        residual = float(vector_D.norm())
        if residual * abs(float(weights_K[-1])) <= tolerance * largest or step + 1 == steps:
            break
        tridiagonal_KK[step, step + 1] = tridiagonal_KK[step + 1, step] = residual
    bottom_D = weights_K.to(basis_KD) @ basis_KD[: len(weights_K)]
    bottom_D = bottom_D / bottom_D.norm()
    return float((factor_DD @ bottom_D).norm()), bottom_D


def _add_gram(upper_DD: Tensor, rows_ND: Tensor) -> None:
    """Add the upper block triangle of `rows^T rows`: 9/16 of the flops of the whole product.

    numpy would call SYRK, half the flops; but its threads and torch's then wait for each other in the forward pass.
    """
    D = rows_ND.shape[1]
    step = -(-D // _PANELS)
    for start in range(0, D, step):
        stop = min(start + step, D)
        upper_DD[start:stop, start:].addmm_(rows_ND[:, start:stop].T, rows_ND[:, start:])


def _regularised(factor_DD: Tensor) -> Tensor:
    """R with its singular values kept above 1e-12 of its size, so that an exactly dead direction can be divided by."""
    size = factor_DD.norm() / math.sqrt(len(factor_DD))
    floor = 1e-12 * size * torch.eye(len(factor_DD), dtype=factor_DD.dtype, device=factor_DD.device)
    regularised: Tensor = torch.linalg.qr(torch.cat([factor_DD, floor]), mode="r").R
    return regularised
