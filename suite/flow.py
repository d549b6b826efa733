"""What flows out of a model, and through which of its modules: outputs are held fixed, inputs are changed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def stream_of(output: Any) -> Tensor | None:
    """The hidden states that a model is read at: the last, of the text tower where there are several."""
    if isinstance(output, tuple):
        return next((t for t in output if isinstance(t, Tensor)), None)
    last = getattr(output, "last_hidden_state", None)
    if isinstance(last, Tensor):
        return last
    if not isinstance(output, Mapping):
        return output if isinstance(output, Tensor) else None
    towers = {key: value for key, value in output.items() if hasattr(value, "last_hidden_state")}
    for key in sorted(towers, key=lambda key: not key.startswith(("text", "language"))):
        if isinstance(towers[key].last_hidden_state, Tensor):
            return towers[key].last_hidden_state  # type: ignore[no-any-return]
    states = [value for key, value in output.items() if key.endswith("last_hidden_state") and isinstance(value, Tensor)]
    words = [value for key, value in output.items() if key.startswith(("text", "language")) and _is_stream(value)]
    if len(states) == 1 or words:
        return (states if len(states) == 1 else words)[0]
    tensors = [value for value in output.values() if _is_stream(value)]
    return tensors[0] if len(tensors) == 1 else None


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


def cuts(model: nn.Module, module: nn.Module, inputs: Mapping[str, Any], stream: Tensor) -> bool:
    """Whether the stream forgets the input when the last output of `module` is held fixed."""
    streams = streams_held(model, module, [inputs, other_inputs(inputs)])
    if not streams or any(s is None or s.shape != stream.shape for s in streams):
        return False
    return torch.equal(streams[0], streams[1])  # type: ignore[arg-type]


def streams_held(model: nn.Module, module: nn.Module, inputs: list[Mapping[str, Any]]) -> list[Tensor | None]:
    """The streams that these inputs give while the output of `module` is held fixed; none where the model fails."""
    fixed: list[Tensor] = []

    def hold(module: nn.Module, args: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        if not fixed or fixed[0].shape != tensor.shape:
            fixed[:] = [torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor)]
        return (fixed[0], *output[1:]) if isinstance(output, tuple) else fixed[0]

    handle = module.register_forward_hook(hold)
    try:
        with torch.no_grad():
            return [stream_of(model(**each)) for each in inputs]
    except Exception:
        return []
    finally:
        handle.remove()


def hears(model: nn.Module, inputs: Mapping[str, Any], stream: Tensor) -> bool:
    """Whether the stream depends on the input's values, and is told apart from one that holds no numbers."""
    try:
        with torch.no_grad():
            other = stream_of(model(**other_inputs(inputs)))
    except Exception:
        return False
    return other is not None and bool(stream.isfinite().all()) and not torch.equal(other, stream)


def other_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Other values of the same shapes: the next token, another picture; masks and grids stay."""
    other: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.flip(-1) + 0.5
        elif isinstance(value, Tensor) and name.endswith("input_ids"):
            value = value + 1
        other[name] = value
    return other
