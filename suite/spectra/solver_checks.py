"""Whether what a device says of arithmetic of order D^3 is so, by arithmetic of order D^2 where that will do.

Each asks what a right solver, which rounds, fulfils whatever the matrix, and says in words why the answer does not.
Shapes: N rows, D hidden size, K columns or rows of a factor.
"""

import threading
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from deadbench.suite.spectra.directions import FLOAT64_EPS

_CERTIFIED = 32 * FLOAT64_EPS  # of the largest eigenvalue; a check rounds too, and by sqrt(D)
_SUMMED = 1e-9  # of a Gram matrix, relative: sums of N squares in another order


class DeviceError(RuntimeError):
    """A device whose plain matrix products are wrong: nothing that it says can be used."""


def why_not_eigenpairs(
    matrix_DD: Float[Tensor, "D D"], values_D: Float[Tensor, " D"], vectors_DD: Float[Tensor, "D D"]
) -> str | None:
    """Why these are not all eigenpairs of a symmetric matrix in ascending order, to the certificate; None if they are.

    Within `|A v - l v|` of l there is an eigenvalue; orthogonality and the trace say that none is there twice.

    Example:
        >>> why_not_eigenpairs(torch.eye(2), torch.ones(2), torch.eye(2)) is None
        True
    """
    D = len(matrix_DD)
    if values_D.shape != (D,) or vectors_DD.shape != (D, D):
        return f"gives {len(values_D)} eigenvalues of {D}"
    allowed = _CERTIFIED * max(1.0, D**0.5 / 16)
    largest = values_D.abs().max()
    residual = torch.linalg.vector_norm(matrix_DD @ vectors_DD - vectors_DD * values_D, dim=0).max()
    trace = (values_D.sum() - matrix_DD.diagonal().sum()).abs()
    error = torch.maximum(residual, trace / D)
    if not float(error) <= allowed * float(largest) < torch.inf:
        return f"is wrong by {float(error / largest):.1e} of the largest eigenvalue ({allowed:.1e} allowed)"
    if not bool((values_D[1:] >= values_D[:-1]).all()):
        return "gives eigenvalues that do not ascend"
    return _not_orthonormal(vectors_DD)


def why_not_root(matrix_DD: Float[Tensor, "D D"], factor_DD: Float[Tensor, "D D"]) -> str | None:
    """Why F is not the Cholesky factor, `F^T F`, of a matrix of which the upper triangle is read."""
    if bool(factor_DD.tril(-1).any()):
        return "is not triangular"
    upper_DD, probe_D2 = matrix_DD.triu(), probe(matrix_DD)
    size = matrix_DD.diagonal().sum() * probe_D2.norm()  # the largest eigenvalue, from above
    return _differs(factor_DD.T @ (factor_DD @ probe_D2), _symmetric(upper_DD, probe_D2), size)


def why_not_square(factor_DD: Float[Tensor, "D D"], lower_DD: Float[Tensor, "D D"]) -> str | None:
    """Why this is not `F^T F`, of which the lower triangle is read."""
    probe_D2 = probe(factor_DD)
    expected = factor_DD.T @ (factor_DD @ probe_D2)
    return _differs(_symmetric(lower_DD.tril(), probe_D2), expected, factor_DD.norm().square() * probe_D2.norm())


def why_not_triangle(
    rows_ND: Float[Tensor, "N D"], factor_KD: Float[Tensor, "K D"], solve: Callable[[Tensor, Tensor], Tensor]
) -> str | None:
    """Why R is not that of the rows' QR: not triangular, not of their Gram matrix, or wrong where that shows nothing.

    Squared, what is 1e-8 long is rounding. So rows are also divided by R, which `solve` does, and must be orthonormal:
    `|A R^-1 x| = |x|` to the rounding of A, which `R^-1 x` makes as large as it is at the bottom.
    """
    if bool(factor_KD.tril(-1).any()):
        return "is not triangular"
    probe_D2, norm = probe(rows_ND), rows_ND.norm()
    found, expected = factor_KD.T @ (factor_KD @ probe_D2), rows_ND.T @ (rows_ND @ probe_D2)
    if reason := _differs(found, expected, norm.square() * probe_D2.norm()):
        return reason
    K = len(factor_KD)
    divisor_KK, probe_K2 = divisible(factor_KD[:, :K], FLOAT64_EPS), probe(factor_KD[:, :K])
    divided_K2 = solve(divisor_KK, probe_K2)
    size = norm * divided_K2.norm()
    if not float(size) < FLOAT64_EPS**-2:
        return None  # so many directions without any extent that this says nothing
    return _differs((rows_ND[:, :K] @ divided_K2).norm(), probe_K2.norm(), size + probe_K2.norm())


