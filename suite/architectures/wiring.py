"""Which linear maps read a norm, and which parameters write to a stream that only LayerNorms read.

The model runs once on a minimal input, on the meta device where it can, and every operation is followed. Two facts
travel with a tensor: the norm whose output it *is* (through views, cuts and casts), and the parameters whose shift
along the vector of ones it would pass on (through sums and scalings too). An operation that is not known to keep a fact
ends it, so what is left is certain; what is missed makes the count of dead directions smaller, never larger.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from deadbench.suite.architectures.kernel_test import own_vectors, probe
from deadbench.suite.architectures.norms import NormBehaviour
from deadbench.suite.tracing.meta_passes import attempts
from deadbench.suite.tracing.minimal_inputs import running_inputs, takes_large

# Operations of which the last axis comes out as it went in; where an axis is named, it must not be the last.
_VIEWS = {
    "alias", "clone", "detach", "lift_fresh", "_to_copy", "view", "_unsafe_view", "_reshape_alias", "expand", "slice",
    "select", "split", "split_with_sizes", "transpose", "permute", "unsqueeze", "squeeze", "contiguous",
}  # fmt: skip
_AXIS_ARGUMENT = {"slice": 1, "select": 1, "split": 2, "split_with_sizes": 2}
_SUMS = {"add", "sub", "cat"}
_SCALINGS = {"mul", "div"}
_SHAPE_ONLY = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}


@dataclass(frozen=True)
class Wiring:
    """What `trace` found, by module path in the traced model.

    Attributes:
        norms: behaviour and width of every LayerNorm and RMSNorm that was called, in call order.
        reads: linear map -> the norm that feeds every one of its calls.
        writes: linear map, embedding, norm or parameter -> the first LayerNorm that reads its shift along 1; only
            those whose shift nothing else reads.
    """

    norms: dict[str, tuple[NormBehaviour, int]]
    reads: dict[str, str]
    writes: dict[str, str]


@dataclass
class _Facts:
    """What is known of one tensor, which is held so that its identity stays its own."""

    tensor: Tensor
    norm: str | None = None
    writers: frozenset[str] = frozenset()


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes `x W^T + b` from its own weight: `nn.Linear`, or the transposed `Conv1D` of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or (isinstance(module, Conv1D) and type(module).forward is Conv1D.forward)


def weight_out_in(module: nn.Module) -> Tensor:
    """The weight of a linear map as (out_features, in_features), a view of the parameter itself."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight if isinstance(module, nn.Linear) else weight.T


