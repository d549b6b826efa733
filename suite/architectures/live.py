"""Where the final norm and the blocks are in a module that lives: anyone's, wrapped as training wraps it.

Nothing is made up for it: it is run on what its owner gave, and what is changed is put back by whoever asks.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.suite.architectures.kernel_test import plain_copy, plain_type, probe
from deadbench.suite.architectures.last_norm import width_and_rows
from deadbench.suite.architectures.locate import found_in
from deadbench.suite.architectures.norms import FinalNorm, NormBehaviour
from deadbench.suite.architectures.parts import block_list
from deadbench.suite.architectures.stored_names import unwrapped
from deadbench.suite.errors import ArchitectureError, InputError
from deadbench.suite.tracing.flow import Given, stream_of

_SHARDED = "FSDPModule"  # of torch.distributed.fsdp: named, since importing it takes seconds


@dataclass(frozen=True)
class Sites:
    """Where a live module is looked at.

    Attributes:
        called: what is called with a batch: the module itself, or the part that is read where that can be called alone.
        part: the module in which `final` was found.
        final: the final norm by its path in `part`, without what wrappers leave in paths.
        norm: the module at that path, as it lives.
        plain: a copy of it with its whole parameters, on the CPU, without hooks.
        blocks: the blocks in their order.
    """

    called: nn.Module
    part: nn.Module
    final: FinalNorm
    norm: nn.Module
    plain: nn.Module
    blocks: list[nn.Module]


def inner(model: nn.Module) -> nn.Module:
    """The module that a compiled, parallel or data-parallel one wraps."""
    while True:
        below = dict(model.named_children())
        name = next((name for name in ("_orig_mod", "module") if len(below) == 1 and name in below), None)
        if name is None or not _is_wrapper(model):
            return model
        model = below[name]


def is_sharded(model: nn.Module) -> bool:
    """Whether torch's fully_shard has divided the parameters over ranks."""
    return any(_SHARDED in (kind.__name__ for kind in type(module).__mro__) for module in model.modules())


def is_replicated(model: nn.Module) -> bool:
    """Whether it is a DistributedDataParallel, compiled or not."""
    return any(type(module).__name__ == "DistributedDataParallel" for module in model.modules())


def part_read(model: nn.Module) -> nn.Module:
    """What is read of a module: of transformers' published models the body without its head; else all of it."""
    prefix = getattr(model, "base_model_prefix", None)
    body = getattr(model, prefix, None) if isinstance(prefix, str) and prefix else None
    return inner(body) if isinstance(body, nn.Module) and hasattr(model, "config") else model


def look_into(
    model: nn.Module,
    batch: Mapping[str, Any],
    final_norm: str | nn.Module | None = None,
    blocks: str | nn.Module | Sequence[nn.Module] | None = None,
) -> tuple[Sites, Tensor]:
    """Where `model` is read, found by running it on `batch`, and what its final norm returned there.

    Args:
        model: the module, of which `inner` has been taken.
        batch: arguments of one forward pass, on its device; a name of digits is a place.
        final_norm: the final norm, or its path; None: it is looked for by what flows out of the module.
        blocks: the blocks, the list that holds them or its path; None: those that the final norm ends or follows.

    Raises:
        ArchitectureError: there is no such module, or no final norm that can be told; it says what to give.
    """
    part, called = part_read(model), _called(model)
    seen = _Seen(called, part)
    inputs = Given(accepted(called, batch))
    paths = {path: module for path, module in part.named_modules() if path}
    if final_norm is None:
        final = found_in(seen, inputs)
        if final.path is None:
            raise ArchitectureError(
                f"{type(model).__name__}: the final norm cannot be told ({final.reason}); give final_norm, its path"
            )
        norm = paths[final.path]
    else:
        path, norm = named_module(final_norm, part, "final_norm")
        final = FinalNorm(path, NormBehaviour("undetermined"), None, None, None, evidence=("as told",))
    output = _output_of(seen, norm, inputs)
    if final_norm is not None:
        width = output.shape[-1]
        behaviour = probe(norm, width)
        if not behaviour.known:
            raise ArchitectureError(
                f"{final.path} ({type(norm).__name__}) is neither LayerNorm nor RMSNorm ({behaviour.evidence[-1]}); "
                "give final_norm, the path of another"
            )
        final = replace(final, behaviour=behaviour, hidden_size=width)
        final = replace(final, rows_per_item=width_and_rows(output, behaviour)[1])
    listed, placement = placement_of(part, str(final.path), norm, blocks)
    final = replace(
        final,
        path=unwrapped(str(final.path)),
        num_blocks=len(listed) or None,
        placement=final.placement if final_norm is None else placement,
    )
    return Sites(called, part, final, norm, plain_copy(norm), listed), output


