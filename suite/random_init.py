"""The law of random initialisation: a final norm starts at scales of one and shifts of zero."""

import numpy as np

from suite.resolution import EffectiveNorm

_ROUNDING = 2.0**-8  # of bfloat16, about one


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