def why_not_basis(columns_DK: Float[Tensor, "D K"], basis_DK: Float[Tensor, "D K"]) -> str | None:
    """Why Q is not orthonormal, or does not span the columns, each to its own length."""
    left_K = torch.linalg.vector_norm(columns_DK - basis_DK @ (basis_DK.T @ columns_DK), dim=0)
    length_K = torch.linalg.vector_norm(columns_DK, dim=0)
    allowed = _CERTIFIED * max(1.0, len(columns_DK) ** 0.5 / 16)
    if not bool((left_K <= allowed * length_K).all()):
        return f"leaves {float((left_K / length_K).max()):.1e} of a column ({allowed:.1e} allowed)"
    return _not_orthonormal(basis_DK)


def why_not_solution(factor_DD: Tensor, solution_DK: Tensor, columns_DK: Tensor) -> str | None:
    """Why X is not the solution of `factor X = columns`."""
    return _differs(*_solved(factor_DD, solution_DK, columns_DK))


def is_solution(factor_DD: Tensor, solution_DK: Tensor, columns_DK: Tensor) -> Tensor:
    """Whether it is, without waiting for the device."""
    product, expected, size = _solved(factor_DD, solution_DK, columns_DK)
    right: Tensor = (product - expected).norm() <= _CERTIFIED * size
    return right


def check_gram(upper_DD: Float[Tensor, "D D"], squares: Float[Tensor, ""], along: Float[Tensor, ""] | None) -> None:
    """Compare a Gram matrix with the sum of its rows' squares, which no matrix product formed.

    `along`: the sum of the squares of rows along the first vector of `probe`, which sees every element.

    Raises:
        DeviceError: they are not the same.
    """
    trace = upper_DD.diagonal().sum()
    if not float((trace - squares).abs()) <= _SUMMED * float(squares):
        raise DeviceError(
            f"matrix products on {upper_DD.device.type} are wrong: a Gram matrix of trace {float(trace):.6e} for rows "
            f"whose squares come to {float(squares):.6e}"
        )
    if along is not None:
        seen = square_along(upper_DD)
        if not float((seen - along).abs()) <= _SUMMED * float(torch.maximum(along, squares)):
            raise DeviceError(
                f"matrix products on {upper_DD.device.type} are wrong: along a random vector a Gram matrix has "
                f"{float(seen):.6e}, and its rows {float(along):.6e}"
            )


def square_along(upper_DD: Float[Tensor, "D D"]) -> Float[Tensor, ""]:
    """`p^T G p` of a Gram matrix of which the upper triangle is read, p the first vector of `probe`."""
    probe_D1 = probe(upper_DD)[:, :1]
    square: Tensor = (_symmetric(upper_DD.triu(), probe_D1) * probe_D1).sum()
    return square


def divisible(factor_DD: Tensor, least: float) -> Tensor:
    """R that can be solved with: diagonal elements of an exactly dead direction raised to `least` of its size."""
    bound = least * float(factor_DD.norm())
    small_D = factor_DD.diagonal().abs() < bound
    if bool(small_D.any()):
        factor_DD = factor_DD.clone()
        factor_DD.diagonal()[small_D] = bound
    return factor_DD


def probe(like: Float[Tensor, "N D"]) -> Float[Tensor, "D 2"]:
    """Two random vectors for what has so many columns, the same each time."""
    return _drawn(like.shape[1], like.device, threading.get_ident())


@lru_cache(maxsize=8)
def _drawn(length: int, device: torch.device, thread: int) -> Tensor:
    """Of each thread its own: memory that one gives up may not be taken before the other's stream has read it."""
    return torch.randn(length, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)


def _symmetric(triangle_DD: Tensor, columns_DK: Tensor) -> Tensor:
    """The product with the symmetric matrix of which this is a triangle."""
    return triangle_DD @ columns_DK + triangle_DD.T @ columns_DK - triangle_DD.diagonal()[:, None] * columns_DK


def _not_orthonormal(columns_DK: Tensor) -> str | None:
    if not columns_DK.shape[1]:
        return None
    products_KK = columns_DK.T @ columns_DK
    products_KK.diagonal().sub_(1)
    worst = float(torch.linalg.vector_norm(products_KK, dim=0).max())
    allowed = _CERTIFIED / 4 * max(8.0, len(columns_DK) ** 0.5)
    return None if worst <= allowed else f"is not orthonormal by {worst:.1e} ({allowed:.1e} allowed)"


def _solved(factor_DD: Tensor, solution_DK: Tensor, columns_DK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a solution makes of two random vectors, what it should, and the size of what was rounded."""
    probe_K2 = probe(columns_DK)
    size = (factor_DD.norm() * solution_DK.norm() + columns_DK.norm()) * probe_K2.norm()
    return factor_DD @ (solution_DK @ probe_K2), columns_DK @ probe_K2, size


def _differs(found: Tensor, expected: Tensor, size: Tensor) -> str | None:
    """Whether two products that should be equal are not, to the rounding of what is of `size`."""
    error, allowed = float((found - expected).norm()), _CERTIFIED * float(size)
    return None if error <= allowed else f"is wrong by {error / float(size):.1e} ({_CERTIFIED:.1e} allowed)"
