"""A device whose solver is wrong in one way is found out, named, and does not change the spectrum.

A fake device stands in the place of the CPU: its matrices are ordinary ones, and one of its solvers is not.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from deadbench.suite.spectra import solvers as place
from deadbench.suite.spectra.covariance import CovarianceFactor
from deadbench.suite.spectra.solver_checks import DeviceError, why_not_eigenpairs
from deadbench.suite.spectra.solvers import (
    Checked,
    Lapack,
    add_gram,
    gram_of_triangle,
    remarks,
)

_D = 40


class Recording(Lapack):
    """A device that is right, and says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattribute__(self, name: str):
        if name in ("eigh", "cholesky", "triangle", "orthonormal", "solve"):
            self.asked.append(name)
        return super().__getattribute__(name)


class FirstTwice(Lapack):
    def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
        values_D, vectors_DD = super().eigh(matrix_DD, uplo)
        values_D[0], vectors_DD[:, 0] = values_D[1], vectors_DD[:, 1]  # true pairs, and one of them is missing
        return values_D, vectors_DD


class SlightlyOff(Lapack):
    def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
        values_D, vectors_DD = super().eigh(matrix_DD, uplo)
        return values_D + 1e-12 * values_D[-1], vectors_DD


class SinglePrecision(Lapack):
    def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
        values_D, vectors_DD = super().eigh(matrix_DD.float(), uplo)
        return values_D.double(), vectors_DD.double()

    def cholesky(self, matrix_DD: Tensor) -> tuple[Tensor, bool]:
        factor_DD, exists = super().cholesky(matrix_DD.float())
        return factor_DD.double(), exists

    def triangle(self, rows_ND: Tensor) -> Tensor:
        return super().triangle(rows_ND.float()).double()

    def orthonormal(self, columns_DK: Tensor) -> Tensor:
        return super().orthonormal(columns_DK.float()).double()

    def solve(self, factor_DD: Tensor, columns_DK: Tensor, *, upper: bool) -> Tensor:
        return super().solve(factor_DD.float(), columns_DK.float(), upper=upper).double()


class NotANumber(Lapack):
    def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
        values_D, vectors_DD = super().eigh(matrix_DD, uplo)
        return values_D * torch.nan, vectors_DD


class Failing(Lapack):
    def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge\nmore of it")


class OutOfOrder(Lapack):
    def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
        values_D, vectors_DD = super().eigh(matrix_DD, uplo)
        return values_D[[1, 0, *range(2, _D)]], vectors_DD[:, [1, 0, *range(2, _D)]]  # each pair is right


class OneMissing(Lapack):
    def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
        values_D, vectors_DD = super().eigh(matrix_DD, uplo)
        return values_D[1:], vectors_DD[:, 1:]  # and it is so small that the trace does not tell


class Infinite(Lapack):
    def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
        values_D, vectors_DD = super().eigh(matrix_DD, uplo)
        return torch.cat([values_D[:-1], values_D.new_tensor([torch.inf])]), vectors_DD


class NotTriangular(Lapack):
    def cholesky(self, matrix_DD: Tensor) -> tuple[Tensor, bool]:
        values_D, vectors_DD = torch.linalg.eigh(matrix_DD, UPLO="U")  # another root of the same matrix
        return values_D.clamp(min=0).sqrt()[:, None] * vectors_DD.T, bool(values_D[0] > 0)


class WrongAtTheBottom(Lapack):
    def triangle(self, rows_ND: Tensor) -> Tensor:
        factor_KD = super().triangle(rows_ND).clone()
        factor_KD[-1, -1] *= 1.5  # whose square is less than the rounding of the largest's
        return factor_KD


class OtherLastColumn(Lapack):
    def orthonormal(self, columns_DK: Tensor) -> Tensor:
        basis_DK = super().orthonormal(columns_DK).clone()
        left_D = torch.ones(_D, dtype=torch.float64)
        for _ in range(2):
            left_D = left_D - basis_DK @ (basis_DK.T @ left_D)
        basis_DK[:, -1] = left_D / left_D.norm()
        return basis_DK


class PartOfASquare(Lapack):
    def square(self, factor_DD: Tensor) -> Tensor:
        lower_DD = super().square(factor_DD)
        lower_DD[20:30, :5] *= 1 + 1e-6
        return lower_DD


# What is asked of it, and whether a kind of rows asks for that.
FURTHER = [
    (OutOfOrder(), "eigh", "plain", "do not ascend"),
    (OneMissing(), "eigh", "dead", "gives 39 eigenvalues of 40"),
    (Infinite(), "eigh", "plain", "is wrong by nan"),
    (NotTriangular(), "cholesky", "many dead", "is not triangular"),
    (WrongAtTheBottom(), "triangle", "graded", "is wrong by"),
    (OtherLastColumn(), "orthonormal", "dead", "of a column"),
    (PartOfASquare(), "square", "dead", "is wrong by"),
]


