"""Smaller pictures for a model of large ones, of a film one: what normalises last in it they show sooner."""

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.suite.tracing.flow import Call, recorded_calls
from deadbench.suite.tracing.meta_passes import attempts
from deadbench.suite.tracing.minimal_inputs import placed

_LARGE_PASS = 2**29  # bytes that the modules of a model return in one


def smaller_pictures(model: nn.Module, inputs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`inputs` with corners of pictures, or one of a film, where a pass returns much and the model takes these too.

    Args:
        model: on the meta device.
        inputs: as it takes them; None where none are known.
    """
    if inputs is None or sum(call.output.nbytes for call in empty_calls(model, inputs)) <= _LARGE_PASS:
        return None
    for less in (partial(_corner, 4), partial(_corner, 2), _first_picture):
        smaller = {
            name: less(value) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        if any(smaller[name] is not value for name, value in inputs.items()) and empty_calls(model, smaller):
            return smaller
    return None


def _corner(share: int, pixels: Tensor) -> Tensor:
    return pixels[..., : pixels.shape[-2] // share, : pixels.shape[-1] // share] if pixels.ndim > 3 else pixels


def _first_picture(pixels: Tensor) -> Tensor:
    return pixels[:, :1] if pixels.ndim == 5 else pixels  # (1, F, C, H, W)


def empty_calls(model: nn.Module, inputs: Mapping[str, Any]) -> list[Call]:
    """The calls of a pass of a model on the meta device; none where it fails."""
    for attempt in attempts(model):
        with contextlib.suppress(Exception), torch.no_grad(), attempt(), recorded_calls(model) as calls:
            model(**placed(inputs, model))
            return calls
    return []
