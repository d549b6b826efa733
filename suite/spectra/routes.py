"""The routes by a Gram matrix, a class each: in coordinates where all directions are of like size squaring is for free.

Rows are squared as they are, lifted along the few directions in which they hardly extend, or whitened by the R of
earlier rows. A route takes rows, or refuses what would lose the bottom; merges with its like; joins R; and is packed.
Shapes: N tokens, D hidden size, K dead directions or rows of a factor.
"""

import copy
import math
from typing import Self

import pyarrow as pa
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from deadbench.suite.spectra.arrow_state import VECTOR, fields, struct, tensor, triangle, upper, vector
from deadbench.suite.spectra.gram import Gram
from deadbench.suite.spectra.qr import Qr
from deadbench.suite.spectra.solvers import solvers, spaced_rows

GRAM_STATE = pa.schema(
    {
        "count": pa.int64(),
        "typical_square": pa.float64(),
        "sum": VECTOR,
        "upper": VECTOR,
        "whitener": VECTOR,
        "dead": VECTOR,
        "dead_size": VECTOR,
    }
)


class _Squared:
    """What the routes by a Gram matrix of rows w have in common; how w is made of z is each one's own."""

    def __init__(self, gram: Gram):
        self.gram = gram

    @property
    def count(self) -> int:
        """Rows squared."""
        return self.gram.count

    def off_centre(self) -> float:
        """`|mean w|^2`, where a certificate depends on it."""
        return self.gram.off_centre()

    def empty(self) -> Self:
        """The same coordinates, no rows."""
        after = copy.copy(self)
        after.gram = self.gram.empty_copy()
        return after

    def to_arrow(self) -> pa.RecordBatch:
        """The exact state, as one row of `GRAM_STATE`.

        Raises:
            DeviceError: the device's matrix products are wrong.
        """
        self.gram.check()  # whoever restores it no longer can
        columns = {
            "count": self.gram.count,
            "typical_square": self.gram.typical_square,
            "sum": vector(self.gram.sum_D),
            "upper": triangle(self.gram.upper_DD),
        }
        return struct(dict.fromkeys(GRAM_STATE.names) | columns | self._coordinates(), GRAM_STATE)

    def _coordinates(self) -> dict[str, pa.Array]:
        return {}


class Plain(_Squared):
    """w = z: one GEMM of 2D^2 flop a row; what is left of a row at the bottom is known to 32 eps of the top."""

    method = "gram"

    def take(self, rows_ND: Float[Tensor, "N D"]) -> bool:
        """Add rows; False, with nothing added, where one is too long."""
        return self.gram.add(rows_ND)

    def offer(self, rows_ND: Float[Tensor, "N D"]) -> Bool[Tensor, ""]:
        """`take` that does not wait for the device: whether it refused; the count is yet to be raised."""
        return self.gram.offer(rows_ND)

    def adds_to(self, other: _Squared) -> bool:
        """Whether the other's rows are in the same coordinates."""
        return isinstance(other, Plain)

    def merge(self, other: _Squared, shift_D: Float[Tensor, " D"] | None) -> None:
        """Add the rows of another that `adds_to` this, each with `shift_D` added to it."""
        self.gram.add_gram(other.gram, shift_D)

    def join(self, qr: Qr) -> "Plain":
        """Put the rows, at least one, into R; the route for more."""
        qr.off_centre = max(qr.off_centre, self.off_centre())
        qr.add(self.gram.root()[0], self.count, self.gram.mean())
        return self.empty()

    def decompose(
        self, offset_D: Float[Tensor, " D"]
    ) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"], Float[Tensor, " D"]]:
        """(eigenvalues, descending; eigenvectors as rows; mean squares of rows with `offset_D` added to them)."""
        covariance_DD = self._covariance()
        values_D, vectors_DD = solvers(covariance_DD).eigh(covariance_DD, "U")
        mean_square_D = covariance_DD.diagonal() + (offset_D + self.gram.mean()).square()
        return values_D.flip(0), vectors_DD.flip(1).T, mean_square_D

    def eigenvalues(self) -> Float[Tensor, " D"]:
        """The eigenvalues alone, descending."""
        eigenvalues_D: Tensor = torch.linalg.eigvalsh(self._covariance().cpu(), UPLO="U").flip(0)
        return eigenvalues_D

    def _covariance(self) -> Tensor:
        return self.gram.scatter() / self.count


