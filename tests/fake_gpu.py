"""A GPU that there is none of: tensors that say they are on it, computed on the CPU, and every wait for it counted.

A tensor of it is a wrapper around one of the CPU. What reaches the dispatcher is unwrapped, computed and wrapped again;
what would make the host wait for a real device is counted, with where in the project it was asked; and what a real
device refuses, operands on two devices, is refused. Nothing of CUDA is there: no kernel, no stream, no rounding.
"""

import contextlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deadbench.runners.engines import device
from deadbench.runners.worker import aside
from deadbench.suite.spectra import solver_checks, solvers

GPU = torch.device("cuda", 0)
# Their results, or the shapes of these, are told to the host.
_SYNCS = (
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "repeat_interleave", "_linalg_check_errors", "linalg_eigh",
)  # fmt: skip
_PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "mv": 0}  # and which argument is the left one
_HERE = ("cuda", "meta")  # what a wrapper's device is to Python, and to C++
_OURS = re.compile(r".*/((?:suite|runners)/.*)")


class OnGpu(Tensor):
    """A tensor of the fake GPU; `held` is its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        form: dict[str, Any] = {"dtype": held.dtype, "strides": held.stride(), "storage_offset": held.storage_offset()}
        made: OnGpu = Tensor._make_wrapper_subclass(cls, held.shape, device="meta", **form)  # type: ignore[attr-defined]
        made.held = held
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the fake GPU")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"


@dataclass
class Counted:
    """Of a stretch of work: places where the host waited, copies to the host and to the device, in number and bytes."""

    syncs: list[str] = field(default_factory=list)
    down: list[int] = field(default_factory=list)
    up: list[int] = field(default_factory=list)
    flop: int = 0  # of matrix products and triangular solves
    moved: int = 0  # bytes that operations read and wrote, each by itself

    def numbers(self) -> tuple[int, int, int]:
        """How many of each."""
        return len(self.syncs), len(self.down), len(self.up)


@dataclass
class Queue:
    """Operations that the device was given, and that the host knows to be done; and what is counted of them."""

    told: int = 0
    done: int = 0
    counted: Counted = field(default_factory=Counted)


class FakeGpu(TorchDispatchMode):
    """Inside, `GPU` is a device."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def __init__(self) -> None:
        super().__init__()
        self._queues = threading.local()

    @property
    def queue(self) -> "Queue":
        """That of this thread: each tells the device of its own, as with a stream of its own."""
        if not hasattr(self._queues, "mine"):
            self._queues.mine = Queue()
        return self._queues.mine

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counted]:
        """What is done inside, by itself."""
        queue = self.queue
        before, queue.counted = queue.counted, Counted()
        try:
            yield queue.counted
        finally:
            queue.counted = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        mine = [t for t in given if isinstance(t, OnGpu)]
        asked = kwargs.get("device")
        waited = len(self.queue.counted.syncs)
        goes_to_gpu = torch.device(asked).type in _HERE if asked is not None else bool(mine)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        if mine:
            self._count(name, args, kwargs, mine, given, asked)
        elif name == "_to_copy" and goes_to_gpu:
            self.queue.counted.up.append(args[0].nbytes)
        elif not goes_to_gpu:
            return func(*args, **kwargs)
        if name == "_to_copy" and mine and goes_to_gpu and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0]  # it is there
        plain_args, plain_kwargs = tree_map_only(OnGpu, lambda t: t.held, (args, kwargs))
        found = func(*plain_args, **plain_kwargs)
        self._worked(name, func, plain_args, found)
        if len(self.queue.counted.syncs) > waited:
            self.queue.done = self.queue.told
        if not goes_to_gpu:
            return found
        known = {id(t.held): t for t in mine}  # what an operation in place returns is what it was given
        return tree_map_only(Tensor, lambda t: known.get(id(t)) if id(t) in known else OnGpu(t), found)

    def _worked(self, name: str, func: Any, args: Any, found: Any) -> None:
        if func.is_view or name in ("empty", "empty_like", "empty_strided", "new_empty"):  # memory alone
            return
        self.queue.told += 1
        tensors = [t for t in tree_leaves((args, found)) if isinstance(t, Tensor)]
        self.queue.counted.moved += sum(t.numel() * t.element_size() for t in tensors)
        if name in _PRODUCTS:
            left, right = args[_PRODUCTS[name]].shape, args[_PRODUCTS[name] + 1].shape
            self.queue.counted.flop += 2 * left[0] * left[-1] * right[-1]
        elif name == "linalg_solve_triangular":
            self.queue.counted.flop += args[1].numel() * len(args[0])

    def waits(self, for_what: str) -> None:
        """The host waits for all that it has told."""
        self.queue.done = self.queue.told
        self.queue.counted.syncs.append(f"{for_what} {_place()}")

    def _count(self, name: str, args: Any, kwargs: Any, mine: list[Tensor], given: list[Tensor], asked: Any) -> None:
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
        )
        if name in _SYNCS or by_mask:
            self.waits(name)
        if name == "_to_copy" and asked is not None and torch.device(asked).type not in _HERE:
            self.queue.counted.down.append(args[0].nbytes)
            self.waits("copy to the host")
        elif name == "copy_":
            if not isinstance(args[0], OnGpu):
                self.queue.counted.down.append(args[0].nbytes)
                self.waits("copy to the host")
            elif not isinstance(args[1], OnGpu):
                self.queue.counted.up.append(args[1].nbytes)
        else:
            elsewhere = [t for t in given if not isinstance(t, OnGpu) and t.ndim]
            assert not elsewhere or by_mask or name == "index", f"{name} of operands on two devices {_place()}"


