"""transformers' own random initialisation of a model that is never held: each weight drawn alone, when it is wanted.

The constructor runs once with its large weights on the meta device. What it would have done to them is recorded: the
operation and, for a random one, the generator's state; the generator is moved on as if it had drawn. Replaying the
records of one weight gives the value that it has in the whole model drawn at once, bit for bit: no checkpoint on
disk, and one weight in memory.
"""

import contextlib
import gc
import math
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from deadbench.runners.engines.generator_jump import FILLS, moved_on, words_drawn
from deadbench.suite.architectures.build import build_model

_DEFERRED_ELEMENTS = 2**14  # smaller tensors are made at once: norms, biases, tables
_CHUNK_ELEMENTS = 2**17  # so many values are drawn at a time, in the cache
_FEWEST_JUMPED = 2**20  # values for which the generator is moved on at once: fewer are drawn as soon
# These look at values and do nothing to a meta tensor: each is recorded whole.
_LOOKING = {name: getattr(nn.init, name) for name in ("_no_grad_trunc_normal_", "orthogonal_", "dirac_", "sparse_")}
_DIRAC = _LOOKING["dirac_"]  # which draws nothing
_ONE_AT_A_TIME = threading.Lock()
_OVERWRITES = FILLS | {torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar, *_LOOKING.values()}


@dataclass(frozen=True)
class _View:
    """A meta tensor as a place in its storage."""

    storage: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Step:
    """One recorded operation; `generator` is the state before a random one, `made` its new tensors."""

    index: int
    function: Any
    args: Any
    kwargs: Any
    generator: Tensor | None
    made: dict[int, _View]
    reads: tuple[int, ...]
    overwrites: bool


