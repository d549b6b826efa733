"""Forward passes that stop at every block's call and wait there, and streams that wait on disk.

Each pass is a greenlet: the model's own code, on its own stack, in the one thread that computes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from deadbench.runners.engines.sweep_state import Packed, pack, seen
from deadbench.suite.inputs.batches import Batch
from deadbench.suite.scratch import Scratch
from deadbench.suite.spectra.arrow_state import StateError


@dataclass(frozen=True)
class BlockCall:
    """A block's call that waits for its weights."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def stream(self) -> Tensor:
        """The hidden states that enter the block.

        Raises:
            ValueError: there are none.
        """
        stream = self.args[0] if self.args else self.kwargs.get("hidden_states")
        if not isinstance(stream, Tensor):
            raise ValueError(f"{type(self.module).__name__} is not called with a stream of hidden states")
        return stream


class SteppedPass:
    """The forward pass of one batch, which stops at each block's call.

    Attributes:
        call: the one at which it stands.
        called: the blocks whose results it has been given.
    """

    def __init__(self, batch: Batch, model: nn.Module, inputs: dict[str, Any]):
        self.batch = batch
        self.call: BlockCall | None = None
        self.called: list[nn.Module] = []
        self._results: list[Any] = []
        self._pass = greenlet(lambda: _without_result(model, inputs))

    def go_on(self, result: Any) -> None:
        """Run to the next block's call, `result` being what the last one returns."""
        if self.call is not None:
            self.called.append(self.call.module)
            self._results.append(seen(result))
        self.call = None
        self.call = self._pass.switch(result) if self._pass else self._pass.switch()

    def standing(self) -> BlockCall:
        """The call at which it stands."""
        assert self.call is not None
        return self.call

    @property
    def finished(self) -> bool:
        """Whether the model's forward has returned."""
        return bool(self._pass.dead)

    def state(self, number: int) -> pa.RecordBatch:
        """Where it stands, as pass `number` of a sweep.

        Raises:
            StateError: a block returned what cannot be saved.
        """
        call = self.standing()
        return pack(number, self._results, call.stream(), (call.args, call.kwargs))

    def come_to(self, packed: Packed) -> None:
        """From its first block's call to where a state was saved, without running a block.

        Raises:
            StateError: the model does not come there.
        """
        for result in packed.results():
            if self.finished:
                raise StateError("the model does not come to the place where it was saved")
            self.go_on(result)
            del result  # as a block's own, it is the model's to hold
        if self.call is None:
            raise StateError("the model does not come to the place where it was saved")
        packed.settle(self.call.stream(), (self.call.args, self.call.kwargs))

    def kill(self) -> None:
        """Unwind a pass that will not go on, so that it gives its memory back."""
        if self._pass:
            self._pass.throw()


def _without_result(model: nn.Module, inputs: dict[str, Any]) -> None:
    model(**inputs)


@contextlib.contextmanager
def handed_over(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, a block's forward does not run: it gives its call to who started the greenlet, and waits."""
    main = getcurrent()

    def instead(module: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: main.switch(BlockCall(module, args, kwargs))

    for module in blocks:
        module.forward = instead(module)
    try:
        yield
    finally:
        for module in blocks:
            del module.forward


class Parked:
    """Streams of batches that wait: in memory up to a budget, then in files of the system's temporary folder."""

    def __init__(self, budget_bytes: float):
        self._budget, self._resident, self._files = budget_bytes, 0, 0
        self._held: dict[int, int] = {}
        self._away: dict[int, tuple[Tensor, Path]] = {}

    def __enter__(self) -> "Parked":
        self._folder = Scratch()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._folder.close()

    def put(self, run: SteppedPass) -> None:
        """Count a waiting run's stream; past the budget, write it and give its memory back."""
        assert run.call is not None
        stream = run.call.stream()
        storage = stream.untyped_storage()
        if self._resident + storage.nbytes() <= self._budget or not storage.resizable():
            self._held[id(run)] = storage.nbytes()
            self._resident += storage.nbytes()
            return
        path = self._folder.path / str(id(run))
        _bytes_of(stream).cpu().clone().numpy().tofile(path)
        storage.resize_(0)
        self._away[id(run)] = (stream, path)

    def take(self, run: SteppedPass) -> None:
        """Have the stream of a run back in memory."""
        self._resident -= self._held.pop(id(run), 0)
        if id(run) in self._away:
            stream, path = self._away.pop(id(run))
            content = torch.from_numpy(np.fromfile(path, np.uint8))
            stream.untyped_storage().resize_(len(content))
            _bytes_of(stream).copy_(content)
            path.unlink()


def same_block(runs: list[SteppedPass]) -> nn.Module:
    """The block before which all of these passes stand.

    Raises:
        ValueError: they stand before different ones.
    """
    modules = {run.call.module if run.call else None for run in runs}
    if len(modules) != 1 or None in modules:
        raise ValueError("the batches do not pass through the same blocks; such a model cannot be streamed")
    (module,) = modules
    assert module is not None
    return module


def _bytes_of(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