class Event:
    """A moment of a fake GPU, for which an operation takes a millisecond."""

    def __init__(self, gpu: FakeGpu):
        self._gpu, self._queue, self._at = gpu, gpu.queue, 0

    def record(self) -> None:
        self._at = self._queue.told

    def query(self) -> bool:
        return self._at <= self._queue.done

    def synchronize(self) -> None:
        if not self.query():
            self._gpu.waits("event")

    def elapsed_time(self, later: "Event") -> float:
        assert self.query()
        assert later.query()
        return float(later._at - self._at)


class Stream:
    """A stream of a fake GPU: a thread inside is one more that tells the device what to do."""

    def __init__(self, gpu: FakeGpu):
        self._gpu = gpu

    def wait_stream(self, other: object) -> None:
        """Nothing runs behind: what was told is done."""

    def synchronize(self) -> None:
        self._gpu.waits("stream")

    def __enter__(self) -> None:
        self._gpu.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._gpu.__exit__(*exception)


def _place() -> str:
    """The innermost line of the project that asked."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if found := _OURS.fullmatch(frame.f_code.co_filename):
            return f"at {found[1]}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextlib.contextmanager
def fake_gpu(monkeypatch: Any) -> Iterator[FakeGpu]:
    """The fake GPU, in the place of CUDA."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    free = {"memory_reserved": 0, "memory_allocated": 0, "mem_get_info": (64 * 2**30, 80 * 2**30)}
    for name, value in (free | {"get_device_name": "a fake GPU"}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(solvers, "WAYS", dict(solvers.WAYS))
    solver_checks._drawn.cache_clear()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeGpu() as gpu:
            monkeypatch.setattr(device, "_event", lambda device: Event(gpu))
            monkeypatch.setattr(aside, "_stream", lambda device: Stream(gpu))
            monkeypatch.setattr(aside, "_current_stream", lambda device: None)
            yield gpu
    finally:
        solver_checks._drawn.cache_clear()
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def most(places: list[str]) -> str:
    """The places that were asked most, a line each."""
    return "\n".join(f"{count} x {place}" for place, count in Counter(places).most_common(40))
