"""How many parameter directions the norms make dead: counted from parameters and configuration, nothing is run.

Let a norm's kernel be `{w : w . (y - beta) = 0 for every output y}`, of dimension m: 1 for a LayerNorm, or its exactly
zero scales, whichever is more than none; an RMSNorm has only the zero scales.

- Read side: a linear map W (out x D) that only this norm feeds. `W + u w^T, b - u (w . beta)` is the same function for
  any u, so `out x m` directions. Without a bias only w with `w . beta = 0` count.
- Write side: a parameter whose output reaches, through sums, nothing but LayerNorms. A constant along 1, added to it,
  is taken out by the mean: `W + 1 w^T, b + c 1` for any w and c, so `in + 1` directions; an embedding has one a row.

They are linearly independent, and along each the output does not change at all: their number is a lower bound on the
nullity of the Fisher information at these parameters, for any data. A matrix that two modules share counts nothing.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from deadbench.suite.architectures.build import SMALL_MODEL, build_published
from deadbench.suite.architectures.norms import EffectiveNorm
from deadbench.suite.architectures.wiring import (
    Wiring,
    is_linear,
    private_parameters,
    trace,
    trace_empty,
    weight_out_in,
)
from deadbench.suite.reads.anatomy import DeadMaps, MapRead, MapWrite


def trace_published(config: Any, empty: nn.Module | None = None) -> tuple[nn.Module, Wiring | None]:
    """The published architecture without weights, `empty` where it is there, and its wiring by module path in it.

    The wiring is None where the forward pass runs neither on the meta device nor, for a small model, on CPU.

    Raises:
        ArchitectureError: transformers cannot build it.
    """
    empty = build_published(config, "meta") if empty is None else empty
    with contextlib.suppress(Exception):  # a pass that looks at values, or wants other inputs: it may raise anything
        return empty, trace_empty(empty)
    if sum(p.numel() for p in empty.parameters()) <= SMALL_MODEL:
        model = build_published(config)
        with contextlib.suppress(Exception):
            return model, trace(model)
    return empty, None


def dead_at_initialisation(model: nn.Module, wiring: Wiring) -> int:
    """Dead parameter directions of a random initialisation, whose scales are one and shifts zero.

    A map without a bias counts here, and no more once the shift has moved. `model` and `wiring` as `trace_published`
    gives them.
    """
    norms = {
        path: EffectiveNorm(b.family, np.ones(D), np.zeros(D) if b.shift_parameter else None, b.eps or 0.0)
        for path, (b, D) in wiring.norms.items()
    }
    return sum(map(sum, count_dead_parameters(model, wiring, norms).values()))


def count_dead_parameters(
    model: nn.Module, wiring: Wiring, norms: Mapping[str, EffectiveNorm]
) -> dict[str, tuple[int, int]]:
    """Dead parameter directions by norm: (read side, write side).

    Args:
        model: the traced model; only shapes and which parameters are shared are used.
        wiring: what `trace` found in it.
        norms: the real parameters of its norms, by module path; a norm that is left out counts nothing.

    Returns:
        A pair for every norm in `norms` that was called. What is written belongs to the first norm that reads it.
    """
    return dead_maps(model, wiring).count(norms)


def dead_maps(model: nn.Module, wiring: Wiring) -> DeadMaps:
    """What `count_dead_parameters` needs of a traced model: who reads and writes, and how much each comes to."""
    private = private_parameters(model)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    reads = [
        MapRead(path, norm, len(weight_out_in(modules[path])), modules[path].bias is not None)
        for path, norm in wiring.reads.items()
        if _all_private(modules[path], private)
    ]
    writes = []
    for path, norm in wiring.writes.items():
        module, linear = modules.get(path), False
        if module is None:
            parameter = parameters[path]
            shifts = parameter.numel() // parameter.shape[-1] if id(parameter) in private else 0
        elif is_linear(module):
            linear = _all_private(module, private)
            shifts = weight_out_in(module).shape[1] + (module.bias is not None) if linear else 0
        elif isinstance(module, nn.Embedding):
            shifts = module.num_embeddings if _all_private(module, private) else 0
        else:
            shifts = _shift_is_private(module, wiring.norms[path][0].shift_parameter, private)
        writes.append(MapWrite(path, norm, shifts, linear))
    return DeadMaps(tuple(wiring.norms), tuple(reads), tuple(writes))


def _all_private(module: nn.Module, private: set[int]) -> bool:
    return all(id(p) in private for p in module.parameters(recurse=False))


def _shift_is_private(module: nn.Module, name: str | None, private: set[int]) -> int:
    return int(name is not None and id(getattr(module, name)) in private)
