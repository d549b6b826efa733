"""Gram matrices that lose nothing at the bottom: of rows in coordinates where all directions are of like size.

Squaring halves the digits: an eigenvalue of `sum z z^T` is only known to 32 eps of the largest. Rows whitened by the R
of earlier rows, or lifted along the few directions in which they hardly extend, have a Gram matrix where that costs
nothing. Shapes: N tokens, D hidden size, K dead directions.
"""

import math
from dataclasses import dataclass

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from deadbench.suite.spectra.arrow_state import VECTOR, fields, struct, tensor, triangle, upper, vector
from deadbench.suite.spectra.triangular import (
    CERTIFIED_RELATIVE_ERROR,
    GRAM_ERROR,
    directions_below,
    smallest_singular_pair,
)

_PANELS, _NARROWEST_PANEL = 8, 192
_GATE = 1e4  # a row whose square is this many times the typical one would lose the bottom: it is taken by QR
_FEW = 8  # dead directions that are lifted one by one; where there are more, rows are whitened
_LANCZOS_STEPS = 24
STATE = pa.schema(
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


@dataclass(frozen=True, eq=False)
class Lift:
    """`w = z + (1/s - 1) (z . b) b` along each of K orthonormal directions b in which rows extend s times as far."""

    dead_DK: Float[Tensor, "D K"]
    size_K: Float[Tensor, " K"]

    def apply(self, rows_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Rows z as w: 4 D K flop a row, where whitening takes D^2."""
        return torch.addmm(rows_ND, rows_ND @ self.dead_DK * (1 / self.size_K - 1), self.dead_DK.T)

    def undo(self, rows_KD: Float[Tensor, "K D"]) -> Float[Tensor, "K D"]:
        """Rows w as z."""
        return torch.addmm(rows_KD, rows_KD @ self.dead_DK * (self.size_K - 1), self.dead_DK.T)


class Gram:
    """`G = sum w w^T` of rows `w = z R^-1`, of lifted z, or of `z` itself, with what it takes to centre and to undo."""

    def __init__(
        self,
        hidden_size: int,
        device: torch.device,
        typical_square: float,
        whitener_DD: Float[Tensor, "D D"] | None = None,
        lift: Lift | None = None,
    ):
        """`typical_square` is the mean |w|^2 expected; `whitener_DD` is R of unit-variance rows."""
        self.count, self.typical_square = 0, typical_square
        self.whitener_DD = None if whitener_DD is None else _regularised(whitener_DD)
        self.lift = lift
        self.sum_D = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self._upper_DD = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, rows_ND: Float[Tensor, "N D"]) -> "Gram | None":
        """The Gram matrix of first rows, and for more of their kind; None where only whitening would be certified."""
        place = rows_ND.shape[1], rows_ND.device
        plain = cls(*place, float(rows_ND.square().sum()) / len(rows_ND))
        dead_DK = plain._unresolved() if plain.add(rows_ND) else None
        if dead_DK is None:
            return None
        if dead_DK.shape[1] == 0:
            return plain
        along_NK = (rows_ND - plain.sum_D / plain.count) @ dead_DK
        typical = float(plain.scatter().diagonal().mean() / plain.count) ** 0.5
        lift = Lift(dead_DK, along_NK.square().mean(0).sqrt() / typical)
        if not bool((lift.size_K > 0).all()):
            return None
        # In the end every direction is about as long as the typical one.
        lifted = cls(*place, rows_ND.shape[1] * typical**2, lift=lift)
        return lifted if lifted.add(rows_ND) and lifted.certified() else None

    @property
    def is_plain(self) -> bool:
        """Whether it is of the rows themselves."""
        return self.whitener_DD is None and self.lift is None

    def empty_copy(self) -> "Gram":
        """The same coordinates, no rows."""
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
        elif self.lift is not None:
            white_ND = self.lift.apply(rows_ND)
        if float(torch.linalg.vector_norm(white_ND, dim=-1).max()) ** 2 > _GATE * self.typical_square:
            return False
        _add_gram(self._upper_DD, white_ND)
        self.sum_D += white_ND.sum(0)
        self.count += len(rows_ND)
        return True

    def adds_to(self, other: "Gram") -> bool:
        """Whether both are in the same coordinates, and those need no factor to be moved in."""
        if self.lift is None or other.lift is None:
            return self.is_plain and other.is_plain
        same = self.lift.dead_DK.shape == other.lift.dead_DK.shape
        return (
            same
            and torch.equal(self.lift.dead_DK, other.lift.dead_DK)
            and torch.equal(self.lift.size_K, other.lift.size_K)
        )

    def add_gram(self, other: "Gram", shift_D: Float[Tensor, " D"] | None = None) -> None:
        """Add the rows of another Gram matrix in the same coordinates, each with `shift_D` added to it.

        The rows need not be there for that: `sum (w + d)(w + d)^T = G + s d^T + d s^T + n d d^T`.
        """
        self._upper_DD += other._upper_DD
        self.sum_D += other.sum_D
        self.count += other.count
        if shift_D is not None:
            if self.lift is not None:
                shift_D = self.lift.apply(shift_D[None])[0]
            self._upper_DD.addr_(other.sum_D + other.count * shift_D, shift_D).addr_(shift_D, other.sum_D)
            self.sum_D += other.count * shift_D

    def to_arrow(self) -> pa.RecordBatch:
        """The exact state, as one row of `STATE`."""
        columns = {
            "count": self.count,
            "typical_square": self.typical_square,
            "sum": vector(self.sum_D),
            "upper": triangle(self._upper_DD),
            "whitener": triangle(self.whitener_DD),
            "dead": vector(self.lift.dead_DK if self.lift is not None else None),
            "dead_size": vector(self.lift.size_K if self.lift is not None else None),
        }
        return struct(columns, STATE)

    @classmethod
    def from_arrow(cls, state: pa.StructScalar, hidden_size: int, device: torch.device) -> "Gram":
        """What `to_arrow` packed."""
        row = fields(state, STATE)
        D = hidden_size
        self = cls(D, device, row["typical_square"].as_py())
        self.count = row["count"].as_py()
        self.sum_D = tensor(row["sum"], D, device=device)
        self._upper_DD = upper(row["upper"], D, D, device)
        if row["whitener"].is_valid:
            self.whitener_DD = upper(row["whitener"], D, D, device)
        if row["dead_size"].is_valid:
            K = len(row["dead_size"].values)
            self.lift = Lift(tensor(row["dead"], D, K, device=device), tensor(row["dead_size"], K, device=device))
        return self

    def scatter(self) -> Float[Tensor, "D D"]:
        """`sum (w - mean w)(w - mean w)^T`: its upper triangle; what is below the diagonal means nothing."""
        return self._upper_DD.addr(self.sum_D, self.sum_D, alpha=-1 / self.count)

    def off_centre(self) -> float:
        """`|mean w|^2`: what is squared is as far from its mean as that, and its rounding is of that size too."""
        return float((self.sum_D / max(self.count, 1)).square().sum())

    def certified(self) -> bool:
        """Whether the Gram matrix resolves its smallest eigenvalue to 1e-7: `32 eps kappa^2 <= 1e-7`.

        Where the rows are further from their mean's place than from each other, that distance is what kappa is of. Of
        lifted rows it holds for every eigenvalue of z's scatter as well: under a congruence relative errors stay below
        `|E| / l_min(G)` (Ostrowski).
        """
        factor_DD, failed = torch.linalg.cholesky_ex(self.scatter(), upper=True)
        return not int(failed) and self._certifies(factor_DD)

    def factor_with(
        self, factor_DD: Float[Tensor, "D D"], count: int, mean_D: Float[Tensor, " D"]
    ) -> tuple[Float[Tensor, "D D"], Float[Tensor, " D"]] | None:
        """(R, mean) of these rows and of the `count` rows that R0, `factor_DD`, is of, when they are whitened by it.

        Whitened, R0 is `sqrt(count)` times the identity, and all is added where nothing can be lost. None where R0 had
        to be regularised.
        """
        if self.whitener_DD is None or not torch.equal(factor_DD / count**0.5, self.whitener_DD):
            return None
        total = self.count + count
        between_D = mean_D - self.sum_D / self.count @ self.whitener_DD
        white_D = torch.linalg.solve_triangular(self.whitener_DD.T, between_D[:, None], upper=False)[:, 0]
        scatter_DD = self.scatter() + self.count * count / total * torch.outer(white_D, white_D)
        scatter_DD.diagonal().add_(count)
        joined_DD, failed = torch.linalg.cholesky_ex(scatter_DD, upper=True)
        return None if int(failed) else (joined_DD @ self.whitener_DD, mean_D - between_D * (self.count / total))

    def factor(self) -> tuple[Float[Tensor, "D D"], Float[Tensor, " D"], bool]:
        """(R, mean, certified) of the rows: `R^T R` is their centred scatter.

        Lifted rows are certified by what G is now; whitened ones were by the gate, and of plain ones G is no better.
        """
        mean_D = self.sum_D / self.count
        scatter_DD = self.scatter()
        factor_DD, failed = torch.linalg.cholesky_ex(scatter_DD, upper=True)
        certified = self.lift is None or (not int(failed) and self._certifies(factor_DD))
        if int(failed):  # rank-deficient rows: the square root by eigenvectors is defined all the same
            values_D, vectors_DD = torch.linalg.eigh(scatter_DD, UPLO="U")
            factor_DD = values_D.clamp(min=0).sqrt()[:, None] * vectors_DD.T
        if self.whitener_DD is not None:
            factor_DD, mean_D = factor_DD @ self.whitener_DD, mean_D @ self.whitener_DD
        elif self.lift is not None:
            factor_DD, mean_D = self.lift.undo(factor_DD), self.lift.undo(mean_D[None])[0]
        return factor_DD, mean_D, certified

    def _certifies(self, factor_DD: Float[Tensor, "D D"]) -> bool:
        """`certified`, given `chol(G)`."""
        smallest, _ = smallest_singular_pair(factor_DD, steps=20, tolerance=1e-2)
        largest = (torch.linalg.matrix_norm(factor_DD, 1) * torch.linalg.matrix_norm(factor_DD, torch.inf)) ** 0.5
        condition = min(float(largest), float(factor_DD.norm())) / smallest  # from above, but for a percent
        squared = max(condition**2, self.count * self.off_centre() / smallest**2)
        return GRAM_ERROR * squared <= 0.1 * CERTIFIED_RELATIVE_ERROR

    def _unresolved(self) -> Float[Tensor, "D K"] | None:
        """The few directions, K >= 0, that this Gram matrix does not resolve to 1e-7; None where they are many."""
        scatter_DD = self.scatter().triu_()
        norm = float(2 * scatter_DD.square().sum() - scatter_DD.diagonal().square().sum()) ** 0.5
        largest = max(norm, self.count * self.off_centre())  # from above
        scatter_DD.diagonal().add_(GRAM_ERROR * largest)  # below its own rounding it need not be positive
        factor_DD, failed = torch.linalg.cholesky_ex(scatter_DD, upper=True)
        if int(failed):
            return None
        resolved = (GRAM_ERROR * largest / (0.1 * CERTIFIED_RELATIVE_ERROR)) ** 0.5
        dead_DK = directions_below(factor_DD, resolved, _LANCZOS_STEPS)
        return dead_DK if dead_DK.shape[1] <= _FEW else None


def _add_gram(upper_DD: Tensor, rows_ND: Tensor) -> None:
    """Add the upper block triangle of `rows^T rows`: in 8 panels 9/16 of the flops of the whole product.

    numpy would call SYRK, half the flops; but its threads and torch's then wait for each other in the forward pass.
    """
    D = rows_ND.shape[1]
    step = max(_NARROWEST_PANEL, -(-D // _PANELS))
    for start in range(0, D, step):
        stop = min(start + step, D)
        upper_DD[start:stop, start:].addmm_(rows_ND[:, start:stop].T, rows_ND[:, start:])


def _regularised(factor_DD: Tensor) -> Tensor:
    """R with its singular values kept above 1e-12 of its size, so that an exactly dead direction can be divided by."""
    size = factor_DD.norm() / math.sqrt(len(factor_DD))
    if float(size) == 0:  # rows that are all the same: nothing to whiten by
        return torch.eye(len(factor_DD), dtype=factor_DD.dtype, device=factor_DD.device)
    if float(factor_DD.diagonal().abs().min()) > 1e-12 * float(size):
        return factor_DD
    floor = 1e-12 * size * torch.eye(len(factor_DD), dtype=factor_DD.dtype, device=factor_DD.device)
    regularised: Tensor = torch.linalg.qr(torch.cat([factor_DD, floor]), mode="r").R
    return regularised