def _called(model: nn.Module) -> nn.Module:
    """The part that is read where that can be called alone, else the whole."""
    return model if is_sharded(model) else part_read(model)


def accepted(called: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of `batch` the module takes; a cache is not asked for."""
    parameters = inspect.signature(called.forward).parameters
    every = any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    taken = {name: value for name, value in batch.items() if every or name.isdigit() or name in parameters}
    return taken | ({"use_cache": False} if "use_cache" in parameters and "use_cache" not in batch else {})


def call(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """`module` called with `arguments`, of which a name of digits is a place."""
    places, named = _places_and_names(arguments)
    return module(*places, **named)


def _places_and_names(arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    places = [arguments[name] for name in sorted((n for n in arguments if n.isdigit()), key=int)]
    return places, {name: value for name, value in arguments.items() if not name.isdigit()}


def check_taken(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raise InputError where `model` cannot be called with `batch`, whatever the values are; nothing is run."""
    called = _called(model)
    places, named = _places_and_names(accepted(called, batch))
    signature = inspect.signature(called.forward)
    try:
        signature.bind(*places, **named)
    except TypeError as error:
        took = ", ".join(str(parameter) for parameter in signature.parameters.values())
        raise InputError(
            f"{plain_type(called).__name__} cannot be called with a batch of {len(places)} places and the names "
            f"{', '.join(named) or 'none'} ({error}); it takes ({took}): give batches of these alone"
        ) from error


class _Seen:
    """The part that is read, as what is called and answers with what the part returned; all else is the part's own."""

    def __init__(self, called: nn.Module, part: nn.Module):
        self._called, self._part = called, part

    def __call__(self, **arguments: Any) -> Any:
        outputs: list[Any] = []
        handle = self._part.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            call(self._called, arguments)
        finally:
            handle.remove()
        return _told_apart(outputs[-1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def _told_apart(output: Any) -> Any:
    """What a module returns; of several, without a word which is its stream, the first that has rows."""
    several = list(output.values()) if isinstance(output, Mapping) else output
    if not isinstance(several, list | tuple) or (isinstance(output, Mapping) and stream_of(output) is not None):
        return output
    streams = (each for each in several if isinstance(each, Tensor) and each.is_floating_point() and each.ndim > 1)
    return next(streams, output)


def _output_of(seen: _Seen, norm: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = norm.register_forward_hook(keep)
    try:
        with torch.no_grad():
            seen(**inputs)
    finally:
        handle.remove()
    if not outputs:
        raise ArchitectureError("the final norm is not called by this input; give final_norm, the path of another")
    return outputs[-1]


def named_module(told: str | nn.Module, part: nn.Module, option: str) -> tuple[str, nn.Module]:
    """Path and module of what was told: a module, or its path with or without what wrappers leave in it."""
    modules = [(path, module) for path, module in part.named_modules(remove_duplicate=False) if path]
    for path, module in modules:
        if module is told or (isinstance(told, str) and (path == told or unwrapped(path) == unwrapped(told))):
            return path, module
    if isinstance(told, str):  # by its path in the whole model
        for path, module in modules:
            if unwrapped(told).endswith(f".{unwrapped(path)}"):
                return path, module
    what = repr(told) if isinstance(told, str) else f"that {type(told).__name__}"
    ends = ", ".join(unwrapped(path) for path, _ in modules if path.count(".") == 0)
    raise ArchitectureError(f"{option}: {type(part).__name__} has no module {what}; it has {ends}")


def placement_of(
    part: nn.Module, norm_path: str, norm: nn.Module, told: str | nn.Module | Sequence[nn.Module] | None
) -> tuple[list[nn.Module], str]:
    """The blocks, and whether the norm stands after them or ends the last."""
    if told is None:
        path, _ = block_list(part, norm_path)
        listed = list(part.get_submodule(path).children()) if path else []
    elif isinstance(told, str | nn.Module):
        listed = list(named_module(told, part, "blocks")[1].children())
    else:
        listed = list(told)
    inside = any(module is norm for block in listed for module in block.modules())
    return listed, "post" if inside else "pre"


def _is_wrapper(model: nn.Module) -> bool:
    return type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel")


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, compiled modules and torch's encoder layers run as they are written, and nothing is compiled.

    Without gradients torch runs its own encoder layers as one operation each, which calls no module inside, and drops
    what is padded on the way.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if "torch._dynamo" not in sys.modules:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
