"""The same architecture for smaller pictures, where the model of whole ones takes no others.

A tower of positions that are laid out for one size of picture refuses its corner. What its configuration says of that
size is divided instead; the modules and their order stay as they are.
"""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from deadbench.suite.architectures.build import build_model
from deadbench.suite.errors import ArchitectureError

_DIVISORS = (4, 2)  # of a picture's sides


def for_smaller_pictures(config: Any, whole: nn.Module) -> Any:
    """`config` for pictures a quarter as high and wide, or half; None where it states no size, or builds other modules.

    Args:
        config: transformers' configuration object; it stays as it is.
        whole: the model of `config`, on the meta device.
    """
    names = [name for name, _ in whole.named_parameters()]
    for divisor in _DIVISORS:
        smaller = copy.deepcopy(config)
        stated = [part for part in _parts(smaller) if _divided(vars(part).get("image_size"), divisor)]
        if not stated:
            return None
        for part in stated:
            part.image_size = _divided(part.image_size, divisor)
        try:
            built = build_model(smaller, "meta")
        except ArchitectureError:
            continue
        if [name for name, _ in built.named_parameters()] == names:
            return smaller
    return None


def _parts(config: Any) -> Iterator[Any]:
    """A configuration, and those that it holds."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _parts(value)


def _divided(size: Any, divisor: int) -> Any:
    """A side or several, each divided; None where that leaves none, or they are no whole numbers."""
    if isinstance(size, list | tuple):
        sides = [_divided(side, divisor) for side in size]
        return type(size)(sides) if sides and all(sides) else None
    return size // divisor if isinstance(size, int) and not isinstance(size, bool) and size >= divisor else None