class Lifted(_Squared):
    """`w = z + (1/s - 1) (z . b) b` along each of K orthonormal directions b in which rows extend s times as far.

    4 D K flop a row more than `Plain`; undone on `chol(G)`, so that nothing is squared at the bottom. The certificate
    of G holds for every eigenvalue of z's scatter as well: under a congruence relative errors stay below
    `|E| / l_min(G)` (Ostrowski).
    """

    method = "lifted-gram"

    def __init__(self, gram: Gram, dead_DK: Float[Tensor, "D K"], size_K: Float[Tensor, " K"]):
        super().__init__(gram)
        self.dead_DK, self.size_K = dead_DK, size_K

    def take(self, rows_ND: Float[Tensor, "N D"]) -> bool:
        """Add rows, which are stretched where they lie; False, with nothing done, where one is too long."""
        along_NK = rows_ND @ self.dead_DK
        square_N = torch.linalg.vector_norm(rows_ND, dim=-1).square() + along_NK.square() @ (self.size_K**-2 - 1)
        if not self.gram.resolves(square_N):
            return False
        self.gram.add_resolved(rows_ND.addmm_(along_NK * (1 / self.size_K - 1), self.dead_DK.T), square_N)
        return True

    def offer(self, rows_ND: Float[Tensor, "N D"]) -> Bool[Tensor, ""]:
        """As `Plain.offer`."""
        return self.gram.offer(self._stretched(rows_ND, 1 / self.size_K - 1))

    def adds_to(self, other: _Squared) -> bool:
        """Whether the other's rows are in the same coordinates."""
        return (
            isinstance(other, Lifted)
            and self.dead_DK.shape == other.dead_DK.shape
            and torch.equal(self.dead_DK, other.dead_DK)
            and torch.equal(self.size_K, other.size_K)
        )

    def merge(self, other: _Squared, shift_D: Float[Tensor, " D"] | None) -> None:
        """Add the rows of another that `adds_to` this, each with `shift_D` added to it."""
        lifted_D = None if shift_D is None else self._stretched(shift_D[None], 1 / self.size_K - 1)[0]
        self.gram.add_gram(other.gram, lifted_D)

    def join(self, qr: Qr) -> "Lifted":
        """Put the rows, at least one, into R; the route for more."""
        qr.off_centre = max(qr.off_centre, self.off_centre())
        root_DD, is_cholesky = self.gram.root()
        if not (is_cholesky and self.gram.certifies(root_DD)):
            qr.method = Plain.method  # later rows made it ill conditioned, and its eigenvalues have that certificate
        mean_D = self._stretched(self.gram.mean()[None], self.size_K - 1)[0]
        qr.add(self._stretched(root_DD, self.size_K - 1), self.count, mean_D)
        return self.empty()

    def _stretched(self, rows_KD: Tensor, by_K: Tensor) -> Tensor:
        return torch.addmm(rows_KD, rows_KD @ self.dead_DK * by_K, self.dead_DK.T)

    def _coordinates(self) -> dict[str, pa.Array]:
        return {"dead": vector(self.dead_DK), "dead_size": vector(self.size_K)}