def rows(kind: str) -> torch.Tensor:
    """`plain`: all directions alike; `dead`: one 1e-8 as long; `many dead`: so many that rows are whitened."""
    if kind == "graded":
        return rows("plain") * torch.logspace(0, -9, _D, dtype=torch.float64)
    rows_ND = torch.randn(12 * _D, _D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows_ND[:, : {"plain": 0, "dead": 1, "many dead": 12}[kind]] *= 1e-8
    return rows_ND


def spectrum(kind: str):
    factor = CovarianceFactor(_D)
    for part in rows(kind).split(100):
        factor.update(part)
    return factor.finish()


@pytest.fixture
def device(monkeypatch):
    """Puts a fake device in the place of the CPU."""

    def put(fake: Lapack) -> Checked:
        checked = Checked("fake", fake)
        monkeypatch.setitem(place.WAYS, "cpu", checked)
        return checked

    return put


@pytest.mark.parametrize("kind", ["plain", "dead", "many dead"])
def test_what_decomposes_is_asked_of_the_device_and_a_right_one_gives_the_same_bits(device, kind):
    expected = spectrum(kind)
    fake = Recording()
    checked = device(fake)
    found = spectrum(kind)
    np.testing.assert_array_equal(found.eigenvalues_D, expected.eigenvalues_D)
    np.testing.assert_array_equal(found.eigenvectors_DD, expected.eigenvectors_DD)
    assert "eigh" in fake.asked
    assert {"cholesky", "solve"} <= {*fake.asked}
    assert not checked.distrusted
    assert remarks() == []


@pytest.mark.parametrize("fake", [FirstTwice(), SlightlyOff(), SinglePrecision(), NotANumber(), Failing()])
@pytest.mark.parametrize("kind", ["plain", "dead", "many dead"])
def test_a_wrong_solver_is_named_once_and_the_spectrum_is_the_cpus(device, kind, fake):
    expected = spectrum(kind)
    checked = device(fake)
    found = spectrum(kind)
    assert found.method == expected.method
    largest = expected.eigenvalues_D[0]
    np.testing.assert_allclose(found.eigenvalues_D, expected.eigenvalues_D, rtol=1e-6, atol=32 * 2.2e-16 * largest)
    np.testing.assert_allclose(found.eigenvalues_D[-1], expected.eigenvalues_D[-1], rtol=1e-6)
    assert "eigh" in checked.distrusted
    told = remarks()
    assert sum(line.startswith("eigh on fake ") for line in told) == 1
    assert all(line.endswith("; the CPU does it from here on") and "\n" not in line for line in told)
    spectrum(kind)
    assert remarks() == [], "once is enough"


@pytest.mark.parametrize(("fake", "asked", "kind", "told"), FURTHER, ids=[type(each[0]).__name__ for each in FURTHER])
def test_what_looks_right_is_found_out_too(device, fake, asked, kind, told):
    expected = spectrum(kind)
    checked = device(fake)
    np.testing.assert_allclose(spectrum(kind).eigenvalues_D, expected.eigenvalues_D, rtol=1e-9)
    (line,) = remarks()
    assert asked in checked.distrusted
    assert told in line


@pytest.mark.parametrize("kind", ["plain", "rank-deficient", "nothing", "graded"])
def test_a_right_device_is_not_accused(kind):
    rows_ND = {"rank-deficient": rows("plain")[:, :9] @ rows("plain")[:9], "nothing": 0 * rows("plain")}
    checked = Checked("fake", Lapack())
    checked.square(checked.triangle(rows_ND.get(kind, rows("graded") if kind == "graded" else rows("plain"))))
    assert checked.told() == []


def test_a_solver_that_was_right_in_everything_else_is_still_asked(device):
    checked = device(FirstTwice())
    spectrum("dead")
    assert checked.distrusted == {"eigh"}


def test_out_of_memory_is_no_wrong_answer(device):
    class Full(Lapack):
        def eigh(self, matrix_DD: Tensor, uplo: str) -> tuple[Tensor, Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    checked = device(Full())
    with pytest.raises(torch.OutOfMemoryError):
        spectrum("plain")
    assert not checked.distrusted


def test_matrix_products_that_are_wrong_end_the_read(monkeypatch):
    monkeypatch.setattr("deadbench.suite.spectra.gram.add_gram", lambda upper_DD, rows_ND: upper_DD.add_(1.0))
    with pytest.raises(DeviceError, match="matrix products on cpu are wrong: a Gram matrix of trace"):
        spectrum("plain")


@pytest.mark.parametrize("then", ["finish", "pack", "merge"])
def test_one_panel_of_a_product_that_is_wrong_ends_the_read_before_its_gram_matrix_goes_on(device, monkeypatch, then):
    def wrong(upper_DD, rows_ND):
        add_gram(upper_DD, rows_ND)
        upper_DD[:5, 20:30] *= 1 + 1e-6  # of which the trace knows nothing

    device(Lapack())
    factor = CovarianceFactor(_D)
    factor.update(rows("plain"))  # the route is decided
    after = factor.successor()
    monkeypatch.setattr("deadbench.suite.spectra.gram.add_gram", wrong)
    after.update(rows("plain"))
    does = {"finish": after.finish, "pack": after.to_arrow, "merge": lambda: factor.merge(after)}
    with pytest.raises(DeviceError, match="matrix products on cpu are wrong: along a random vector"):
        does[then]()


def test_eigenpairs_are_right_at_the_certificate_and_wrong_above_it():
    matrix_DD = rows("dead").T @ rows("dead")
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    assert why_not_eigenpairs(matrix_DD, values_D, vectors_DD) is None
    values_D[3] += 40 * 2.2e-16 * values_D[-1]
    assert "of the largest eigenvalue" in why_not_eigenpairs(matrix_DD, values_D, vectors_DD)


@pytest.mark.parametrize("hidden_size", [1, 50, 96, 200, 800])
def test_products_in_panels_are_the_whole_product_s_triangle(hidden_size):
    rows = torch.randn(64, hidden_size, dtype=torch.float64)
    upper = torch.ones(hidden_size, hidden_size, dtype=torch.float64)
    add_gram(upper, rows)
    torch.testing.assert_close(upper.triu(), (rows.T @ rows + 1).triu())
    factor = torch.randn(hidden_size, hidden_size, dtype=torch.float64).triu()
    for laid in (factor, factor.T.contiguous().T):  # LAPACK's lie column by column
        torch.testing.assert_close(gram_of_triangle(laid).tril(), (factor.T @ factor).tril())
