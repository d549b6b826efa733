"""What is known of a final norm once it is resolved: its place, behaviour and formula. No torch is needed to say it.

Shapes: N tokens, D hidden size.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from suite.renaming import Renaming

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NormBehaviour:
    """What `probe` found. `family` is layernorm, rmsnorm or other; the rest is None where family is other."""

    family: str
    scale: str | None = None
    scale_parameter: str | None = None
    shift_parameter: str | None = None
    eps: float | None = None
    evidence: tuple[str, ...] = field(default=())
    axes_after: int = 0  # axes of positions behind the channels: 2 of maps (B, D, H, W), 1 of sequences (B, D, T)

    @property
    def known(self) -> bool:
        """Whether it is one of the two families."""
        return self.family in ("layernorm", "rmsnorm")


@dataclass(frozen=True)
class EffectiveNorm:
    """`y = gamma * normalise(x) + beta` with effective scale `gamma` (1 + weight already added) and shift `beta`."""

    family: str
    scale_D: NDArray[np.float64]
    shift_D: NDArray[np.float64] | None
    eps: float

    def __call__(self, acts_ND: "Tensor") -> "Tensor":
        """The norm of rows (N, D) in float64 on CPU: `(x - mean)/sqrt(var + eps)` or `x/sqrt(mean(x^2) + eps)`."""
        import torch

        x = acts_ND.detach().cpu().double()
        if self.family == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        normalised = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        scaled = normalised * torch.from_numpy(self.scale_D)
        return scaled if self.shift_D is None else scaled + torch.from_numpy(self.shift_D)


class ArchitectureError(ValueError):
    """A configuration that transformers cannot build."""


class RemoteCodeError(ArchitectureError):
    """A configuration that needs code from the checkpoint, which is never run."""


@dataclass(frozen=True)
class FinalNorm:
    """The final norm of an architecture, or the reason why there is none (`path` None).

    `rows_per_item` is how many rows of its output one item of the minimal input gave: for images, what a picture gives.
    `renamings` are the rules by which transformers names what a checkpoint stores.
    """

    path: str | None
    behaviour: NormBehaviour
    placement: str | None
    hidden_size: int | None
    num_blocks: int | None
    rows_per_item: int = 0
    reason: str | None = None
    evidence: tuple[str, ...] = field(default=())
    renamings: tuple[Renaming, ...] = field(default=())

    @property
    def family(self) -> str:
        """layernorm, rmsnorm or other; none or undetermined where no norm was found."""
        return self.behaviour.family


def effective_norm(
    behaviour: NormBehaviour,
    weight_D: NDArray[np.float64] | None,
    shift_D: NDArray[np.float64] | None,
    hidden_size: int,
) -> EffectiveNorm:
    """The formula of a probed norm with stored parameters; `weight_D` as stored, None for an implicit scale of one."""
    if weight_D is None:
        scale_D = np.ones(hidden_size)
    else:
        scale_D = weight_D + 1.0 if behaviour.scale == "1+weight" else weight_D
    if behaviour.eps is None:
        raise ValueError(f"a norm of family {behaviour.family} has no formula")
    return EffectiveNorm(behaviour.family, scale_D, shift_D, behaviour.eps)
