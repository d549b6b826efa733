"""One place in the residual stream: what is kept of the rows that pass it, mergeable and serialisable.

Shapes: N tokens, D hidden size.
"""

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from deadbench.suite.spectra.arrow_state import VECTOR, fields, struct, tensor, vector
from deadbench.suite.spectra.covariance import COVARIANCE_STATE, PART_ROWS, CovarianceFactor
from deadbench.suite.spectra.questions import AT_ONCE, Questions
from deadbench.suite.spectra.spectrum import Spectrum

TAP_STATE = pa.schema(
    {
        "half_tokens": pa.int64(),
        "seen": pa.int64(),
        "first": pa.struct(COVARIANCE_STATE),
        "second": pa.struct(COVARIANCE_STATE),
        "marks": VECTOR,
    }
)


class Tap:
    """One place in the stream: the rows of the first and of the second half of the tokens, apart."""

    def __init__(self, hidden_size: int, half_tokens: int, device: torch.device | str = "cpu"):
        """`half_tokens`: how many rows make the first half."""
        self._half_tokens, self._seen = half_tokens, 0
        self.first = CovarianceFactor(hidden_size, device)
        self.second: CovarianceFactor | None = None
        self._marks: list[Tensor] = []  # a random projection of each row: equal rows are equal inputs
        generator = torch.Generator().manual_seed(0)
        self._probe_D = torch.randn(hidden_size, generator=generator, dtype=torch.float64).to(device)

    def update(self, acts_ND: Float[Tensor, "N D"], questions: Questions = AT_ONCE) -> None:
        """Add rows, in the order of the tokens; they must stay as they are until `questions` are settled."""
        at_once = PART_ROWS if self.first.device.type == "cpu" else max(1, len(acts_ND))
        self._marks += [part.to(self.first.device, torch.float64) @ self._probe_D for part in acts_ND.split(at_once)]
        head = max(0, min(len(acts_ND), self._half_tokens - self._seen))
        self._seen += len(acts_ND)
        if head:
            self.first.update(acts_ND[:head], questions=questions)
        if head < len(acts_ND):
            if self.second is not None:
                self.second.update(acts_ND[head:], questions=questions)
            else:
                questions.after(lambda: self._begin_second(acts_ND[head:], questions))

    def _begin_second(self, rows_ND: Tensor, questions: Questions) -> None:
        if self.second is None:
            self.second = self.first.successor()
        self.second.update(rows_ND, questions=questions)

    def merge(self, other: "Tap") -> None:
        """Add another worker's rows of the same tap: its first half to the first, its second to the second."""
        self._seen += other._seen
        self._marks += other._marks
        self.first.merge(other.first)
        if other.second is not None:
            if self.second is None:
                self.second = other.second
            else:
                self.second.merge(other.second)

    def to_arrow(self) -> pa.RecordBatch:
        """The exact state as one Arrow row."""
        columns = {
            "half_tokens": self._half_tokens,
            "seen": self._seen,
            "first": self.first.to_arrow(),
            "second": None if self.second is None else self.second.to_arrow(),
            "marks": vector(torch.cat(self._marks) if self._marks else None),
        }
        return struct(columns, TAP_STATE)

    @classmethod
    def from_arrow(cls, state: pa.RecordBatch | pa.StructScalar, device: torch.device | str = "cpu") -> "Tap":
        """The tap that `to_arrow` packed.

        Raises:
            StateError: it is not whole.
        """
        row = fields(state, TAP_STATE)
        first = CovarianceFactor.from_arrow(row["first"], device)
        self = cls(first.hidden_size, row["half_tokens"].as_py(), device)
        self.first, self._seen = first, row["seen"].as_py()
        if row["second"].is_valid:
            self.second = CovarianceFactor.from_arrow(row["second"], device)
        if row["marks"].is_valid:
            self._marks = [tensor(row["marks"], self._seen, device=first.device)]
        return self

    def num_distinct(self) -> int:
        """Distinct rows seen."""
        return len(torch.cat(self._marks).unique())

    def halves(self) -> tuple[float, float]:
        """Smallest singular value of each half; nan where a half is too short."""
        values = []
        for half in (self.first, self.second):
            enough = half is not None and half.num_rows > half.hidden_size
            values.append(float(np.sqrt(half.bottom()[0])) if half is not None and enough else np.nan)
        return values[0], values[1]

    def finish(self) -> Spectrum:
        """The spectrum of all rows."""
        whole = CovarianceFactor(self.first.hidden_size, self.first.device)
        whole.merge(self.first)
        if self.second is not None:
            whole.merge(self.second)
        return whole.finish()
