"""What needs nothing of the model, beside it: a device has a stream for that, and a thread that tells it what to do."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from deadbench.runners.engines.device import Moment
from deadbench.runners.engines.like_threads import like_threads


class Aside:
    """One piece of work at a time beside what a device is told to do meanwhile.

    A CPU's cores are all the model's: nothing would be won. A context, which waits at its end.
    """

    def __init__(self, device: torch.device):
        """Beside the model that is on `device`."""
        self._device, self._stream = device, None if device.type == "cpu" else _stream(device)
        self._begun: Future[float] | None = None

    def __enter__(self) -> "Aside":
        self._thread = like_threads(1, "deadbench-aside")  # which has none until something is begun
        return self

    def __exit__(self, *exception: Any) -> None:
        self._begun = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    @property
    def possible(self) -> bool:
        """Whether the device has such a place."""
        return self._stream is not None

    @property
    def busy(self) -> bool:
        """Whether `ended` has something to wait for."""
        return self._begun is not None

    def begin(self, work: Callable[[], None], *on: Any) -> None:
        """Have `work` done on these objects, after all that the device has been told until now.

        Nobody else may change them until it has `ended`.
        """
        assert self._begun is None
        assert self._stream is not None
        self._stream.wait_stream(_current_stream(self._device))
        # Memory goes back to the stream that it was taken for, which would not wait for this one to have read it.
        held = list(tensors_within(on))
        self._begun = self._thread.submit(self._run, work, held)

    def ended(self) -> float:
        """Wait for what was begun. Its seconds.

        Raises:
            Exception: what it raised.
        """
        assert self._begun is not None
        begun, self._begun = self._begun, None
        return begun.result()

    def _run(self, work: Callable[[], None], held: list[Tensor]) -> float:
        assert self._stream is not None
        with self._stream, torch.no_grad():
            try:
                started = Moment.on(self._device)
                work()
                return started.seconds_to(Moment.on(self._device))
            finally:
                self._stream.synchronize()
                held.clear()


def tensors_within(thing: Any) -> Iterator[Tensor]:
    """All tensors in containers and in the project's own objects, each as often as it is there.

    Example:
        >>> [len(each) for each in tensors_within({"a": [torch.ones(2)], "b": (torch.ones(3), 4)})]
        [2, 3]
    """
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        yield from tensors_within(list(thing.values()))
    elif isinstance(thing, list | tuple):
        for each in thing:
            yield from tensors_within(each)
    elif type(thing).__module__.startswith(_OURS):
        yield from tensors_within(vars(thing))


_OURS = __name__.partition(".")[0] + "."


def _stream(device: torch.device) -> Any:
    return torch.Stream(device)


def _current_stream(device: torch.device) -> Any:
    return torch.accelerator.current_stream(device)
