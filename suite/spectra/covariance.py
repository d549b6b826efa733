"""Spectra of centred covariances from batches: nothing of size N x D is ever kept.

An accumulator takes rows, merges with another of its kind and is finished once; only `finish` divides or decomposes, so
one worker or eight give the same row. Shapes: N tokens, D hidden size.
"""

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from deadbench.suite.spectra.arrow_state import VECTOR, fields, struct, tensor, vector
from deadbench.suite.spectra.float32_range import check_range
from deadbench.suite.spectra.qr import Qr
from deadbench.suite.spectra.questions import AT_ONCE, Questions
from deadbench.suite.spectra.routes import GRAM_STATE, Lifted, Plain, Whitened, cheapest, restored
from deadbench.suite.spectra.solvers import spaced_rows
from deadbench.suite.spectra.spectrum import Spectrum
from deadbench.suite.spectra.triangular import resolution_and_floor

COVARIANCE_STATE = pa.schema(
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
_DEFERRED_ROWS = 2  # in D: the rows that decide the route, and the batch of a QR
PART_ROWS = 1024  # in float64 at once: larger buffers are given back to the system and their pages cleared each time


class CovarianceFactor:
    """A triangular factor of the centred covariance, in float64, from streamed rows: exact at the bottom.

    State: a fixed offset near the mean; R of rows with the offset taken off; and the Gram matrix by which rows get into
    R in the end. Which one that is, is chosen by need, on the first 2D rows:

    - gram: rows are squared as they are, where `32 eps kappa^2 <= 1e-7`: no eigenvalue can then be wrong by more than
      1e-6 of itself.
    - lifted-gram: they are stretched along the few directions in which they hardly extend (a LayerNorm's kernel), where
      that makes kappa as small.
    - whitened-gram: the first rows go into R by QR, and those that follow are whitened by it. A batch that R has not
      foreseen is taken by QR, and R renewed.
    - qr: no Gram matrix; what is too short to be decided.

    Memory: about 5 D^2 float64.
    """

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu"):
        """An empty accumulator of rows of width `hidden_size`; it computes on `device`."""
        self.hidden_size, self.device = hidden_size, torch.device(device)
        self.offset_D: Tensor | None = None
        self._by_qr = Qr(hidden_size, self.device)
        self._by_gram: Plain | Lifted | Whitened | None = None  # until that is decided, and until R is whitened by
        self._offered = False  # rows to it, and its answer is not there yet

    @property
    def method(self) -> str:
        """Of the ways by which rows came, the one whose certificate the eigenvalues carry."""
        return self._by_qr.method

    @property
    def num_rows(self) -> int:
        """Rows seen."""
        return self._by_qr.count + self._by_qr.num_waiting + (self._by_gram.count if self._by_gram is not None else 0)

    def update(
        self,
        acts_ND: Float[Tensor, "N D"],
        mask_N: Bool[Tensor, " N"] | None = None,
        questions: Questions = AT_ONCE,
    ) -> None:
        """Add rows of any float dtype; rows where `mask_N` is False (padding) are left out.

        Where `questions` are not answered at once the rows must stay as they are until these are settled.

        Raises:
            ValueError: wrong width, or a value that is not finite, or none that float32 has.
        """
        if acts_ND.ndim != 2 or acts_ND.shape[1] != self.hidden_size:
            raise ValueError(f"activations of shape {tuple(acts_ND.shape)}; expected (N, {self.hidden_size})")
        rows = (acts_ND if mask_N is None else acts_ND[mask_N]).detach().to(self.device)
        if len(rows) == 0:
            return
        if questions.at_once:
            self._add(rows, PART_ROWS)
        elif self.offset_D is None or self._by_gram is None or self._offered:
            questions.after(lambda: self._add(rows, len(rows)))
        else:
            self._offer(rows, questions)

    def _offer(self, rows_ND: Tensor, questions: Questions) -> None:
        """Add rows, if nothing about them is odd, without waiting to hear of it; odd ones are looked at when it is."""
        gram = self._by_gram
        assert gram is not None
        assert self.offset_D is not None
        refused = gram.offer(rows_ND.double() - self.offset_D)
        self._offered = True

        def then(answer: list[float]) -> None:
            self._offered = False
            if answer[0]:
                self._add(rows_ND, PART_ROWS)  # so that fewer are refused
            else:
                gram.gram.count += len(rows_ND)

        questions.ask(refused[None], then)

    def _add(self, rows: Tensor, at_once: int) -> None:
        parts = rows.split(at_once)
        check_range(parts, rows)
        if self.offset_D is None:
            # Rounded to float32, so that taking it off float32 rows is exact.
            self.offset_D = parts[0].double().mean(0).float().double()
        for part in parts:
            self._take(spaced_rows(part.shape, self.device).copy_(part).sub_(self.offset_D))

    def successor(self) -> "CovarianceFactor":
        """An empty accumulator for more rows of the same kind, which need not decide its route again."""
        self._absorb()
        self._whiten()
        after = CovarianceFactor(self.hidden_size, self.device)
        after.offset_D, after._by_qr = self.offset_D, Qr(self.hidden_size, self.device, self.method)
        after._by_gram = self._by_gram.empty() if self._by_gram is not None else None
        return after

    def merge(self, other: "CovarianceFactor") -> None:
        """Add what `other` saw; associative and commutative up to rounding. `other` keeps its rows.

        The offsets need not be equal: each is within the spread of its own rows, their difference is exact, and what is
        shifted by it is as large as the distance of the means, which the merged covariance has anyway.
        """
        if other.num_rows == 0:
            return
        assert other.offset_D is not None
        theirs = other._sole_gram() if self.device == other.device else None
        if theirs is not None and self.offset_D is None:
            self.offset_D, self._by_gram = other.offset_D, theirs.empty()
            self._by_qr.method = other.method
        if self.offset_D is None:
            self.offset_D = other.offset_D.to(self.device)
        shift_D = other.offset_D.to(self.device) - self.offset_D
        self._by_qr.off_centre = max(self._by_qr.off_centre, other._off_centre())
        mine = self._sole_gram()
        if mine is not None and theirs is not None and mine.adds_to(theirs):
            mine.merge(theirs, shift_D if bool(shift_D.any()) else None)
        elif other._is_undecided() and (mine is not None or (self._is_undecided() and self._by_qr.num_waiting)):
            for rows in other._by_qr.waiting:  # they go where they would have gone, had they come here
                self._take(rows.to(self.device) + shift_D)
        else:
            self._settle()
            other._settle()
            self._by_qr.merge(other._by_qr, shift_D)

    def finish(self) -> Spectrum:
        """Decompose: the eigenvalues of the scatter over n, or the squared singular values of R over n.

        Raises:
            ValueError: no more rows than the hidden size, so that the rank is the sample's and not the model's.
        """
        route = self._certified_gram() or self._settled()
        assert self.offset_D is not None
        eigenvalues_D, eigenvectors_DD, mean_square_D = route.decompose(self.offset_D)
        return Spectrum(
            eigenvalues_D.cpu().numpy(),
            eigenvectors_DD.contiguous().cpu().numpy(),
            mean_square_D.cpu().numpy(),
            route.count,
            self.method,
            *resolution_and_floor(float(eigenvalues_D[0]), self._off_centre() if self.method == Plain.method else None),
        )

    def eigenvalues(self) -> NDArray[np.float64]:
        """The eigenvalues alone, descending; a fraction of the time of `finish`."""
        eigenvalues_D: NDArray[np.float64] = (self._certified_gram() or self._settled()).eigenvalues().numpy()
        return eigenvalues_D

    def bottom(self) -> tuple[float, NDArray[np.float64]]:
        """(smallest eigenvalue, its unit eigenvector) alone; a fraction of the time of `eigenvalues`."""
        smallest, bottom_D = self._settled().bottom()
        return smallest, bottom_D.cpu().numpy()

    def to_arrow(self) -> pa.RecordBatch:
        """The exact state as one Arrow row: what `from_arrow` makes of it goes on, and merges, as this one would."""
        columns = {
            "hidden_size": self.hidden_size,
            "offset": vector(self.offset_D),
            "off_centre": self._by_qr.off_centre,  # the Gram matrix knows its own, at the end of all rows
            "gram": self._by_gram.to_arrow() if self._by_gram is not None else None,
        }
        return struct(columns | self._by_qr.columns(), COVARIANCE_STATE)

    @classmethod
    def from_arrow(
        cls, state: pa.RecordBatch | pa.StructScalar, device: torch.device | str = "cpu"
    ) -> "CovarianceFactor":
        """The accumulator that `to_arrow` packed.

        Raises:
            StateError: it is not whole.
        """
        row = fields(state, COVARIANCE_STATE)
        D = row["hidden_size"].as_py()
        self = cls(D, device)
        self._by_qr = Qr.from_columns(row, D, self.device)
        self._by_qr.off_centre = row["off_centre"].as_py()
        self.offset_D = tensor(row["offset"], D, device=self.device) if row["offset"].is_valid else None
        self._by_gram = restored(row["gram"], D, self.device) if row["gram"].is_valid else None
        return self

    def _take(self, rows_ND: Tensor) -> None:
        """Add rows from which the offset has been taken."""
        if self._is_undecided():
            room = self._batch_rows - self._by_qr.num_waiting
            self._hold(rows_ND[:room])
            rows_ND = rows_ND[room:]
        if len(rows_ND):
            self._whiten()
            if self._by_gram is None or not self._by_gram.take(rows_ND):
                self._hold(rows_ND)

    def _hold(self, rows_ND: Tensor) -> None:
        self._by_qr.hold(rows_ND)
        if self._by_qr.num_waiting >= self._batch_rows:
            self._absorb()

    def _absorb(self) -> None:
        """Take the rows that wait: the first time by the cheapest route that is certified, else by QR."""
        if not self._by_qr.num_waiting:
            return
        undecided, rows_ND = self._is_undecided(), self._by_qr.release()
        if undecided and len(rows_ND) >= self._batch_rows and (route := cheapest(rows_ND)) is not None:
            self._by_gram, self._by_qr.method = route, route.method
            return
        mean_D = rows_ND.mean(0)
        self._join()
        self._by_qr.add(rows_ND - mean_D, len(rows_ND), mean_D)
        if self._by_qr.count >= self._batch_rows:
            self._by_gram, self._by_qr.method = None, Whitened.method

    def _join(self) -> None:
        """What is in the Gram matrix into R."""
        if self._by_gram is not None and self._by_gram.count:
            self._by_gram = self._by_gram.join(self._by_qr)

    def _settle(self) -> None:
        """Everything into R."""
        self._absorb()
        self._join()

    def _whiten(self) -> None:
        """Whiten by what R is now, if it is of enough rows and no Gram matrix is in use."""
        if self._by_gram is None and self._by_qr.count >= self._batch_rows:
            self._by_gram = Whitened.by(self._by_qr)

    @property
    def _batch_rows(self) -> int:
        return _DEFERRED_ROWS * self.hidden_size

    def _is_undecided(self) -> bool:
        """Whether all rows seen so far still wait."""
        return self._by_gram is None and self._by_qr.count == 0

    def _sole_gram(self) -> Plain | Lifted | None:
        """The Gram matrix that is not whitened, if everything is in it."""
        if isinstance(self._by_gram, Plain | Lifted) and self._by_qr.count == 0 and not self._by_qr.num_waiting:
            return self._by_gram
        return None

    def _certified_gram(self) -> Plain | None:
        """The Gram matrix of the rows themselves, where all are in it and it still resolves its smallest eigenvalue."""
        route = self._sole_gram()
        if isinstance(route, Plain) and route.count > self.hidden_size and route.gram.certified():
            return route
        return None

    def _settled(self) -> Qr:
        self._settle()
        if self._by_qr.count <= self.hidden_size:
            raise ValueError(
                f"{self._by_qr.count} tokens for hidden size {self.hidden_size}: the covariance is rank-deficient by "
                f"construction; give at least {4 * self.hidden_size} tokens"
            )
        return self._by_qr

    def _off_centre(self) -> float:
        """`|mean - offset|^2` where rows were squared, at its largest."""
        return (
            self._by_qr.off_centre if self._by_gram is None else max(self._by_qr.off_centre, self._by_gram.off_centre())
        )
