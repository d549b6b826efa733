"""The weights of blocks that come and go: one block's in place, and the next one's on their way where that saves time.

Reading from a disk and copying to a GPU go on beside the block that runs. Drawing random weights on the CPU that
computes does not pay there: it is done between two blocks, on all cores.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.runners.engines.base import mismatch
from deadbench.runners.engines.like_threads import like_threads
from deadbench.suite.errors import CheckpointError

_PAGE_BYTES = 4096

Values = Callable[[str], Tensor]


class Block:
    """A block of which the large tensors come and go.

    Attributes:
        module: the block.
        forward: its own, whatever stands in its place meanwhile.
        absent: (owner, attribute, full name) of each tensor that comes and goes.
    """

    def __init__(self, module: nn.Module, values: Values, ready: Callable[[Tensor], Tensor]):
        """`values` gives a tensor by its full name; `ready` brings it to the device and dtype of the run."""
        self.module, self.forward = module, module.forward
        self.absent: list[tuple[nn.Module, str, str]] = []
        self._values, self._ready = values, ready
        self._placeholders: list[Tensor] = []

    def fetch(self, name: str) -> Tensor:
        """One of its tensors, ready to be put in its place."""
        with torch.no_grad():
            tensor = self._ready(self._values(name))
            if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel():
                tensor.view(-1).view(torch.uint8)[::_PAGE_BYTES].max()  # a mapped file is read here, not in the block
        return tensor

    def load(self, tensors: Iterable[Tensor]) -> None:
        """Put what was fetched, in the order of `absent`, in its place.

        Raises:
            CheckpointError: of another shape than the architecture's.
        """
        self._placeholders = [getattr(owner, attribute) for owner, attribute, _ in self.absent]
        for (owner, attribute, name), placeholder, tensor in zip(self.absent, self._placeholders, tensors, strict=True):
            if tensor.shape != placeholder.shape:
                raise CheckpointError(mismatch(name, tensor.shape, placeholder.shape))
            put(owner, attribute, tensor)

    def drop(self) -> None:
        """Give its memory back."""
        for (owner, attribute, _), placeholder in zip(self.absent, self._placeholders, strict=True):
            put(owner, attribute, placeholder)


class Coming:
    """Fetches blocks' weights with all cores; with `ahead`, those of the next block while one runs. A context."""

    def __init__(self, blocks: dict[nn.Module, Block], model: nn.Module, *, ahead: bool):
        """`model` is the part that runs: its blocks are called in the order in which they stand there, or we wait."""
        self._blocks, self._ahead = blocks, ahead
        self._order = [module for module in model.modules() if module in blocks]
        self._next: tuple[nn.Module, list[Future[Tensor]]] | None = None
        self._pool = like_threads(torch.get_num_threads(), "weights")

    def __enter__(self) -> "Coming":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._next = None

    def load(self, module: nn.Module) -> None:
        """Have the weights of `module` in their places, and begin with those of the next block."""
        if not self._ahead and torch.get_num_threads() == 1:  # a thread would keep memory of its own
            block = self._blocks[module]
            block.load(block.fetch(name) for _, _, name in block.absent)
            return
        found, self._next = self._next, None
        if found is not None and found[0] is not module:
            self._ahead = False  # this model goes its own way: what came for nothing would come for nothing again
            for future in found[1]:
                future.cancel()
            found = None
        futures = self._begun(module) if found is None else found[1]
        self._blocks[module].load(future.result() for future in futures)
        place = self._order.index(module) + 1 if self._ahead and module in self._order else 0
        if 0 < place < len(self._order):
            self._next = self._order[place], self._begun(self._order[place])

    def _begun(self, module: nn.Module) -> list[Future[Tensor]]:
        block = self._blocks[module]
        return [self._pool.submit(block.fetch, name) for _, _, name in block.absent]


def put(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    """Set a parameter or buffer."""
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[attribute] = tensor
