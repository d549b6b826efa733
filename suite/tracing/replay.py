"""Blocks that give again what they gave before: to run a deep model to its end costs its last block alone.

The search for the last norm runs a model over and over on two inputs, with another of its last modules held fixed each
time. What comes ahead of that module stays the same, and is nine tenths of the work.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.suite.tracing.flow import Call, Way, other_inputs, other_stream, stream_of

_KEPT_BYTES = 2**27  # of outputs, in one pass


@dataclass
class Kept:
    """What the blocks of a model gave in one pass, by their paths and in order; none of it where it is too much."""

    paths: Sequence[str]
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    nbytes: int = 0

    def put(self, path: str, output: Any) -> None:
        """Keep one output more."""
        copied = _copied(output)
        self.nbytes += sum(each.nbytes for each in _tensors(copied))
        if self.nbytes > _KEPT_BYTES:
            self.outputs.clear()
        else:
            self.outputs.setdefault(path, []).append(copied)


@contextlib.contextmanager
def kept_outputs(model: nn.Module, blocks: Sequence[str]) -> Iterator[Kept]:
    """Inside, what the modules at `blocks` give is kept; nothing on the meta device, which computes nothing."""
    kept = Kept(blocks)
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, args, output, path=path: kept.put(path, output))
        for path in ([] if next(model.parameters()).is_meta else blocks)
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


class Replay:
    """Runs of `model` that compute only what comes after the blocks that have ended when a module is first called.

    Args:
        model: in which nothing is drawn at random.
        calls: of a pass on the first of its inputs.
        passes: of each input, the input, what the blocks gave, and the stream that came out.
    """

    def __init__(self, model: nn.Module, calls: list[Call], passes: Sequence[tuple[Mapping[str, Any], Kept, Tensor]]):
        self._model, self._passes = model, passes
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        for number, call in enumerate(calls):
            self._first.setdefault(call.path, number)
            self._last[call.path] = number
        self._sound: dict[frozenset[str], bool] = {}

    def ways(self, path: str) -> list[Way]:
        """For each input, the way to run the model on it while the output of the module at `path` is held fixed.

        What is given again must lead to the very same streams; else all is computed.
        """
        ended = self._last.items() if path in self._first else ()
        ahead = frozenset(
            block
            for block, last in ended
            if last < self._first[path] and all(block in kept.outputs for _, kept, _ in self._passes)
        )
        ways: list[Way] = [partial(_given_again, self._model, kept, ahead) for _, kept, _ in self._passes]
        if ahead not in self._sound:
            self._sound[ahead] = bool(ahead) and self._same_streams(ways)
        return ways if self._sound[ahead] else [contextlib.nullcontext for _ in ways]

    def _same_streams(self, ways: list[Way]) -> bool:
        for way, (inputs, _, stream) in zip(ways, self._passes, strict=True):
            try:
                with torch.no_grad(), way():
                    again = stream_of(self._model(**inputs))
            except Exception:  # whatever a stranger's code raises
                return False
            if again is None or not torch.equal(again, stream):
                return False
        return True


def replay_of(
    model: nn.Module, calls: list[Call], inputs: Mapping[str, Any], kept: Kept, stream: Tensor
) -> Replay | None:
    """Of a pass on `inputs` and one on other values of the same shapes; None where the stream does not depend on these.

    Args:
        model: not on the meta device.
        calls, kept, stream: of the pass on `inputs`: what was called, what the blocks gave, and what came out.
        inputs: keyword arguments.
    """
    with kept_outputs(model, kept.paths) as of_others:
        other = other_stream(model, inputs, stream)
    if other is None:
        return None
    return Replay(model, calls, [(inputs, kept, stream), (other_inputs(inputs), of_others, other)])


@contextlib.contextmanager
def _given_again(model: nn.Module, kept: Kept, paths: frozenset[str]) -> Iterator[None]:
    """Inside, the modules at `paths` give copies of what they gave, and compute nothing."""
    modules = {path: model.get_submodule(path) for path in paths}
    own = {path: vars(module)["forward"] for path, module in modules.items() if "forward" in vars(module)}
    for path, module in modules.items():
        module.forward = partial(_next, iter(kept.outputs[path]))
    try:
        yield
    finally:
        for path, module in modules.items():
            if path in own:
                module.forward = own[path]
            else:
                del module.forward


def _next(outputs: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
    for output in outputs:
        return _copied(output)
    raise RuntimeError("a block is called more often than before")


def _copied(output: Any) -> Any:
    """With tensors of its own: who is given them may write into them."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copied, output)) if type(output) is tuple else output


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [each for part in output for each in _tensors(part)] if type(output) is tuple else []
