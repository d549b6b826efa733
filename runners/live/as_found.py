"""A module is looked at and left exactly as it was found: modes, buffers, caches, random numbers, hooks."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deadbench.suite.architectures.live import eagerly, is_sharded

_PLAIN = (bool, int, float, str, type(None), Tensor)  # what a module keeps from one call to the next beside buffers


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in evaluation mode, uncompiled and without gradients; afterwards all is as before.

    Whatever happens inside: the modes of every module, buffers and what else modules keep of a call, the random
    numbers of Python, numpy, torch and each GPU, and which parameters of fully_shard are gathered.
    """
    modules = list(model.modules())
    attributes = [_plain(module) for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules]
    values = {id(b): (b, b.detach().clone()) for _, own in buffers for b in own.values() if b is not None}
    with ExitStack() as stack:
        stack.enter_context(_same_random_numbers())
        stack.enter_context(torch.no_grad())
        stack.enter_context(eagerly())
        stack.enter_context(_uncached_autocast(model))
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            if is_sharded(model):
                for module in modules:
                    if hasattr(module, "reshard"):
                        module.reshard()  # type: ignore[operator]
            for module, own in buffers:
                module._buffers.clear()
                module._buffers.update(own)
            for buffer, value in values.values():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
            for module, before in zip(modules, attributes, strict=True):
                _put_back(module, before)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    for name, value in _plain(module).items():
        if name not in before:
            del module.__dict__[name]
        elif before[name] is not value:
            module.__dict__[name] = before[name]
    for name in before.keys() - vars(module).keys():
        module.__dict__[name] = before[name]


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if cuda else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(on_gpus)


@contextmanager
def _uncached_autocast(model: nn.Module) -> Iterator[None]:
    """Inside an autocast, one without a cache: a weight cast here, without gradients, must not serve training."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    if not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, torch.get_autocast_dtype(device), enabled=True, cache_enabled=False):
        yield
