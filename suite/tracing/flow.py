"""What flows out of a model, and through which of its modules: outputs are held fixed, inputs are changed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_ZERO = 1e-6  # what is drawn to be trained is larger; some models start with matrices of zeros, or of 1e-10
_DRAWN = 0.02  # standard deviation

Way = Callable[[], contextlib.AbstractContextManager[None]]  # what a forward pass runs in
AS_IT_IS: Sequence[Way] = (contextlib.nullcontext, contextlib.nullcontext)


def stream_of(output: Any) -> Tensor | None:
    """The hidden states that a model is read at: the last, of the text tower where there are several."""
    if isinstance(output, tuple):
        return next((t for t in output if isinstance(t, Tensor)), None)
    last = getattr(output, "last_hidden_state", None)
    if isinstance(last, Tensor):
        return last
    if not isinstance(output, Mapping):
        return output if isinstance(output, Tensor) else None
    for key, value in output.items():
        if key.startswith(("text", "language")) and isinstance(value, Mapping) and stream_of(value) is not None:
            return stream_of(value)  # of a language model with its head, the logits
    towers = {key: value for key, value in output.items() if hasattr(value, "last_hidden_state")}
    for key in towers:
        if isinstance(towers[key].last_hidden_state, Tensor):
            return towers[key].last_hidden_state  # type: ignore[no-any-return]
    streams = {key: value for key, value in output.items() if _is_stream(value)}
    # What an encoder gave its decoder is the model's own state only where nothing came of it.
    streams = {key: value for key, value in streams.items() if not key.startswith("encoder")} or streams
    states = [value for key, value in streams.items() if key.endswith("last_hidden_state")]
    words = [value for key, value in streams.items() if key.startswith(("text", "language"))]
    maps = output.get("feature_maps") or ()  # of a backbone, stage by stage
    for found in (states, words, list(maps)[-1:], list(streams.values())):
        if len(found) == 1 or (found is words and words):
            only: Tensor = found[0]
            return only
    return None


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


class Passed:
    """A tensor that went into a module or came out of it, without its numbers: of a whole pass they are gigabytes.

    Its storage is referred to weakly: the numbers go with the last tensor that has them, and no later storage takes its
    place while this one is referred to.
    """

    def __init__(self, tensor: Tensor):
        self.shape, self.nbytes, self._dtype = tensor.shape, tensor.nbytes, tensor.dtype
        self.storage = StorageWeakRef(tensor.untyped_storage())

    @property
    def ndim(self) -> int:
        """As a tensor has it."""
        return len(self.shape)

    def numel(self) -> int:
        """As a tensor has it."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """As a tensor has it."""
        return self._dtype.is_floating_point


@dataclass(frozen=True)
class Call:
    """One call of a module: the first tensor that it was given, if any, and the one that it returned."""

    path: str
    given: Passed | None
    output: Passed


@contextlib.contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[Call]]:
    """Every module's calls that return a tensor, in their order."""
    calls: list[Call] = []

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            if isinstance(tensor, Tensor):
                given = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
                calls.append(Call(path, None if given is None else Passed(given), Passed(tensor)))

        return hook

    handles = [
        module.register_forward_hook(record(path), with_kwargs=True) for path, module in model.named_modules() if path
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def same_storage(a: Tensor | Passed | None, b: Tensor | Passed | None) -> bool:
    """Whether both are views of the same numbers."""
    return a is not None and b is not None and _place(a) == _place(b)


def _place(of: Tensor | Passed) -> int:
    return int(of.storage.cdata if isinstance(of, Passed) else of.untyped_storage()._cdata)


def cuts(
    model: nn.Module, module: nn.Module, inputs: Mapping[str, Any], stream: Tensor, ways: Sequence[Way] = AS_IT_IS
) -> bool:
    """Whether the stream forgets the input when the last output of `module` is held fixed."""
    streams = streams_held(model, module, [inputs, other_inputs(inputs)], ways)
    if not streams or any(s is None or s.shape != stream.shape for s in streams):
        return False
    return torch.equal(streams[0], streams[1])  # type: ignore[arg-type]


def streams_held(
    model: nn.Module, module: nn.Module, inputs: list[Mapping[str, Any]], ways: Sequence[Way] = AS_IT_IS
) -> list[Tensor | None]:
    """The streams that these inputs give while the output of `module` is held fixed; none where the model fails.

    Args:
        model, module: as they are called.
        inputs: keyword arguments, of each pass.
        ways: of each input, in what the pass runs.
    """
    fixed: list[Tensor] = []
    streams: list[Tensor | None] = []

    def hold(module: nn.Module, args: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        if not fixed or fixed[0].shape != tensor.shape:
            fixed[:] = [torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor)]
        held = fixed[0].clone()  # what is given it may write into it
        return (held, *output[1:]) if isinstance(output, tuple) else held

    handle = module.register_forward_hook(hold)
    try:
        for each, way in zip(inputs, ways, strict=False):
            with torch.no_grad(), way():
                streams.append(stream_of(model(**each)))
    except Exception:
        return []
    finally:
        handle.remove()
    return streams


def other_stream(model: nn.Module, inputs: Mapping[str, Any], stream: Tensor) -> Tensor | None:
    """The stream that other inputs give; None where it does not depend on their values, or holds no numbers."""
    try:
        with torch.no_grad():
            other = stream_of(model(**other_inputs(inputs)))
    except Exception:
        return None
    return other if other is not None and stream.isfinite().all() and not torch.equal(other, stream) else None


@contextlib.contextmanager
def zeros_drawn(model: nn.Module) -> Iterator[bool]:
    """Inside, the model's matrices of zeros are drawn from a normal law; they are put back. False if it has none.

    A model that starts with an empty codebook, or with blocks that add nothing, hears no input until it is trained.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    empty = [t.data for t in tensors.values() if t.ndim > 1 and t.is_floating_point() and _is_zero(t)]
    before = [tensor.clone() for tensor in empty]
    generator = torch.Generator().manual_seed(0)
    try:
        for tensor in empty:
            tensor.copy_(_DRAWN * torch.randn(tensor.shape, generator=generator))
        yield bool(empty)
    finally:
        for tensor, zeros in zip(empty, before, strict=True):
            tensor.copy_(zeros)


def _is_zero(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0 and bool((tensor.detach().abs() < _ZERO).all())


class Given(dict[str, Any]):
    """Inputs of their owner's: other ones are the same values in another order, since a new one may be out of range."""

    def others(self) -> dict[str, Any]:
        """The same values from the last position to the first; masks stay."""
        turned: dict[str, Any] = mapped(self, lambda n, v: v.flip(-1) if v.ndim and "mask" not in n else v)
        return turned


def mapped(value: Any, change: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """`value` with each tensor in it, in its dictionaries, lists and tuples too, changed; `change` is told their names.

    Example: `mapped(batch, lambda name, tensor: tensor.to(device))`
    """
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, Mapping):
        return {key: mapped(each, change, f"{name}.{key}".removeprefix(".")) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(each, change, f"{name}.{place}") for place, each in enumerate(value))
    return value


def tensors_of(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a batch by its name: of one in a dictionary that is an argument `batch.input_ids`."""
    found: dict[str, Tensor] = {}
    mapped(arguments, found.setdefault)
    return found


def other_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Other values of the same shapes: the next token, another picture; masks and grids stay."""
    if isinstance(inputs, Given):
        return inputs.others()
    other: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.flip(-1) + 0.5
        elif isinstance(value, Tensor) and name.endswith("input_ids"):
            value = value + 1
        other[name] = value
    return other
