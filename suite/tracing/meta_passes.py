"""Forward passes on the meta device of models that look at values, which meta tensors have not.

A question that a model asks of its tensors ("are sequences packed here?", "which tokens does this expert get?") is
answered by rote: shapes and the flow through the modules come out, and nothing else is asked of such a pass.

Experts one after the other are asked for their tokens by the hundred in each block; all of them at once are asked
nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class _Answers(TorchDispatchMode):
    """Gives `answer` for the value of any meta tensor of one element."""

    def __init__(self, answer: int):
        super().__init__()
        self._answer = answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer, or let `func` run."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            dtype = args[0].dtype
            return bool(self._answer) if dtype == torch.bool else torch.zeros((), dtype=dtype).item() + self._answer
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def answered(answer: int) -> Iterator[None]:
    """Inside, a meta tensor asked for its value says `answer`; asked where it is not zero, it says everywhere."""
    import torch.fx.experimental._config as settings

    before = settings.meta_nonzero_assume_all_nonzero
    settings.meta_nonzero_assume_all_nonzero = True
    try:
        with _Answers(answer):
            yield
    finally:
        settings.meta_nonzero_assume_all_nonzero = before


@contextlib.contextmanager
def experts_at_once(experts: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these modules of experts take their tokens in one product of matrices instead of one expert at a time."""
    configs: list[Any] = list({id(module.config): module.config for module in experts}.values())
    before = [config._experts_implementation for config in configs]
    for config in configs:
        config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation


def attempts(model: nn.Module) -> list[Callable[[], contextlib.AbstractContextManager[None]]]:
    """The ways to try a forward pass of `model`: as it is, and on the meta device with either answer."""
    plain = contextlib.nullcontext
    return [plain, partial(answered, 0), partial(answered, 1)] if next(model.parameters()).is_meta else [plain]


def quick_attempts(model: nn.Module) -> list[Callable[[], contextlib.AbstractContextManager[None]]]:
    """As `attempts`, for who asks through which modules all flows: first with all experts of a block at once.

    In vain where a mixture's experts refuse that, for which one way is kept that asks them one by one.
    """
    ways = attempts(model)
    experts = [module for module in model.modules() if _at_once(module)]
    if len(ways) == 1 or not experts:
        return ways
    return [*(partial(_together, experts, way) for way in ways), ways[1]]


def _at_once(module: nn.Module) -> bool:
    """Whether transformers has several implementations of these experts."""
    return hasattr(module, "is_concatenated") and hasattr(getattr(module, "config", None), "_experts_implementation")


@contextlib.contextmanager
def _together(
    experts: Sequence[nn.Module], way: Callable[[], contextlib.AbstractContextManager[None]]
) -> Iterator[None]:
    with experts_at_once(experts), way():
        yield