class Whitened(_Squared):
    """`w = z R^-1`, R of earlier rows: two GEMMs a row. Squaring whitened rows loses nothing at the bottom."""

    method = "whitened-gram"

    def __init__(self, gram: Gram, whitener_DD: Float[Tensor, "D D"]):
        super().__init__(gram)
        self.whitener_DD = whitener_DD

    @classmethod
    def by(cls, qr: Qr) -> "Whitened":
        """No rows yet, whitened by what R is now."""
        D = qr.factor_KD.shape[1]
        return cls(Gram(D, qr.factor_KD.device, D), _regularised(qr.factor_KD / qr.count**0.5))

    def off_centre(self) -> float:
        """None that counts: whitened rows are certified by the gate."""
        return 0.0

    def take(self, rows_ND: Float[Tensor, "N D"]) -> bool:
        """Add rows; False, with nothing added, where R has not foreseen one: `max |w|^2 > 1e4 D`."""
        return self.gram.add(self._whitened(rows_ND.T).T)

    def offer(self, rows_ND: Float[Tensor, "N D"]) -> Bool[Tensor, ""]:
        """As `Plain.offer`; refused is also what the device solved wrongly."""
        columns_DN = rows_ND.T
        white_DN, right = solvers(columns_DN).offered(self.whitener_DD.T, columns_DN)
        return self.gram.offer(white_DN.T, right)

    def join(self, qr: Qr) -> "Whitened | None":
        """Put the rows, at least one, into R; the route for more, or None: it is to be whitened anew.

        By R itself whitened, R is `sqrt(count)` times the identity, and all is added where nothing can be lost. Where R
        had to be regularised, or is of other rows by now, the Gram matrix has a factor of its own.
        """
        if qr.count and torch.equal(qr.factor_KD / qr.count**0.5, self.whitener_DD):
            count, total = self.count, self.count + qr.count
            between_D = qr.mean_D - self.gram.mean() @ self.whitener_DD
            white_D = self._whitened(between_D[:, None])[:, 0]
            scatter_DD = self.gram.scatter() + count * qr.count / total * torch.outer(white_D, white_D)
            scatter_DD.diagonal().add_(qr.count)
            joined_DD, exists = solvers(scatter_DD).cholesky(scatter_DD)
            if exists:
                qr.factor_KD = joined_DD @ self.whitener_DD
                qr.mean_D = qr.mean_D - between_D * (count / total)
                qr.count = total
                return None
        qr.add(self.gram.root()[0] @ self.whitener_DD, self.count, self.gram.mean() @ self.whitener_DD)
        return self.empty()

    def _whitened(self, columns_DN: Tensor) -> Tensor:
        # w R = z as R^T w^T = z^T: the transposes are views, and the solve costs half a matrix product.
        return solvers(columns_DN).solve(self.whitener_DD.T, columns_DN, upper=False)

    def _coordinates(self) -> dict[str, pa.Array]:
        return {"whitener": triangle(self.whitener_DD)}


def cheapest(rows_ND: Float[Tensor, "N D"]) -> Plain | Lifted | None:
    """The route for rows like these, which are in it; None where only whitening would be certified."""
    place = rows_ND.shape[1], rows_ND.device
    plain = Plain(Gram(*place, float(rows_ND.norm()) ** 2 / len(rows_ND)))
    dead_DK = plain.gram.unresolved() if plain.take(rows_ND) else None
    if dead_DK is None:
        return None
    if dead_DK.shape[1] == 0:
        return plain
    along_NK = (rows_ND - plain.gram.mean()) @ dead_DK
    typical = float(plain.gram.scatter().diagonal().mean() / plain.count) ** 0.5
    size_K = along_NK.square().mean(0).sqrt() / typical
    if not bool((size_K > 0).all()):
        return None
    # In the end every direction is about as long as the typical one.
    lifted = Lifted(Gram(*place, rows_ND.shape[1] * typical**2), dead_DK, size_K)
    copied_ND = spaced_rows(rows_ND.shape, rows_ND.device).copy_(rows_ND)  # else they still want a route
    return lifted if lifted.take(copied_ND) and lifted.gram.certified() else None


def restored(state: pa.StructScalar, hidden_size: int, device: torch.device) -> Plain | Lifted | Whitened:
    """The route that `to_arrow` packed.

    Raises:
        StateError: it is not whole.
    """
    row = fields(state, GRAM_STATE)
    gram = Gram(hidden_size, device, row["typical_square"].as_py())
    gram.count = row["count"].as_py()
    gram.sum_D = tensor(row["sum"], hidden_size, device=device)
    gram.upper_DD = upper(row["upper"], hidden_size, hidden_size, device)
    gram.take_for_right()
    if row["whitener"].is_valid:
        return Whitened(gram, upper(row["whitener"], hidden_size, hidden_size, device))
    if row["dead_size"].is_valid:
        K = len(row["dead_size"].values)
        dead_DK = tensor(row["dead"], hidden_size, K, device=device)
        return Lifted(gram, dead_DK, tensor(row["dead_size"], K, device=device))
    return Plain(gram)


def _regularised(factor_DD: Tensor) -> Tensor:
    """R with its singular values kept above 1e-12 of its size, so that an exactly dead direction can be divided by."""
    size = factor_DD.norm() / math.sqrt(len(factor_DD))
    if float(size) == 0:  # rows that are all the same: nothing to whiten by
        return torch.eye(len(factor_DD), dtype=factor_DD.dtype, device=factor_DD.device)
    if float(factor_DD.diagonal().abs().min()) > 1e-12 * float(size):
        return factor_DD
    floor = 1e-12 * size * torch.eye(len(factor_DD), dtype=factor_DD.dtype, device=factor_DD.device)
    return solvers(factor_DD).triangle(torch.cat([factor_DD, floor]))
