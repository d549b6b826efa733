"""The one place where spectra ask a device for arithmetic of order D^3, and where what it says is checked.

On the CPU it is LAPACK, as it stands. On an accelerator every result is looked at: eigenpairs by their residual, their
orthogonality and the trace, against the certificate of 32 eps l_1; factors and solves by what they do to two random
vectors (Freivalds 1979). A solver that was wrong once is not asked again: the CPU does its work from then on, and
`remarks` says so. GPU eigensolvers have failed on low-rank matrices (pytorch#105359). Shapes: N rows, D hidden size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deadbench.suite.spectra import solver_checks

_NARROW_PANEL, _NARROW_UP_TO = 96, 1024  # columns of matrices up to that width
_WIDE_PANEL, _PANELS = 192, 8  # of wider ones at least and at most: cores are busier with fewer, wider panels
_BETWEEN_ROWS = 8  # float64, a line of the cache
_NAMES = {"triangle": "qr", "orthonormal": "qr", "solve": "a triangular solve", "square": "a product of triangles"}


class Lapack:
    """What torch.linalg does where the matrix lies, unlooked at."""

    def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
        """(eigenvalues, ascending; eigenvectors as columns) of a symmetric matrix, of which one triangle is read."""
        values_D, vectors_DD = torch.linalg.eigh(matrix_DD, UPLO=uplo)
        return values_D, vectors_DD

    def cholesky(self, matrix_DD: Tensor) -> tuple[Tensor, bool]:
        """(upper triangular factor, whether there is one); the upper triangle is read."""
        factor_DD, failed = torch.linalg.cholesky_ex(matrix_DD, upper=True)
        return factor_DD, not int(failed)

    def triangle(self, rows_ND: Tensor) -> Tensor:
        """R of a QR."""
        factor_KD: Tensor = torch.linalg.qr(rows_ND, mode="r").R
        return factor_KD

    def orthonormal(self, columns_DK: Tensor) -> Tensor:
        """Q of a QR."""
        basis_DK: Tensor = torch.linalg.qr(columns_DK).Q
        return basis_DK

    def solve(self, factor_DD: Tensor, columns_DK: Tensor, *, upper: bool) -> Tensor:
        """X with `factor X = columns`, the factor triangular."""
        solution_DK: Tensor = torch.linalg.solve_triangular(factor_DD, columns_DK, upper=upper)
        return solution_DK

    def square(self, factor_DD: Tensor) -> Tensor:
        """`gram_of_triangle`."""
        return gram_of_triangle(factor_DD)

    def offered(self, lower_DD: Tensor, columns_DK: Tensor) -> tuple[Tensor, Tensor | None]:
        """(`solve` with a lower triangular factor, whether it is right, None: it is); nobody waits for the answer."""
        return self.solve(lower_DD, columns_DK, upper=False), None


_LAPACK = Lapack()


class Checked:
    """A device's solvers, each believed until it is wrong once."""

    def __init__(self, name: str, device: Lapack = _LAPACK):
        """`name`: what remarks call it."""
        self.name, self._device = name, device
        self.distrusted: set[str] = set()
        self._untold: list[str] = []

    def told(self) -> list[str]:
        """What has been found wrong since this was last asked, a line each."""
        told, self._untold = self._untold, []
        return told

    def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
        """As `Lapack.eigh`, certified."""

        def wrong(found: tuple[Tensor, Tensor]) -> str | None:
            whole_DD = matrix_DD.triu() if uplo == "U" else matrix_DD.tril()
            whole_DD = whole_DD + whole_DD.T
            whole_DD.diagonal().mul_(0.5)
            return solver_checks.why_not_eigenpairs(whole_DD, *found)

        return self._asked("eigh", wrong, matrix_DD, uplo)  # type: ignore[no-any-return]

    def cholesky(self, matrix_DD: Tensor) -> tuple[Tensor, bool]:
        """As `Lapack.cholesky`. That there is none is believed: a matrix without one is then read by other means."""

        def wrong(found: tuple[Tensor, bool]) -> str | None:
            factor_DD, exists = found
            return solver_checks.why_not_root(matrix_DD, factor_DD) if exists else None

        return self._asked("cholesky", wrong, matrix_DD)  # type: ignore[no-any-return]

    def triangle(self, rows_ND: Tensor) -> Tensor:
        """As `Lapack.triangle`: R is triangular, has the rows' Gram matrix, and makes them orthonormal."""

        def divided(factor_KK: Tensor, columns_K2: Tensor) -> Tensor:
            found = self._device.solve(factor_KK, columns_K2, upper=True)
            overflows = not bool(torch.isfinite(found.norm().square()))  # no fault of the solver's
            return found if overflows else self.solve(factor_KK, columns_K2, upper=True)

        def wrong(factor_KD: Tensor) -> str | None:
            return solver_checks.why_not_triangle(rows_ND, factor_KD, divided)

        return self._asked("triangle", wrong, rows_ND)  # type: ignore[no-any-return]

    def orthonormal(self, columns_DK: Tensor) -> Tensor:
        """As `Lapack.orthonormal`: Q is orthonormal, and spans the columns."""

        def wrong(basis_DK: Tensor) -> str | None:
            return solver_checks.why_not_basis(columns_DK, basis_DK)

        return self._asked("orthonormal", wrong, columns_DK)  # type: ignore[no-any-return]

    def solve(self, factor_DD: Tensor, columns_DK: Tensor, *, upper: bool) -> Tensor:
        """As `Lapack.solve`: small residual."""

        def wrong(solution_DK: Tensor) -> str | None:
            return solver_checks.why_not_solution(factor_DD, solution_DK, columns_DK)

        return self._asked("solve", wrong, factor_DD, columns_DK, upper=upper)  # type: ignore[no-any-return]

    def square(self, factor_DD: Tensor) -> Tensor:
        """As `Lapack.square`: two random vectors see the same in it as in the factor."""

        def wrong(lower_DD: Tensor) -> str | None:
            return solver_checks.why_not_square(factor_DD, lower_DD)

        return self._asked("square", wrong, factor_DD)  # type: ignore[no-any-return]

    def offered(self, lower_DD: Tensor, columns_DK: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Lapack.offered`. What is said to be wrong is to be asked of `solve`, which finds it out by itself."""
        if "solve" in self.distrusted:
            return self.solve(lower_DD, columns_DK, upper=False), None
        try:
            found = self._device.solve(lower_DD, columns_DK, upper=False)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return self.solve(lower_DD, columns_DK, upper=False), None
        return found, solver_checks.is_solution(lower_DD, found, columns_DK)

    def _asked(self, method: str, wrong: Callable[[Any], str | None], *given: Any, **options: Any) -> Any:
        """What the device says, if it is right; else what the CPU says."""
        if method not in self.distrusted:
            try:
                found = getattr(self._device, method)(*given, **options)
                reason = wrong(found)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # torch.linalg.LinAlgError among them, and cuSOLVER's own
                reason = f"failed ({str(error).strip().partition(chr(10))[0][:120]})"
            if reason is None:
                return found
            self.distrusted.add(method)
            self._untold.append(f"{_NAMES.get(method, method)} on {self.name} {reason}; the CPU does it from here on")
        place = given[0].device
        found = getattr(_LAPACK, method)(*(_moved(each, torch.device("cpu")) for each in given), **options)
        return _moved(found, place)


WAYS: dict[str, Lapack | Checked] = {"cpu": _LAPACK}  # by the type of the device; others are checked


def solvers(matrix: Tensor) -> Lapack | Checked:
    """The solvers for where a matrix lies."""
    kind = matrix.device.type
    if kind not in WAYS:
        WAYS[kind] = Checked(kind)
    return WAYS[kind]


def remarks() -> list[str]:
    """What devices were found to do wrong since this was last asked, a line each."""
    return [line for way in WAYS.values() if isinstance(way, Checked) for line in way.told()]


def add_gram(upper_DD: Float[Tensor, "D D"], rows_ND: Float[Tensor, "N D"]) -> None:
    """Add the upper block triangle of `rows^T rows`: in 8 panels 9/16 of the flops of the whole product.

    numpy would call SYRK, half the flops; but its threads and torch's then wait for each other in the forward pass.
    """
    for start, stop in _panels(rows_ND.shape[1]):
        upper_DD[start:stop, start:].addmm_(rows_ND[:, start:stop].T, rows_ND[:, start:])


def spaced_rows(shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "N D"]:
    """Memory for (N, D) rows that are to be multiplied, a line of the cache between them.

    Where D is a power of two, a column's numbers would else be kept in a few places of the cache that they push each
    other out of: products took up to 1.3 times as long. What is computed is the same.
    """
    num_rows, hidden_size = shape
    return torch.empty(num_rows, hidden_size + _BETWEEN_ROWS, dtype=torch.float64, device=device)[:, :hidden_size]


def gram_of_triangle(factor_DD: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """The lower block triangle of `R^T R`, R upper triangular, and zeros: in 8 panels two fifths of the flops."""
    lower_DD = factor_DD.new_zeros(factor_DD.shape)  # row by row, however R lies
    for start, stop in _panels(len(factor_DD)):
        torch.mm(factor_DD[:stop, start:stop].T, factor_DD[:stop, :stop], out=lower_DD[start:stop, :stop])
    return lower_DD


def _panels(hidden_size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of the columns that are multiplied at once."""
    wide = max(_WIDE_PANEL, -(-hidden_size // _PANELS))
    step = _NARROW_PANEL if hidden_size <= _NARROW_UP_TO else wide
    return ((start, min(start + step, hidden_size)) for start in range(0, hidden_size, step))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_moved(each, device) for each in value) if isinstance(value, tuple) else value