class DeferredInit(TorchDispatchMode):
    """Inside `with`, large empty tensors are made on the meta device, and what is done to them is recorded."""

    def __init__(self, at_least: int | None = None) -> None:
        """`at_least`: so many elements are large; None: `_DEFERRED_ELEMENTS`."""
        super().__init__()
        self._at_least = _DEFERRED_ELEMENTS if at_least is None else at_least
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice
        self._writers: dict[int, list[_Step]] = {}
        self._count = 0
        self._piece = torch.empty(2 * _CHUNK_ELEMENTS)

    def value(self, deferred: Tensor) -> Tensor:
        """What `deferred`, made inside, holds by now."""
        wanted = self._view(deferred)
        steps: dict[int, _Step] = {}
        pending = [(wanted.storage, self._count)]
        while pending:
            storage, before = pending.pop()
            for step in reversed(self._writers[storage]):
                if step.index < before and step.index not in steps:
                    steps[step.index] = step
                    pending += [(read, step.index) for read in step.reads if read != storage]
                if step.index < before and step.overwrites:
                    break
        real: dict[int, torch.UntypedStorage] = {}
        alone = all(_takes_generator(step.function) for step in steps.values() if step.generator is not None)
        # Weights are drawn by several threads at once, each by a generator of its own; the process has one other.
        with torch.no_grad(), contextlib.nullcontext() if alone else _shared_generator():
            for index in sorted(steps):
                self._replay(steps[index], real, alone=alone)
        return self._real(wanted, real)

    def is_all_of(self, tensors: Collection[Tensor]) -> bool:
        """Whether these, each once, are all that still holds what was made inside; garbage does not count."""
        holders = Counter(tensor.untyped_storage()._cdata for tensor in tensors)
        for collected in (False, True):
            if collected:
                gc.collect()
            if all(torch._C._storage_Use_Count(key) == 1 + holders[key] for key in self._storages):
                return True
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record `func` where it makes or writes a deferred tensor."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and math.prod(args[0]) >= self._at_least:
            out = func(*args, **{**kwargs, "device": torch.device("meta")})
            self._remember(out)
            return out
        deferred = list(_deferred(args, kwargs))
        if not deferred and kwargs.get("device") != torch.device("meta"):
            return func(*args, **kwargs)
        return self._record(func, args, kwargs, deferred)

    def __enter__(self) -> Self:
        """Start to record."""
        _set_init({name: partial(self._looking, function) for name, function in _LOOKING.items()})
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop."""
        _set_init(_LOOKING)
        super().__exit__(*exception)

    def _looking(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not tensor.is_meta:
            return function(tensor, *args, **kwargs)
        self._record(function, (tensor, *args), kwargs, [tensor])
        return tensor

    def _record(self, func: Any, args: Any, kwargs: Any, deferred: list[Tensor]) -> Any:
        written = _written(func, args, kwargs)
        generator = None
        if func in _LOOKING.values() or torch.Tag.nondeterministic_seeded in func.tags:
            generator = torch.get_rng_state()
            self._move_generator_on(func, args, kwargs)
        frozen_args, frozen_kwargs = tree_map(self._frozen, (args, kwargs))
        out = func(*args, **kwargs)
        made = {}
        for place, tensor in enumerate(tree_leaves(out)):
            if isinstance(tensor, Tensor) and tensor.is_meta and self._is_new(tensor):
                self._remember(tensor)
                made[place] = self._view(tensor)
        if made or written:
            whole = bool(written) and func in _OVERWRITES and _is_whole(written[0])
            touched = {view.storage for view in made.values()} | {self._view(t).storage for t in written}
            reads = tuple({self._view(t).storage for t in deferred} - ({*touched} if whole else set()))
            step = _Step(self._count, func, frozen_args, frozen_kwargs, generator, made, reads, whole)
            self._count += 1
            for storage in touched:
                self._writers[storage].append(step)
        return out

    def _move_generator_on(self, func: Any, args: Any, kwargs: Any) -> None:
        """As if `func` had drawn: at once, or a piece at a time and thrown away where pieces draw the same."""
        target: Any = args[0] if args else None
        if func in FILLS and _in_order(target):
            words = words_drawn(func, target.numel()) if target.numel() >= _FEWEST_JUMPED else None
            if words is not None:
                torch.set_rng_state(moved_on(torch.get_rng_state(), words))
                return
            # One piece of memory for all: freed ones between the tape's small objects would never be given back.
            for piece in _pieces(target.view(-1)):
                func(self._piece[: len(piece)], *args[1:], **kwargs)
            return
        real_args, real_kwargs = tree_map(_scratch, (args, kwargs))
        func(*real_args, **real_kwargs)

    def _replay(self, step: _Step, real: dict[int, torch.UntypedStorage], *, alone: bool) -> None:
        args, kwargs = tree_map(lambda x: self._real(x, real) if isinstance(x, _View) else x, (step.args, step.kwargs))
        if step.generator is not None and not alone:
            torch.set_rng_state(step.generator)
        elif step.generator is not None and step.function is not _DIRAC:
            kwargs = kwargs | {"generator": torch.Generator().set_state(step.generator)}
        if step.function in FILLS and _in_order(args[0]):
            for piece in _pieces(args[0].view(-1)):
                step.function(piece, *args[1:], **kwargs)
            return
        out = step.function(*args, **kwargs)
        results = tree_leaves(out)
        for place, view in step.made.items():
            # Kernels lay out what they make as they like; later steps see it as the meta device did.
            base = self._real(view, real)
            base.copy_(results[place])

    def _real(self, view: _View, real: dict[int, torch.UntypedStorage]) -> Tensor:
        if view.storage not in real:
            real[view.storage] = torch.UntypedStorage(self._storages[view.storage].nbytes())
        base = torch.empty(0, dtype=view.dtype)
        return base.set_(real[view.storage], view.offset, view.shape, view.stride)

    def _frozen(self, value: Any) -> Any:
        """What the tape keeps of an argument: a place for a deferred tensor, a copy of a real one."""
        if not isinstance(value, Tensor):
            return _on_cpu(value)
        return self._view(value) if value.is_meta else value.detach().clone()

    def _view(self, tensor: Tensor) -> _View:
        key = tensor.untyped_storage()._cdata
        return _View(key, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _is_new(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata not in self._storages

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage
        self._writers.setdefault(storage._cdata, [])


def _in_order(target: Tensor) -> bool:
    """Whether a fill draws the same piece by piece.

    It takes one value per element, in order; normal_ works in groups of 16 and draws a last one anew.
    """
    return target.is_contiguous() and target.dtype == torch.float32


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    """A tensor in pieces that stay in the cache, the last one up to twice as large."""
    while len(flat) >= 2 * _CHUNK_ELEMENTS:
        yield flat[:_CHUNK_ELEMENTS]
        flat = flat[_CHUNK_ELEMENTS:]
    yield flat


def _takes_generator(function: Any) -> bool:
    """Whether a random operation draws by a generator that it is given, and by no other."""
    if function in _LOOKING.values():
        return function is not _LOOKING["sparse_"]
    return any(argument.name == "generator" for argument in function._schema.arguments)


@contextlib.contextmanager
def _shared_generator() -> Iterator[None]:
    """Inside, the process's generator is one thread's, and afterwards as it was."""
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        yield


def deferred_model(config: Any, seed: int) -> tuple[nn.Module, DeferredInit]:
    """`set_seed(seed)`, `AutoModel.from_config` in float32 with its large weights on the meta device; and their values.

    Raises:
        ArchitectureError: transformers cannot build it, or its initialisation looks at values of large weights.
    """
    import transformers

    transformers.set_seed(seed)
    with DeferredInit() as values:
        model = build_model(config)
    return model, values


def _deferred(args: Any, kwargs: Any) -> Iterator[Tensor]:
    return (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_meta)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The deferred tensors that `func` writes to, by its schema."""
    if func in _LOOKING.values():
        return [args[0]]
    written = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written += [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_meta]
    return written


def _set_init(functions: Mapping[str, Any]) -> None:
    """Have torch, and transformers which keeps torch's functions at hand, initialise by `functions`."""
    from transformers import initialization

    for name, function in functions.items():
        setattr(nn.init, name, function)
        if name in initialization.TORCH_INIT_FUNCTIONS:
            initialization.TORCH_INIT_FUNCTIONS[name] = function


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if value == torch.device("meta") else value


def _is_whole(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _scratch(value: Any) -> Any:
    """Memory of an argument's form, with nothing in it."""
    if isinstance(value, Tensor) and value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return _on_cpu(value)
