"""What is compared of one place in the residual stream.

Shapes: D hidden size, k dead directions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TapSpectrum:
    """What is compared of one tap: small, and it travels between ranks."""

    eigenvalues_D: NDArray[np.float64]
    bottom_D: NDArray[np.float64]
    floor: float
    dead_kD: NDArray[np.float64]
    rank_limited: bool
    massive: list[int]

    @property
    def sigma_min(self) -> float:
        """The smallest singular value."""
        return float(np.sqrt(self.eigenvalues_D[-1]))

    def plain(self) -> dict[str, Any]:
        """As JSON holds it, to the last digit."""
        return {
            "eigenvalues": self.eigenvalues_D.tolist(),
            "bottom": self.bottom_D.tolist(),
            "floor": self.floor,
            "dead": self.dead_kD.tolist(),
            "rank_limited": self.rank_limited,
            "massive": self.massive,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "TapSpectrum":
        """What `plain` gave."""
        eigenvalues_D, dead_kD = np.array(plain["eigenvalues"]), np.array(plain["dead"])
        dead_kD = dead_kD.reshape(-1, len(eigenvalues_D))
        rest = plain["rank_limited"], plain["massive"]
        return cls(eigenvalues_D, np.array(plain["bottom"]), plain["floor"], dead_kD, *rest)

    def fell_from(self, before: "TapSpectrum") -> bool:
        """Whether the bottom is lower than it was, neither being dead: the halves must then say by how much."""
        comparable = not (before.rank_limited or len(self.dead_kD) or len(before.dead_kD))
        return comparable and self.sigma_min < before.sigma_min
