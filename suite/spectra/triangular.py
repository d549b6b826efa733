"""What a triangular factor R says: singular values and right singular vectors, the smallest right to the last digit.

`R^T R` is the covariance, but squaring halves the digits: only eigenvalues far above 32 eps l_1 are taken of it, and
the few below come from R. Shapes: D hidden size, K steps or directions.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from deadbench.suite.spectra.directions import FLOAT64_EPS
from deadbench.suite.spectra.solver_checks import divisible
from deadbench.suite.spectra.solvers import solvers

CERTIFIED_RELATIVE_ERROR = 1e-6
GRAM_ERROR = 32 * FLOAT64_EPS  # |error of an eigenvalue| <= this * l_1, when rows enter a Gram matrix unwhitened
_FEW = 16  # bottom directions that are cheaper one subspace at a time than with the whole


def resolution_and_floor(largest: float, off_centre: float | None) -> tuple[float, float]:
    """(resolution, floor): eigenvalues that are all rounding, and those up to which 1e-6 relative is not certified.

    An SVD of R moves every singular value by up to 4 eps sigma_1, and an eigenvalue by twice that relative to sigma;
    a Gram matrix of rows as they are moves every eigenvalue by 32 eps l_1, or of what they are `off_centre` (None: no
    such matrix).
    """
    if off_centre is not None:
        largest = max(largest, off_centre)
        return largest * GRAM_ERROR, largest * GRAM_ERROR / CERTIFIED_RELATIVE_ERROR
    moved = 8 * FLOAT64_EPS
    return largest * moved**2, largest * (moved / CERTIFIED_RELATIVE_ERROR) ** 2


def decompose(factor_DD: Float[Tensor, "D D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """(squared singular values, descending; right singular vectors as rows) of an upper triangular R.

    Values whose eigh of `R^T R` is certified to 1e-6 are taken from there, at a third of the cost of an SVD. Where few
    are not, the subspace below is found by inverse iteration on R (Golub, Van Loan, 8.2), as accurate as an SVD. Where
    many are not, or the iteration finds no gap, it is the SVD.
    """
    solver = solvers(factor_DD)
    values_D, vectors_DD = solver.eigh(solver.square(factor_DD), "L")  # ascending; vectors are columns
    if not factor_DD.any():  # rows that are all the same
        return values_D, vectors_DD.T
    uncertain = int((values_D <= values_D[-1] * (GRAM_ERROR / CERTIFIED_RELATIVE_ERROR)).sum())
    if uncertain:
        bottom = _bottom_subspace(factor_DD, vectors_DD[:, :uncertain]) if uncertain <= _FEW else None
        if bottom is None:
            _, sigma_D, rows_DD = torch.linalg.svd(factor_DD.cpu())  # on a GPU it is no faster
            return sigma_D.square(), rows_DD
        squares_K, bottom_DK = bottom
        rest = vectors_DD[:, uncertain:]
        rest -= bottom_DK @ (bottom_DK.T @ rest)
        rest /= torch.linalg.vector_norm(rest, dim=0)
        vectors_DD[:, :uncertain] = bottom_DK
        values_D = torch.cat([squares_K, values_D[uncertain:]])
    return values_D.flip(0), vectors_DD.flip(1).T


def _bottom_subspace(factor_DD: Tensor, start_DK: Tensor) -> tuple[Tensor, Tensor] | None:
    """(squared singular values, ascending; right singular vectors) of the bottom K; None where it does not settle."""
    # Directions below rounding are one as good as the other; unbounded, the deepest would drown the rest of the basis.
    solvable_DD = divisible(factor_DD, FLOAT64_EPS)
    basis_DK, before_K = start_DK, torch.full((start_DK.shape[1],), torch.inf).to(start_DK)
    solver = solvers(factor_DD)
    rounding = FLOAT64_EPS * float(factor_DD.norm())
    for _ in range(6):
        left_DK = solver.orthonormal(solver.solve(solvable_DD.T, basis_DK, upper=False))
        basis_DK = solver.orthonormal(solver.solve(solvable_DD, left_DK, upper=True))
        few = torch.linalg.svd((factor_DD @ basis_DK).cpu(), full_matrices=False)
        sigma_K, rotation_KK = few.S.to(basis_DK), few.Vh.to(basis_DK)
        if bool((abs(sigma_K - before_K) <= 1e-10 * sigma_K + rounding).all()):
            return sigma_K.square().flip(0), (basis_DK @ rotation_KK.T).flip(1)
        before_K = sigma_K
    return None


def smallest_singular_pair(
    factor_DD: Float[Tensor, "D D"], steps: int = 80, tolerance: float = 1e-12
) -> tuple[float, Float[Tensor, " D"]]:
    """Smallest singular value of an upper triangular R and its right singular vector, without the rest.

    The smallest of R is the largest of `(R^T R)^-1`, and the best separated. Stops when the residual is below
    `tolerance` relative.
    """
    if not factor_DD.any():
        return 0.0, torch.eye(len(factor_DD), dtype=torch.float64, device=factor_DD.device)[0]
    factor_DD = divisible(factor_DD, 1e-60)  # zero for all purposes, even squared
    inverse_squares_K, ritz_DK = _inverse_lanczos(factor_DD, steps, tolerance, 0.0)
    bottom_D = ritz_DK[:, -1] / ritz_DK[:, -1].norm()
    # Both are from above. Of a rough vector `|R b|` is too large by whatever there is in it of the largest direction.
    return min(float((factor_DD @ bottom_D).norm()), float(inverse_squares_K[-1]) ** -0.5), bottom_D


def directions_below(factor_DD: Float[Tensor, "D D"], below: float, steps: int) -> Float[Tensor, "D K"]:
    """Right singular vectors, orthonormal, of an upper triangular R's singular values under `below`, found in `steps`.

    Ends when the smallest that is not under `below` is known to a percent, those under it then to many digits.
    """
    inverse_squares_K, ritz_DK = _inverse_lanczos(factor_DD, steps, 1e-2, below)
    return solvers(factor_DD).orthonormal(ritz_DK[:, inverse_squares_K > below**-2])


def _inverse_lanczos(factor_DD: Tensor, steps: int, tolerance: float, below: float) -> tuple[Tensor, Tensor]:
    """Ritz values (ascending) and vectors of `(R^T R)^-1`: two triangular solves a step (Golub, Van Loan, 10.3).

    With full reorthogonalisation. Ends early when the residual of the largest, leaving out those of singular values
    under `below`, is below `tolerance` relative.
    """
    left_out = below**-2 if below else torch.inf
    D = len(factor_DD)
    steps, solver = min(steps, D), solvers(factor_DD)
    basis_KD = torch.zeros(steps, D, dtype=torch.float64, device=factor_DD.device)
    tridiagonal_KK = torch.zeros(steps, steps, dtype=torch.float64)
    vector_D = torch.randn(D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(factor_DD.device)
    values_K, vectors_KK = torch.ones(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for step in range(steps):
        basis_KD[step] = vector_D / vector_D.norm()
        vector_D = solver.solve(factor_DD.T, basis_KD[step][:, None], upper=False)
        vector_D = solver.solve(factor_DD, vector_D, upper=True)[:, 0]
        known_KD = basis_KD[: step + 1]
        tridiagonal_KK[step, step] = float(vector_D @ basis_KD[step])
        for _ in range(2):
            vector_D = vector_D - known_KD.T @ (known_KD @ vector_D)
        values_K, vectors_KK = torch.linalg.eigh(tridiagonal_KK[: step + 1, : step + 1])
        residual, counted = float(vector_D.norm()), int((values_K <= left_out).sum()) - 1
        error = residual * abs(float(vectors_KK[-1, counted]))
        if (counted >= 0 and error <= tolerance * float(values_K[counted])) or step + 1 == steps:
            break
        tridiagonal_KK[step, step + 1] = tridiagonal_KK[step + 1, step] = residual
    return values_K, basis_KD[: len(values_K)].T @ vectors_KK.to(basis_KD)
