"""How much of a measured variance is the sample's: a bootstrap over sequences, from sums alone.

Tokens of one sequence are correlated, so whole sequences are drawn again, not tokens (the block bootstrap; Efron,
Tibshirani 1993, 8.6). Of each sequence four sums are kept, nothing of size N x D. Shapes: N tokens, D hidden size, S
sequences, R resamples.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 1000
LEAST_SEQUENCES = 8  # fewer say nothing of their spread
_MOST_SEQUENCES = 4096  # more are pooled two by two: their spread is then known to one percent


class StandardErrors(NamedTuple):
    """Standard errors in decades; None where there are too few sequences, or nothing varies along v."""

    log_lambda_v: float | None
    depth: float | None


class SequenceSums:
    """Per sequence: tokens, sum and sum of squares of the deviation along v, sum of `|y - beta|^2`.

    The norm's shift beta stands for the mean in the total variance: E |y - beta|^2 - |ybar - beta|^2, whose second term
    is taken as known. State: the four sums of every sequence; parts are joined by appending.
    """

    def __init__(self, shift_D: Float[Tensor, " D"] | None, device: torch.device | str = "cpu"):
        """Of rows on `device`."""
        self._sums_S4 = np.zeros((0, 4))
        self._waiting: list[Tensor] = []  # on a device, which nobody waits for
        self._shift_D = None if shift_D is None else shift_D.float().to(device)

    @property
    def sums_S4(self) -> NDArray[np.float64]:  # noqa: N802 - S sequences
        """The sums of every sequence."""
        self._bring()
        return self._sums_S4

    @sums_S4.setter
    def sums_S4(self, sums_S4: NDArray[np.float64]) -> None:  # noqa: N802
        self._sums_S4, self._waiting = sums_S4, []

    def update(self, acts_ND: Float[Tensor, "N D"], deviation_N: Float[Tensor, " N"], lengths_S: Sequence[int]) -> None:
        """Add rows of whole sequences, of `lengths_S` rows each, with their deviations along v."""
        shifted_ND = acts_ND if self._shift_D is None else acts_ND - self._shift_D
        square_N = torch.linalg.vector_norm(shifted_ND, dim=-1).double().square()
        each_N4 = torch.stack([torch.ones_like(deviation_N), deviation_N, deviation_N.square(), square_N], dim=1)
        self._waiting.append(torch.stack([part.sum(0) for part in each_N4.split(list(lengths_S)) if len(part)]))
        if each_N4.device.type == "cpu":
            self._bring()

    def merge(self, other: "SequenceSums") -> None:
        """Add another worker's sequences."""
        self._bring()
        self._append(other.sums_S4)

    def finish(self, trace: float) -> StandardErrors:
        """Standard errors of log10 lambda_v and of the depth; `trace` is tr C of all tokens."""
        sums_S4 = self.sums_S4
        if len(sums_S4) < LEAST_SEQUENCES or trace <= 0:
            return StandardErrors(None, None)
        between = float(sums_S4[:, 3].sum() / sums_S4[:, 0].sum()) - trace  # |ybar - beta|^2
        drawn_RS = np.random.default_rng(0).multinomial(
            len(sums_S4), np.full(len(sums_S4), 1 / len(sums_S4)), RESAMPLES
        )
        count_R, total_R, squares_R, whole_R = (drawn_RS @ sums_S4).T
        lambda_R = squares_R / count_R - (total_R / count_R) ** 2
        trace_R = whole_R / count_R - between
        if not (lambda_R > 0).all() or not (trace_R > 0).all():
            return StandardErrors(None, None)
        log_lambda_R, log_trace_R = np.log10(lambda_R), np.log10(trace_R)
        return StandardErrors(_spread(log_lambda_R), _spread(log_trace_R - log_lambda_R))

    def _bring(self) -> None:
        """What waits on the device, in one copy; pooled batch by batch, as where nothing waits."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            for part_S4 in torch.cat(waiting).cpu().split([len(each) for each in waiting]):
                self._append(part_S4.numpy())

    def _append(self, sums_S4: NDArray[np.float64]) -> None:
        self._sums_S4 = np.concatenate([self._sums_S4, sums_S4.reshape(-1, 4)])
        while len(self._sums_S4) > 2 * _MOST_SEQUENCES:
            even = self._sums_S4[: len(self._sums_S4) // 2 * 2].reshape(-1, 2, 4).sum(1)
            self._sums_S4 = np.concatenate([even, self._sums_S4[len(even) * 2 :]])


def sequence_lengths(acts: Tensor, mask_BT: Tensor | None) -> list[int]:
    """Rows that `token_rows` gives of each sequence; packed rows without a batch count as one."""
    if mask_BT is not None and acts.ndim >= 3:
        return [int(n) for n in mask_BT.sum(1)]
    rows = acts.numel() // acts.shape[-1]
    return [rows // acts.shape[0]] * acts.shape[0] if acts.ndim >= 3 else [rows]


def _spread(values_R: NDArray[np.float64]) -> float | None:
    spread = float(values_R.std(ddof=1))
    return spread if math.isfinite(spread) else None
