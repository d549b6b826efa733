"""What is known of a norm once it is found: its place, its behaviour, its effective scale; and the law of random
initialisation, by which a final norm starts at scales of one and shifts of zero."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.architectures.stored_names import Naming

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_ROUNDING = 2.0**-8  # of bfloat16, about one


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
        return self.of(acts_ND.detach().cpu(), *self.parameters("cpu"))

    def parameters(self, device: "torch.device | str") -> "tuple[Tensor, Tensor | None]":
        """(scale, shift) in float64 on a device."""
        import torch

        shift_D = None if self.shift_D is None else torch.from_numpy(self.shift_D).to(device)
        return torch.from_numpy(self.scale_D).to(device), shift_D

    def of(self, acts_ND: "Tensor", scale_D: "Tensor", shift_D: "Tensor | None") -> "Tensor":
        """The norm of rows in float64 where they lie, its `parameters` being there."""
        x = acts_ND.detach().double()
        if self.family == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        normalised = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        scaled = normalised * scale_D
        return scaled if shift_D is None else scaled + shift_D


@dataclass(frozen=True)
class FinalNorm:
    """The final norm of an architecture, or the reason why there is none (`path` None).

    `rows_per_item` is how many rows of its output one item of the minimal input gave: for images, what a picture gives.
    `naming` is how transformers leads the names that a checkpoint stores to its own. Where there is none, `pooled` is
    that of what a head pools, one row an item, if its library counts it.
    """

    path: str | None
    behaviour: NormBehaviour
    placement: str | None
    hidden_size: int | None
    num_blocks: int | None
    rows_per_item: int = 0
    reason: str | None = None
    evidence: tuple[str, ...] = field(default=())
    naming: Naming = field(default_factory=Naming)
    pooled: "FinalNorm | None" = None

    def named(self, naming: Naming) -> "FinalNorm":
        """The same with the names that a checkpoint stores."""
        return replace(self, naming=naming, pooled=self.pooled and self.pooled.named(naming))

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


def departure(norm: EffectiveNorm, path: str) -> str | None:
    """How a randomly initialised norm departs from effective scales of one and shifts of zero; None if it does not.

    Versions of transformers have initialised the weight of a 1 + weight norm at one, which doubles its output
    (huggingface/transformers#40796); 5.19 does so to Nemotron's. Depths, which are ratios, are the same at any common
    scale; `lambda_v` and the spectrum are not.
    """
    from transformers import __version__

    scale_D, shift_D = norm.scale_D, np.zeros(1) if norm.shift_D is None else norm.shift_D
    if np.abs(scale_D - 1.0).max() <= _ROUNDING and np.abs(shift_D).max() <= _ROUNDING:
        return None
    smallest, largest, shift = scale_D.min(), scale_D.max(), np.abs(shift_D).max()
    return (
        f"transformers {__version__} initialises {path} at effective scales from {smallest:.3g} to {largest:.3g} and "
        f"shifts up to {shift:.3g}, not at ones and zeros"
    )
