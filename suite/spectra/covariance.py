"""Spectra of centred covariances from batches: nothing of size N x D is ever kept.

An accumulator takes rows, merges with another of its kind and is finished once; only `finish` divides or decomposes, so
one worker or eight give the same row. Shapes: N tokens, D hidden size, K rows of a factor.
"""

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from deadbench.suite.spectra.arrow_state import VECTOR, StateError, fields, struct, tensor, triangle, upper, vector
from deadbench.suite.spectra.directions import FLOAT64_EPS
from deadbench.suite.spectra.gram import STATE as GRAM_STATE
from deadbench.suite.spectra.gram import Gram
from deadbench.suite.spectra.spectrum import Spectrum
from deadbench.suite.spectra.triangular import CERTIFIED_RELATIVE_ERROR, GRAM_ERROR, decompose, smallest_singular_pair

_DEFERRED_ROWS = 2  # in D: the rows that decide the method, and the batch of a QR
_PART_ROWS = 1024  # in float64 at once: larger buffers are given back to the system and their pages cleared each time


class CovarianceFactor:
    """A triangular factor of the centred covariance, in float64, from streamed rows: exact at the bottom.

    State: n, the mean relative to a fixed offset, and R with `R^T R = sum (y - ybar)(y - ybar)^T`. Two parts merge by
    `qr([R1; R2; sqrt(n1 n2 / (n1 + n2)) (m1 - m2)^T])`. How rows get into R is chosen by need, on the first 2D of them:

    - gram: `G += z z^T`, at one GEMM of 2D^2 flop a row, where `32 eps kappa^2 <= 1e-7`: no eigenvalue can then be
      wrong by more than 1e-6 of itself.
    - lifted-gram: the same of rows stretched along the few directions in which they hardly extend (a LayerNorm's
      kernel), where that makes kappa as small. The stretch is undone on `chol(G)`: nothing is squared at the bottom.
    - whitened-gram: the first rows by QR into R, then `w = z R^-1`, `G += w w^T`, and `chol(G) R` joins R. Squaring
      whitened rows loses nothing at the bottom; two GEMMs a row. A batch with a row that R has not foreseen
      (`max |w|^2 > 1e4 D`) is taken by QR, and R renewed.
    - qr: everything by QR, `merge` included; what is too short to be decided.

    Memory: about 5 D^2 float64.
    """

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu"):
        """An empty accumulator of rows of width `hidden_size`; it computes on `device`."""
        self.hidden_size, self.device = hidden_size, torch.device(device)
        self.count = 0
        self.method = "qr"
        self.offset_D: Tensor | None = None
        self.mean_D = self._zeros(hidden_size)
        self.factor_KD = self._zeros(0, hidden_size)
        self._pending: list[Tensor] = []
        self._num_pending = 0
        self._gram: Gram | None = None
        self._off_centre = 0.0  # the largest of the unwhitened Gram matrices that R or another was made of

    def update(self, acts_ND: Float[Tensor, "N D"], mask_N: Bool[Tensor, " N"] | None = None) -> None:
        """Add rows of any float dtype; rows where `mask_N` is False (padding) are left out.

        Raises:
            ValueError: wrong width, or a value that is not finite.
        """
        if acts_ND.ndim != 2 or acts_ND.shape[1] != self.hidden_size:
            raise ValueError(f"activations of shape {tuple(acts_ND.shape)}; expected (N, {self.hidden_size})")
        rows = (acts_ND if mask_N is None else acts_ND[mask_N]).detach().to(self.device)
        if len(rows) == 0:
            return
        parts = rows.split(_PART_ROWS)
        # Norms are cheap, but may overflow where the row does not.
        fine = all(bool(torch.isfinite(torch.linalg.vector_norm(part, dim=-1)).all()) for part in parts)
        if not fine and (unfinite := int((~torch.isfinite(rows).all(-1)).sum())):
            raise ValueError(f"activations are not finite in {unfinite} of {len(rows)} rows")
        if self.offset_D is None:
            # Rounded to float32, so that taking it off float32 rows is exact.
            self.offset_D = parts[0].double().mean(0).float().double()
        for part in parts:
            self._take(part.double() - self.offset_D)

    def _take(self, rows: Tensor) -> None:
        """Add rows from which the offset has been taken."""
        if self.count == 0 and self._gram is None:
            room = self._batch_rows - self._num_pending
            self._hold(rows[:room])
            rows = rows[room:]
        if len(rows) and not self._enter_gram(rows):
            self._hold(rows)

    @property
    def num_rows(self) -> int:
        """Rows seen."""
        return self.count + self._num_pending + (self._gram.count if self._gram is not None else 0)

    def successor(self) -> "CovarianceFactor":
        """An empty accumulator for more rows of the same kind, which need not decide its method again."""
        self._absorb()
        self._renew_gram()
        after = CovarianceFactor(self.hidden_size, self.device)
        after.offset_D, after.method = self.offset_D, self.method
        after._gram = self._gram.empty_copy() if self._gram is not None else None
        return after

    def merge(self, other: "CovarianceFactor") -> None:
        """Add what `other` saw; associative and commutative up to rounding. `other` keeps its rows.

        The offsets need not be equal: each is within the spread of its own rows, their difference is exact, and what is
        shifted by it is as large as the distance of the means, which the merged covariance has anyway.
        """
        if other.num_rows == 0:
            return
        assert other.offset_D is not None
        theirs = other._sole_gram()
        if theirs is not None and self.offset_D is None and self.device == other.device:
            self.offset_D, self.method, self._gram = other.offset_D, other.method, theirs.empty_copy()
        mine = self._sole_gram()
        if self.offset_D is None:
            self.offset_D = other.offset_D.to(self.device)
        shift_D = other.offset_D.to(self.device) - self.offset_D
        self._off_centre = max(self._off_centre, other._squared_off_centre())
        if mine is not None and theirs is not None and self.device == other.device and mine.adds_to(theirs):
            mine.add_gram(theirs, shift_D if bool(shift_D.any()) else None)
            return
        undecided = self._gram is None and self.count == 0 and bool(self._pending)
        if other._gram is None and other.count == 0 and (undecided or mine is not None):
            for rows in other._pending:  # they go where they would have gone, had they come here
                self._take(rows.to(self.device) + shift_D)
            return
        self._settle()
        other._settle()
        shifted_mean_D = other.mean_D.to(self.device) + shift_D
        self.method = other.method if self.count == 0 else _weaker(self.method, other.method)
        self._combine(other.factor_KD.to(self.device), other.count, shifted_mean_D)

    def finish(self) -> Spectrum:
        """Decompose: the eigenvalues of the scatter over n, or the squared singular values of R over n.

        Raises:
            ValueError: no more rows than the hidden size, so that the rank is the sample's and not the model's.
        """
        gram = self._certified_gram()
        if gram is not None:
            covariance_DD = (gram.scatter() / gram.count).cpu()
            count, mean_D = gram.count, gram.sum_D / gram.count
            values_D, vectors_DD = torch.linalg.eigh(covariance_DD, UPLO="U")
            eigenvalues_D, rows_DD = values_D.flip(0), vectors_DD.flip(1).T
            squares_D = covariance_DD.diagonal()
        else:
            factor_DD = self._final_factor()
            count, mean_D = self.count, self.mean_D
            values_D, rows_DD = decompose(factor_DD)
            eigenvalues_D = values_D / count
            squares_D = factor_DD.square().sum(0) / count
        assert self.offset_D is not None
        mean_square_D = squares_D + (self.offset_D + mean_D).cpu().square()
        return Spectrum(
            eigenvalues_D.numpy(),
            rows_DD.contiguous().numpy(),
            mean_square_D.numpy(),
            count,
            self.method,
            *self._errors(float(eigenvalues_D[0])),
        )

    def eigenvalues(self) -> NDArray[np.float64]:
        """The eigenvalues alone, descending; a fraction of the time of `finish`."""
        gram = self._certified_gram()
        if gram is not None:
            covariance_DD = (gram.scatter() / gram.count).cpu()
            eigenvalues_D: NDArray[np.float64] = torch.linalg.eigvalsh(covariance_DD, UPLO="U").flip(0).numpy()
            return eigenvalues_D
        return (torch.linalg.svdvals(self._final_factor()).square() / self.count).numpy()  # type: ignore[no-any-return]

    def bottom(self) -> tuple[float, NDArray[np.float64]]:
        """(smallest eigenvalue, its unit eigenvector) alone; a fraction of the time of `eigenvalues`."""
        factor_DD = self._final_factor()
        smallest, bottom_D = smallest_singular_pair(factor_DD)
        return smallest**2 / self.count, bottom_D.numpy()

    def to_arrow(self) -> pa.RecordBatch:
        """The exact state as one Arrow row: what `from_arrow` makes of it goes on, and merges, as this one would."""
        gram = self._gram.to_arrow() if self._gram is not None else None
        columns = {
            "hidden_size": self.hidden_size,
            "count": self.count,
            "method": self.method,
            "offset": vector(self.offset_D),
            "mean": vector(self.mean_D),
            "factor_rows": len(self.factor_KD),
            "factor": triangle(self.factor_KD),
            "off_centre": self._squared_off_centre(),
            "pending": vector(torch.cat(self._pending) if self._pending else None),
            "gram": gram,
        }
        return struct(columns, STATE)

    @classmethod
    def from_arrow(
        cls, state: pa.RecordBatch | pa.StructScalar, device: torch.device | str = "cpu"
    ) -> "CovarianceFactor":
        """The accumulator that `to_arrow` packed.

        Raises:
            StateError: it is not whole.
        """
        row = fields(state, STATE)
        D = row["hidden_size"].as_py()
        self = cls(D, device)
        self.count, self.method = row["count"].as_py(), row["method"].as_py()
        if self.method not in _METHODS:
            raise StateError(f"method {self.method!r} is unknown")
        self.offset_D = tensor(row["offset"], D, device=self.device) if row["offset"].is_valid else None
        self.mean_D = tensor(row["mean"], D, device=self.device)
        self._off_centre = row["off_centre"].as_py()
        self.factor_KD = upper(row["factor"], row["factor_rows"].as_py(), D, self.device)
        if row["pending"].is_valid:
            self._num_pending = len(row["pending"].values) // D
            self._pending = [tensor(row["pending"], self._num_pending, D, device=self.device)]
        if row["gram"].is_valid:
            self._gram = Gram.from_arrow(row["gram"], D, self.device)
        return self

    def _squared_off_centre(self) -> float:
        """`|mean - offset|^2` where rows were squared, at its largest."""
        gram = self._gram if self._gram is not None and self._gram.whitener_DD is None else None
        return self._off_centre if gram is None else max(self._off_centre, gram.off_centre())

    def _sole_gram(self) -> Gram | None:
        """The unwhitened Gram matrix, lifted or not, if everything is in it."""
        alone = self._gram is not None and self._gram.whitener_DD is None and self.count == 0 and not self._pending
        return self._gram if alone else None

    def _certified_gram(self) -> Gram | None:
        """The Gram matrix of the rows themselves, where all are in it and it still resolves its smallest eigenvalue."""
        gram = self._sole_gram()
        enough = gram is not None and gram.is_plain and gram.count > self.hidden_size
        return gram if gram is not None and enough and gram.certified() else None

    def _final_factor(self) -> Tensor:
        self._settle()
        if self.count <= self.hidden_size:
            raise ValueError(
                f"{self.count} tokens for hidden size {self.hidden_size}: the covariance is rank-deficient by "
                f"construction; give at least {4 * self.hidden_size} tokens"
            )
        return self.factor_KD.cpu()  # GPU eigensolvers have failed on low-rank matrices (pytorch#105359)

    def _errors(self, largest: float) -> tuple[float, float]:
        """(resolution, floor): eigenvalues that are all rounding, and those up to which 1e-6 relative is not certified.

        An SVD of R moves every singular value by up to 4 eps sigma_1, and an eigenvalue by twice that relative to
        sigma; an unwhitened Gram matrix moves every eigenvalue by 32 eps l_1, or of what its rows are off centre.
        """
        if self.method == "gram":
            largest = max(largest, self._squared_off_centre())
            return largest * GRAM_ERROR, largest * GRAM_ERROR / CERTIFIED_RELATIVE_ERROR
        moved = 8 * FLOAT64_EPS
        return largest * moved**2, largest * (moved / CERTIFIED_RELATIVE_ERROR) ** 2

    @property
    def _batch_rows(self) -> int:
        return _DEFERRED_ROWS * self.hidden_size

    def _hold(self, rows_ND: Tensor) -> None:
        self._pending.append(rows_ND)
        self._num_pending += len(rows_ND)
        if self._num_pending >= self._batch_rows:
            self._absorb()

    def _enter_gram(self, rows_ND: Tensor) -> bool:
        self._renew_gram()
        return self._gram is not None and self._gram.add(rows_ND)

    def _renew_gram(self) -> None:
        """Whiten by what R is now, if R is of enough rows."""
        if self._gram is None and self.count >= self._batch_rows:
            self._gram = Gram(self.hidden_size, self.device, self.hidden_size, self.factor_KD / self.count**0.5)

    def _absorb(self) -> None:
        """Take the pending rows: the first time by the cheapest method that is certified, else by QR."""
        if not self._pending:
            return
        rows = torch.cat(self._pending) if len(self._pending) > 1 else self._pending[0]
        self._pending, self._num_pending = [], 0
        if self.count == 0 and self._gram is None and len(rows) >= self._batch_rows:
            gram = Gram.of(rows)
            if gram is not None:
                self._gram, self.method = gram, "gram" if gram.is_plain else "lifted-gram"
                return
        mean_D = rows.mean(0)
        self._flush()
        self._combine(rows - mean_D, len(rows), mean_D)
        if self.count >= self._batch_rows:
            self.method, self._gram = "whitened-gram", None

    def _settle(self) -> None:
        """Everything into R."""
        self._absorb()
        self._flush()

    def _flush(self) -> None:
        if self._gram is not None and self._gram.count:
            self._off_centre = self._squared_off_centre()
            joined = self._gram.factor_with(self.factor_KD, self.count, self.mean_D) if self.count else None
            count = self._gram.count
            if joined is not None:
                self.factor_KD, self.mean_D = joined
                self.count += count
                self._gram = None
                return
            factor_KD, mean_D, certified = self._gram.factor()
            if not certified:
                self.method = "gram"  # later rows made it ill conditioned, and its eigenvalues have that certificate
            self._gram = self._gram.empty_copy()
            self._combine(factor_KD, count, mean_D)

    def _combine(self, rows_KD: Tensor, count: int, mean_D: Tensor) -> None:
        total = self.count + count
        between_D = (self.count * count / total) ** 0.5 * (self.mean_D - mean_D)
        stacked = torch.cat([self.factor_KD, rows_KD, between_D[None]])
        self.factor_KD = torch.linalg.qr(stacked, mode="r").R
        self.mean_D = self.mean_D + (mean_D - self.mean_D) * (count / total)
        self.count = total

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)


STATE = pa.schema(
    {
        "hidden_size": pa.int64(),
        "count": pa.int64(),
        "method": pa.string(),
        "offset": VECTOR,
        "mean": VECTOR,
        "factor_rows": pa.int64(),
        "factor": VECTOR,
        "off_centre": pa.float64(),
        "pending": VECTOR,
        "gram": pa.struct(GRAM_STATE),
    }
)
_METHODS = ("qr", "whitened-gram", "lifted-gram", "gram")  # the later, the weaker its certificate


def _weaker(a: str, b: str) -> str:
    """The method whose certificate a merged factor carries."""
    return max(a, b, key=_METHODS.index)
