"""Smaller pictures for a model of large ones, of a film one, of a series its beginning: they show sooner what
normalises last in it."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.suite.tracing.flow import Call, recorded_calls
from deadbench.suite.tracing.meta_passes import quick_attempts
from deadbench.suite.tracing.minimal_inputs import placed

_LARGE_PASS = 2**29  # bytes that the modules of a model return in one
_LONG = 512  # steps of a series


def returns_much(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the modules of a model on the meta device return so much in a pass that smaller inputs are worth it."""
    return sum(call.output.nbytes for call in empty_calls(model, inputs)) > _LARGE_PASS


def smaller_pictures(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """`inputs` with corners of pictures, one of a film or the beginning of a series; None where it takes none of these.

    Args:
        model: on the meta device.
        inputs: as it takes them.
    """
    for smaller in _smaller(inputs):
        if any(smaller[name] is not value for name, value in inputs.items()) and empty_calls(model, smaller):
            return smaller
    return None


def _smaller(inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The smallest that may do first, of each kind."""
    for less in (partial(_corner, 4), partial(_corner, 2), _first_picture):
        yield {
            name: less(value) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
    for share in (64, 8):
        yield _beginning(share, inputs)


def _beginning(share: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Series, by far longer than they are wide, from their first step on, with the masks that are as long."""
    series = [v for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point() and 1 < v.ndim < 4]
    steps = max((max(each.shape[1:]) for each in series), default=0)
    if steps < _LONG:
        return dict(inputs)
    return {name: _first_steps(v, steps, share) if isinstance(v, Tensor) else v for name, v in inputs.items()}


def _first_steps(series: Tensor, steps: int, share: int) -> Tensor:
    axis = next((axis for axis in range(1, series.ndim) if series.shape[axis] == steps), None)
    return series if axis is None else series.narrow(axis, 0, steps // share)


def _corner(share: int, pixels: Tensor) -> Tensor:
    return pixels[..., : pixels.shape[-2] // share, : pixels.shape[-1] // share] if pixels.ndim > 3 else pixels


def _first_picture(pixels: Tensor) -> Tensor:
    return pixels[:, :1] if pixels.ndim == 5 else pixels  # (1, F, C, H, W)


def empty_calls(model: nn.Module, inputs: Mapping[str, Any]) -> list[Call]:
    """The calls of a pass of a model on the meta device; none where it fails."""
    for attempt in quick_attempts(model):
        with contextlib.suppress(Exception), torch.no_grad(), attempt(), recorded_calls(model) as calls:
            model(**placed(inputs, model))
            return calls
    return []
