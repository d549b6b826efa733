"""A module is looked at and left exactly as it was found: modes, buffers, caches, random numbers, hooks."""

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deadbench.suite.architectures.live import eagerly, is_sharded

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)  # of these types and of none derived from them
_TRAINED = ("_parameters", "_modules")  # attributes of every module that no call changes


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in evaluation mode, uncompiled and without gradients; afterwards all is as before.

    Whatever happens inside: the modes of every module, buffers, hooks and what else modules keep of a call, also in
    lists and dictionaries; the random numbers of Python, numpy, torch and each GPU; and which parameters of fully_shard
    are gathered.
    """
    modules = list(model.modules())
    kept = _Kept(modules)
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
            kept.put_back()


class _Kept:
    """What modules have beside parameters: the same objects, of containers the contents, of tensors the values."""

    def __init__(self, modules: Iterable[nn.Module]):
        self._held: dict[int, tuple[Any, list[Any]]] = {}
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        for module in modules:
            own = vars(module)
            self._held[id(own)] = own, _parts(own)
            for name, value in own.items():
                if name not in _TRAINED:
                    self._keep(value)

    def _keep(self, value: Any) -> None:
        if type(value) in _CONTAINERS:
            if id(value) not in self._held:
                self._held[id(value)] = value, _parts(value)
                for part in self._held[id(value)][1]:
                    self._keep(part)
        elif isinstance(value, tuple):
            for part in value:
                self._keep(part)
        elif _has_values(value) and id(value) not in self._values:
            self._values[id(value)] = value, value.detach().clone()

    def put_back(self) -> None:
        for container, before in self._held.values():
            now = _parts(container)
            if len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True)):
                continue
            if not isinstance(container, dict):
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(before)
                continue
            pairs = dict(zip(before[::2], before[1::2], strict=True))
            if list(container) != list(pairs):
                container.clear()
            container.update(pairs)
        for tensor, value in self._values.values():
            if not torch.equal(tensor, value):
                tensor.copy_(value)


def _parts(container: Any) -> list[Any]:
    """What is in it, by which it is told whether that is still the same; keys and values in turn."""
    return [part for pair in container.items() for part in pair] if isinstance(container, dict) else list(container)


def _has_values(value: Any) -> bool:
    """Whether it is a tensor that no optimizer moves, of a kind that can be compared and written."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and value.layout is torch.strided
        and not (value.is_nested or value.is_meta)
    )


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
