"""Values for a large model of which only the flow is looked at: a matrix's counterparts in other blocks share its own.

A model of half a billion parameters is 2 GB in float32, most of it in blocks that are alike. transformers draws each
value as it would for a checkpoint that lacks it, so laws and constants are the architecture's own.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.suite.architectures.build import build_model

_SHARED = 2**16  # numbers of a tensor, from which on it has its values from a counterpart
_UNSET = -(2**31) + 7  # of whole numbers, which have no NaN


def built_shared(config: Any) -> nn.Module | None:
    """As `build_model`, with counterparts that share values; None where some values would be left undrawn."""
    model: Any = build_model(config, "meta")
    first: dict[tuple[Any, ...], Tensor] = {}
    given: dict[int, Tensor] = {}  # by the tensor on the meta device: those that modules share stay shared
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in given:
                given[id(parameter)] = _values(parameter, _place(path, name), first)
            module._parameters[name] = given[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = given.setdefault(id(buffer), _unset(buffer))
    try:
        model.initialize_weights()
    except Exception:  # whatever a library's code does with what it has not built itself
        return None
    drawn: nn.Module = model
    return drawn if all(_is_set(tensor) for tensor in given.values()) else None


def _place(path: str, name: str) -> str:
    """A parameter's path without the numbers of blocks and experts, in which counterparts are the same."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", f".{path}.{name}")


def _values(parameter: nn.Parameter, place: str, first: dict[tuple[Any, ...], Tensor]) -> nn.Parameter:
    """A parameter whose values are to be drawn, or are those of the first one of its place and shape."""
    kind = (place, parameter.shape, parameter.dtype)
    if parameter.numel() < _SHARED or kind not in first:
        own = nn.Parameter(_unset(parameter), requires_grad=False)
        if parameter.numel() >= _SHARED:
            first[kind] = own
        return own
    shared = nn.Parameter(first[kind].detach(), requires_grad=False)
    shared._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' word for "not to be drawn"
    return shared


def _unset(like: Tensor) -> Tensor:
    """A tensor on the CPU whose numbers tell that nothing has set them."""
    if like.is_floating_point() or like.is_complex():
        return torch.full(like.shape, torch.nan, dtype=like.dtype)
    return torch.full(like.shape, _UNSET if like.dtype in (torch.int32, torch.int64) else 0, dtype=like.dtype)


def _is_set(tensor: Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return not bool(tensor.isnan().any())
    return tensor.dtype in (torch.int32, torch.int64) and not bool((tensor == _UNSET).any())
