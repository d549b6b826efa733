"""Whether a dead direction is algebraic, learned or rounding: by its slope over precisions."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deadbench.suite.spectra.covariance import CovarianceFactor
from deadbench.suite.spectra.directions import FLOAT64_EPS, UNIT_ROUNDOFF
from deadbench.suite.spectra.questions import AT_ONCE, Questions
from deadbench.suite.spectra.spectrum import Spectrum

KERNEL_SLOPE = 0.5  # algebraic kernels give 1.00 to 1.18, learned dead directions 0.00 to 0.08
VERDICT_THRESHOLD = 1e-6  # of the mean eigenvalue: bottom directions below get a verdict
_VERDICT_TOKENS = 2  # in D: enough rank, and no more rows than are taken in one QR


class EarlyVerdict:
    """Which bottom directions are algebraic: from the spectrum of the read's first tokens, replayed in float64.

    A kernel's eigenvalue falls with the square of the roundoff, a learned dead direction's does not. The spectra in the
    two precisions are matched from the bottom up.
    """

    def __init__(self, hidden_size: int, first_row: int, device: torch.device | str = "cpu"):
        self._wanted = _VERDICT_TOKENS * hidden_size - first_row
        self.float64 = CovarianceFactor(hidden_size, device)

    def update(self, replay_ND: Tensor, exact_ND: Tensor, questions: Questions = AT_ONCE) -> None:
        """Add rows of the norm's output in float32 and float64, until there are enough.

        Raises:
            ValueError: they are not the same function.
        """
        left = self._wanted - self.float64.num_rows
        if left > 0:
            _check_formula(replay_ND[:left], exact_ND[:left], questions)
            self.float64.update(exact_ND[:left], questions=questions)

    def verdicts(self, spectrum: Spectrum, zeros_M: NDArray[np.int64]) -> list[str]:
        """The verdict of every direction of `spectrum` below `VERDICT_THRESHOLD` of the mean, from the smallest up."""
        found = []
        num_dead = spectrum.num_dead(VERDICT_THRESHOLD)
        if num_dead:
            double_D = np.array([self.float64.bottom()[0]]) if num_dead == 1 else self.float64.eigenvalues()
            # The smallest eigenvalue that the float64 spectrum can tell from zero: a few roundings of the largest.
            resolved = float((4 * FLOAT64_EPS) ** 2 * spectrum.eigenvalues_D[0])
            for place in range(1, num_dead + 1):
                on_zero_scales = float(np.sum(spectrum.eigenvectors_DD[-place][zeros_M] ** 2))
                single = float(spectrum.eigenvalues_D[-place])
                found.append(_verdict(single, float(double_D[-place]), resolved, on_zero_scales))
        return found


def _verdict(float32: float, float64: float, resolved: float, on_zero_scales: float) -> str:
    """algebraic, learned or rounding, for one dead direction with its eigenvalue in both precisions."""
    if on_zero_scales > 0.5:
        return "learned"  # the parameters say so: the eigenvalue is the scale's own square
    if float32 <= resolved:
        return "rounding"
    slope = precision_slope(float32, max(float64, resolved))
    assert slope is not None
    return "algebraic" if slope > KERNEL_SLOPE else "learned" if slope < KERNEL_SLOPE / 2 else "rounding"


def precision_slope(lambda_float32: float, lambda_float64: float) -> float | None:
    """`log(lambda_a / lambda_b) / log(u_a^2 / u_b^2)`: 1 where rounding alone makes the value, 0 where it is real.

    None where either is exactly zero: nothing is left to compare.
    """
    if lambda_float32 <= 0 or lambda_float64 <= 0:
        return None
    unit_ratio = (UNIT_ROUNDOFF["float32"] / UNIT_ROUNDOFF["float64"]) ** 2
    return math.log(lambda_float32 / lambda_float64) / math.log(unit_ratio)


def _check_formula(replay_ND: Tensor, exact_ND: Tensor, questions: Questions) -> None:
    def judge(numbers: list[float]) -> None:
        worst, scale = numbers
        if worst > 1e-3 * scale:
            raise ValueError(
                f"the float32 replay of the final norm differs from its formula by {worst:.1e} (values to {scale:.1e})"
            )

    questions.ask(torch.stack([(replay_ND.double() - exact_ND).abs().max(), exact_ND.abs().max()]), judge)
