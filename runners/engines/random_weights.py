"""Random weights of a model that is held whole: the large ones drawn by several threads, each straight to its place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.runners.engines.deferred_init import DeferredInit
from deadbench.runners.engines.like_threads import like_threads
from deadbench.suite.errors import ArchitectureError

_SHARED_ELEMENTS = 2**21  # smaller weights are drawn by one thread, as the model is built


def drawn_side_by_side(
    build: Callable[[], nn.Module], seed: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """`set_seed(seed)` and `build()` on `device` in `dtype`, its largest weights drawn by as many threads as torch has.

    The values are those that one thread draws, and each goes to its place as soon as it is there: the model is never
    held in float32.

    Raises:
        ArchitectureError: transformers cannot build it.
    """
    import transformers

    def whole() -> nn.Module:
        transformers.set_seed(seed)
        return build().to(device, dtype)

    transformers.set_seed(seed)
    try:
        with DeferredInit(_SHARED_ELEMENTS) as values:
            model = build()
    except ArchitectureError:  # maybe for looking at what is not there
        return whole()
    places: dict[Tensor, list[tuple[dict[str, Any], str]]] = {}  # a tied weight has several
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    places.setdefault(tensor, []).append((held, name))

    if not values.is_all_of(places):  # some are in plain attributes, lists or whatever else a module keeps
        del model, places
        return whole()

    def draw(tensor: Tensor) -> None:
        value = values.value(tensor).to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, tensor.requires_grad)
        value.__dict__.update(tensor.__dict__)
        for held, name in places[tensor]:
            held[name] = value

    with like_threads(torch.get_num_threads(), "weights") as threads:
        list(threads.map(draw, sorted(places, key=Tensor.numel, reverse=True)))
    return model.to(device, dtype)
