"""Where the final norm of an architecture is: built from its configuration, found by what flows out of the model.

The model is built on the meta device and run once on a token or two: no weights, no arithmetic. The final norm is the
module whose output *is* the model's last hidden state (the same storage, seen through reshapes and cuts), provided the
kernel test says that it normalises; `last_norm.py` tells it from the calls of one pass. Names decide nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deadbench.suite.architectures.build import SMALL_MODEL, build_model
from deadbench.suite.architectures.last_norm import (
    before_head,
    by_cutting,
    by_identity,
    no_norm,
    of_what_is_pooled,
    width_and_rows,
    without_stream,
)
from deadbench.suite.architectures.norms import FinalNorm
from deadbench.suite.architectures.parts import streamed_paths
from deadbench.suite.architectures.shared_values import built_shared
from deadbench.suite.architectures.smaller_model import for_smaller_pictures
from deadbench.suite.architectures.stored_names import naming
from deadbench.suite.errors import reason_of
from deadbench.suite.idle_threads import one_torch_thread
from deadbench.suite.tracing.flow import Call, other_stream, recorded_calls, stream_of, zeros_drawn
from deadbench.suite.tracing.meta_passes import quick_attempts
from deadbench.suite.tracing.minimal_inputs import minimal_inputs, placed
from deadbench.suite.tracing.replay import kept_outputs, replay_of
from deadbench.suite.tracing.smaller_pictures import empty_calls, returns_much, smaller_pictures

Inputs = Mapping[str, Any]  # keyword arguments of a forward pass
_Bare = tuple[int, list[Call]]  # of a pass that gives no stream: which of the minimal inputs it took, and its calls

_LARGE_MODEL = 150_000_000  # parameters: with the libraries and a forward pass more than a gigabyte
# Of modules, in forward passes that fail, or as many as so many whole passes have: a model may refuse hundreds of
# inputs, each behind the blocks of its tower.
_FAILED_CALLS, _FAILED_PASSES = 12_000, 18


def locate_final_norm(config: Any, part: str = "") -> FinalNorm:
    """The final norm of the architecture that `config` describes, or of its module `part`, without any weights.

    First on the meta device. Some forward passes look at values, which meta tensors have not, and some norms are told
    only by values; those models are built on CPU where they are small.
    """
    return search_without_weights(build_model(config, "meta"), config, part)[0]


@one_torch_thread()
def search_without_weights(skeleton: nn.Module, config: Any, part: str) -> tuple[FinalNorm, Inputs | None]:
    """As `locate_final_norm`, of the model of `config` on the meta device; and the inputs, as `search` gives them."""
    whole = skeleton.get_submodule(part)
    found, inputs, bare = _search(whole)
    size = _numbers(skeleton)
    if found.path is None and size <= SMALL_MODEL and next(minimal_inputs(whole, "cpu"), None) is not None:
        told = None if bare else _by_smaller_pictures(skeleton, config, part, inputs)
        if told:
            found = told
        else:
            found, inputs, _ = _search(_with_values(config, skeleton).get_submodule(part), bare=bare)
    elif found.family == "none" and found.pooled is None:
        # On meta only identity is seen; a norm behind a copy or a projection would be missed.
        found = no_norm("undetermined", f"{found.reason}, and the model is too large to be tried", skeleton)
    return found.named(naming(skeleton)), inputs


def _by_smaller_pictures(skeleton: nn.Module, config: Any, part: str, inputs: Inputs | None) -> FinalNorm | None:
    """What smaller pictures tell of a model whose pass on `inputs` returns much; None where they tell nothing."""
    whole = skeleton.get_submodule(part)
    if inputs is None or not returns_much(whole, inputs):
        return None
    smaller = smaller_pictures(whole, inputs)
    if smaller is None:  # of the same architecture, laid out for smaller ones
        config = for_smaller_pictures(config, skeleton)
        if config is None:
            return None
    found, concluded = search(_with_values(config, skeleton).get_submodule(part), smaller)
    rows = _rows_of(whole, inputs, found) if found.path else 0
    # What a whole picture would say of the same modules, where these told anything.
    return replace(found, rows_per_item=rows) if concluded is not None and (found.path is None or rows) else None


def _with_values(config: Any, skeleton: nn.Module) -> nn.Module:
    """The model of `config` on the CPU; `skeleton` says how large it is."""
    return (built_shared(config) if _numbers(skeleton) > _LARGE_MODEL else None) or build_model(config)


def _numbers(model: nn.Module) -> int:
    return sum(values.numel() for values in (*model.parameters(), *model.buffers()))


def _rows_of(model: nn.Module, inputs: Inputs, norm: FinalNorm) -> int:
    """Rows that one item of whole pictures gives of a norm that was found on smaller ones; 0 where it is not known."""
    outputs = [call.output for call in empty_calls(model, inputs) if call.path == norm.path]
    return width_and_rows(outputs[-1], norm.behaviour)[1] if outputs else 0


def find_final_norm(model: nn.Module, inputs: Inputs | None = None) -> FinalNorm:
    """Run `model` once and find the norm that makes its last hidden state.

    Args:
        model: what `build_model` returns, on any device.
        inputs: keyword arguments of the forward pass; minimal dummy inputs, tried in turn, for None.
    """
    return search(model, inputs)[0]


def search(model: nn.Module, inputs: Inputs | None = None) -> tuple[FinalNorm, Inputs | None]:
    """As `find_final_norm`; and the inputs on which it ended, on the CPU, None if none was of use."""
    return _search(model, inputs)[:2]


def _search(
    model: nn.Module, inputs: Inputs | None = None, bare: _Bare | None = None
) -> tuple[FinalNorm, Inputs | None, _Bare | None]:
    """As `search`; and the pass that gave no stream, where it ended on one that asked no value of the model.

    With such a `bare` pass of the same model on the meta device, these inputs are not run on again: whether a stream
    comes out is the same, and of what the modules were given only the shapes count.
    """
    failure, deaf, failed_calls, longest = "", False, 0, 0
    candidates = minimal_inputs(model, "cpu") if inputs is None else iter([inputs])
    ways, blocks = quick_attempts(model), streamed_paths(model)
    for (number, given), attempt in ((each, way) for each in enumerate(candidates) for way in ways):
        if bare and number == bare[0]:
            return without_stream(model, bare[1]), given, None
        candidate = placed(given, model)
        try:
            with torch.no_grad(), attempt(), recorded_calls(model) as calls, kept_outputs(model, blocks) as kept:
                output = model(**candidate)
        except Exception as error:
            failure, failed_calls = failure or reason_of(error), failed_calls + len(calls)
            longest = max(longest, len(calls))
            if failed_calls > max(_FAILED_CALLS, _FAILED_PASSES * longest):
                break
            continue
        stream = stream_of(output)
        if stream is None and hasattr(output, "last_hidden_state"):  # it has one, but not of these inputs
            failure = failure or f"{type(model).__name__} returns no last hidden state of them"
            continue
        if stream is None:
            return without_stream(model, calls), given, (number, calls) if attempt is ways[0] else None
        if not stream.numel():  # a decoder that was given nothing to decode
            failure = failure or "the last hidden state is empty"
            continue
        found = by_identity(model, calls, before_head(model, calls, stream))
        if found is not None:
            return found, given, None
        replay = None if stream.is_meta else replay_of(model, calls, candidate, kept, stream)
        if stream.is_meta or replay:
            ended = by_cutting(model, calls, candidate, stream, replay)
            return replace(ended, pooled=of_what_is_pooled(model, calls, stream, ended)), given, None
        failure, deaf = failure or "the last hidden state does not depend on them", True
    if deaf:
        with zeros_drawn(model) as heard:
            if heard:
                return _search(model, inputs, bare)
    return no_norm("undetermined", f"no minimal input was of use: {failure}", model), None, None


def found_in(model: Any, inputs: Inputs) -> FinalNorm:
    """The final norm of a module that lives, by its last hidden state or, where it returns none, by what it returns.

    Args:
        model: called with `inputs` by name; else an nn.Module.
        inputs: of its owner's, on its device.
    """
    with torch.no_grad(), recorded_calls(model) as calls:
        stream = stream_of(model(**inputs))
    if stream is None or not stream.is_floating_point() or not stream.numel():
        return no_norm("undetermined", "it returns no tensor", model)
    found = by_identity(model, calls, stream)
    if found is not None:
        return found
    if other_stream(model, inputs, stream) is None:
        return no_norm("undetermined", "what it returns does not depend on the order of its input", model)
    owned = {path: module._parameters.values() for path, module in model.named_modules()}
    weighty = {path for path, own in owned.items() if any(p is not None and p.dim() > 1 for p in own)}
    return by_cutting(model, [call for call in calls if call.path not in weighty], inputs, stream)