def private_parameters(model: nn.Module) -> set[int]:
    """Identities of the trainable parameters that exactly one module owns: tied matrices are not among them."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {id(p) for p in model.parameters() if owners[id(p)] == 1 and p.requires_grad}


def trace(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Wiring:
    """Run `model` once on `inputs` (a minimal input for None) and follow what its norms and linear maps are fed.

    Raises:
        Exception: whatever the forward pass raises; some passes cannot run on the meta device.
    """
    inputs = running_inputs(model) if inputs is None else inputs
    follower = _Follower(model)
    # Each operation must be seen with the tensors that the modules see: no autograd in between.
    with torch.no_grad(), follower.watching(), follower:
        output = model(**inputs)
        follower.end(output)
    reads = {}
    for path, norms in follower.fed_by.items():
        (norm,) = norms if len(norms) == 1 else (None,)
        if norm is not None and path not in follower.used_past_module:
            reads[path] = norm
    void = follower.void | follower.used_past_module
    return Wiring(follower.norms, reads, {path: n for path, n in follower.first_reader.items() if path not in void})


def trace_empty(model: nn.Module) -> Wiring:
    """`trace` on the meta device; what a model of films asks of its values is answered by rote, that of no other.

    What is followed is kept, and of films it would be gigabytes on the CPU.

    Raises:
        Exception: as `trace`.
    """
    *others, last = attempts(model) if takes_large(model) else [contextlib.nullcontext]
    for attempt in others:
        with contextlib.suppress(Exception), attempt():
            return trace(model)
    with last():
        return trace(model)


@dataclass
class _Follower(TorchDispatchMode):
    model: nn.Module
    facts: dict[int, _Facts] = field(default_factory=dict)
    norms: dict[str, tuple[NormBehaviour, int]] = field(default_factory=dict)
    fed_by: dict[str, set[str | None]] = field(default_factory=dict)
    first_reader: dict[str, str] = field(default_factory=dict)
    void: set[str] = field(default_factory=set)  # writers whose shift something else reads
    used_past_module: set[str] = field(default_factory=set)  # modules whose weight is used without calling them

    def __post_init__(self) -> None:
        super().__init__()
        self._calls: list[str | None] = []  # the watched modules that are running: linear, a norm's family, or None
        self._inside = 0  # how many of them are known as a whole: their own operations are not followed
        self._probed: dict[tuple[Any, ...], NormBehaviour] = {}
        self._owner: dict[int, str] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every module that is known as a whole, and the facts of the parameters that no such module owns."""
        handles = []
        for path, module in self.model.named_modules():
            if is_linear(module) or isinstance(module, nn.Embedding) or self._may_be_norm(module):
                handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave(path), with_kwargs=True))
                self._owner |= {id(p): path for p in module.parameters(recurse=False)}
        for path, parameter in self.model.named_parameters():
            if id(parameter) not in self._owner:
                self.facts[id(parameter)] = _Facts(parameter, None, frozenset({path}))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self._inside:
            self._follow(func, args, kwargs, output)
        return output

    def end(self, output: Any) -> None:
        """What leaves the model is read by whoever called it."""
        self._void(pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output))

    def _follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.used_past_module |= {self._owner[id(t)] for t in tensors if id(t) in self._owner}
        known = [self.facts[id(t)] for t in tensors if id(t) in self.facts]
        name = func.overloadpacket.__name__
        if not known or name in _SHAPE_ONLY:
            return
        if func._schema.is_mutable:
            self._void([t.tensor for t in known])
            return
        outputs = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        if name in _VIEWS and len(known) == 1 and _keeps_last_axis(name, args, outputs):
            for each in outputs:
                self.facts[id(each)] = _Facts(each, known[0].norm, known[0].writers)
        elif _passes_a_shift(name, args, kwargs, known, outputs[0]):
            writers = frozenset().union(*(facts.writers for facts in known))
            self.facts[id(outputs[0])] = _Facts(outputs[0], None, writers)
        else:
            self._void(tensors)

    def _void(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            if id(tensor) in self.facts:
                self.void |= self.facts[id(tensor)].writers

    def _may_be_norm(self, module: nn.Module) -> bool:
        bare = not any(True for _ in module.children())
        return bare and all(p.dim() == 1 for p in module.parameters()) and not isinstance(module, nn.Dropout)

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = args[0] if args and isinstance(args[0], Tensor) else None
            kind = "linear" if is_linear(module) else "embedding" if isinstance(module, nn.Embedding) else None
            if kind is None and given is not None and not self._inside:
                kind = self._family(path, module, given)
            self._calls.append(kind)
            self._inside += kind is not None

        return hook

    def _leave(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            kind = self._calls.pop()
            self._inside -= kind is not None
            if self._inside or kind is None:
                return
            known = self.facts.get(id(args[0])) if args else None
            if kind == "linear":
                self.fed_by.setdefault(path, set()).add(known.norm if known else None)
            if kind == "layernorm" and known is not None:
                for writer in known.writers:
                    self.first_reader.setdefault(writer, path)
            self._void(pytree.tree_leaves((args[1:] if kind == "layernorm" else args, kwargs)))
            result = output[0] if isinstance(output, tuple) else output
            norm = path if kind in ("layernorm", "rmsnorm") else None
            self.facts[id(result)] = _Facts(result, norm, frozenset({path}))

        return hook

    def _family(self, path: str, module: nn.Module, given: Tensor) -> str | None:
        """layernorm or rmsnorm where `module` is one, on the last axis of what it is given; else None."""
        if not given.is_floating_point() or given.ndim == 0:
            return None
        D = given.shape[-1]
        kind = (type(module), D, tuple(own_vectors(module)))
        if kind not in self._probed:
            with _disable_current_modes():  # the probe's own arithmetic is no part of the model's
                self._probed[kind] = probe(module, D)
        behaviour = self._probed[kind]
        if not behaviour.known:
            return None
        self.norms.setdefault(path, (behaviour, D))
        return behaviour.family


def _keeps_last_axis(name: str, args: Any, outputs: list[Tensor]) -> bool:
    """Whether every output's last axis is the input's, whole and in order."""
    given: Tensor = args[0]
    last = given.ndim - 1
    if any(each.ndim == 0 or each.shape[-1] != given.shape[-1] for each in outputs):
        return False
    if name == "transpose":
        return all(axis % given.ndim != last for axis in args[1:3])
    if name == "permute":
        return bool(args[1][-1] % given.ndim == last)
    if name == "unsqueeze":
        return bool(args[1] % (given.ndim + 1) != given.ndim)
    if name in _AXIS_ARGUMENT and name != "slice":
        position = _AXIS_ARGUMENT[name]
        return (args[position] if len(args) > position else 0) % given.ndim != last
    if name == "slice":  # a slice of the last axis that keeps its length is the whole axis, if its step is one
        return len(args) < 2 or args[1] % given.ndim != last or len(args) < 5 or args[4] == 1
    return True


def _passes_a_shift(name: str, args: Any, kwargs: Any, known: list[_Facts], output: Tensor) -> bool:
    """Whether a shift along 1 of the known tensors comes out as a shift along 1 (of any size at each position)."""
    D = output.shape[-1] if output.ndim else 0
    if name not in _SUMS | _SCALINGS or any(f.tensor.ndim == 0 or f.tensor.shape[-1] != D for f in known):
        return False
    if name == "cat":
        axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return bool(axis % output.ndim != output.ndim - 1)
    if name in _SUMS:
        return True
    other = args[1]
    free = not isinstance(other, Tensor) or other.ndim == 0 or other.shape[-1] == 1
    return free and len(known) == 1 and known[0].tensor is args[0] and D > 1
