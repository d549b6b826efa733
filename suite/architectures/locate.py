"""Where the final norm of an architecture is: built from its configuration, found by what flows out of the model.

The model is built on the meta device and run once on a token or two: no weights, no arithmetic. The final norm is the
module whose output *is* the model's last hidden state (the same storage, seen through reshapes and cuts), provided the
kernel test says that it normalises. Names decide nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.suite.architectures.any_norm import is_norm_of_maps, may_be_a_norm, normalises
from deadbench.suite.architectures.build import SMALL_MODEL, build_model
from deadbench.suite.architectures.kernel_test import own_vectors, probe
from deadbench.suite.architectures.norms import FinalNorm, NormBehaviour
from deadbench.suite.architectures.parts import block_list
from deadbench.suite.architectures.shared_values import built_shared
from deadbench.suite.architectures.stored_names import naming
from deadbench.suite.errors import reason_of
from deadbench.suite.idle_threads import one_torch_thread
from deadbench.suite.tracing.flow import (
    Call,
    Passed,
    cuts,
    hears,
    recorded_calls,
    same_storage,
    stream_of,
    streams_held,
    zeros_drawn,
)
from deadbench.suite.tracing.meta_passes import quick_attempts
from deadbench.suite.tracing.minimal_inputs import minimal_inputs, placed
from deadbench.suite.tracing.smaller_pictures import empty_calls, smaller_pictures

Inputs = Mapping[str, Any]  # keyword arguments of a forward pass
_Bare = tuple[int, list[Call]]  # of a pass that gives no stream: which of the minimal inputs it took, and its calls

_TIMM = "timm_wrapper"
_LARGE_MODEL = 150_000_000  # parameters: with the libraries and a forward pass more than a gigabyte
_CUT_CANDIDATES = 40  # modules, last called first, among which a norm behind a projection is looked for
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
    size = sum(values.numel() for values in (*skeleton.parameters(), *skeleton.buffers()))
    if found.path is None and size <= SMALL_MODEL and next(minimal_inputs(whole, "cpu"), None) is not None:
        drawn = built_shared(config) if size > _LARGE_MODEL else None
        model = (drawn or build_model(config)).get_submodule(part)
        smaller = None if bare else smaller_pictures(whole, inputs)
        tried, concluded = search(model, smaller) if smaller else (None, None)
        rows = _rows_of(whole, inputs, tried) if tried and tried.path and inputs else 0
        # What a whole picture would say of the same modules, where these told anything.
        if tried and concluded is not None and (tried.path is None or rows):
            found = replace(tried, rows_per_item=rows)
        else:
            found, inputs, _ = _search(model, bare=bare)
    elif found.family == "none" and found.pooled is None:
        # On meta only identity is seen; a norm behind a copy or a projection would be missed.
        found = _nothing("undetermined", f"{found.reason}, and the model is too large to be tried", skeleton)
    return found.named(naming(skeleton)), inputs


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
    ways = quick_attempts(model)
    for (number, given), attempt in ((each, way) for each in enumerate(candidates) for way in ways):
        if bare and number == bare[0]:
            return _without_stream(model, bare[1]), given, None
        candidate = placed(given, model)
        try:
            with torch.no_grad(), attempt(), recorded_calls(model) as calls:
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
            return _without_stream(model, calls), given, (number, calls) if attempt is ways[0] else None
        if not stream.numel():  # a decoder that was given nothing to decode
            failure = failure or "the last hidden state is empty"
            continue
        found = _by_identity(model, calls, _before_head(model, calls, stream))
        if found is not None:
            return found, given, None
        if stream.device.type == "meta" or hears(model, candidate, stream):
            ended = _by_cutting(model, calls, candidate, stream)
            return replace(ended, pooled=_of_what_is_pooled(model, calls, stream, ended)), given, None
        failure, deaf = failure or "the last hidden state does not depend on them", True
    if deaf:
        with zeros_drawn(model) as heard:
            if heard:
                return _search(model, inputs, bare)
    return _nothing("undetermined", f"no minimal input was of use: {failure}", model), None, None


def found_in(model: Any, inputs: Inputs) -> FinalNorm:
    """The final norm of a module that lives, by its last hidden state or, where it returns none, by what it returns.

    Args:
        model: called with `inputs` by name; else an nn.Module.
        inputs: of its owner's, on its device.
    """
    with torch.no_grad(), recorded_calls(model) as calls:
        stream = stream_of(model(**inputs))
    if stream is None or not stream.is_floating_point() or not stream.numel():
        return _nothing("undetermined", "it returns no tensor", model)
    found = _by_identity(model, calls, stream)
    if found is not None:
        return found
    if not hears(model, inputs, stream):
        return _nothing("undetermined", "what it returns does not depend on the order of its input", model)
    owned = {path: module._parameters.values() for path, module in model.named_modules()}
    weighty = {path for path, own in owned.items() if any(p is not None and p.dim() > 1 for p in own)}
    return _by_cutting(model, [call for call in calls if call.path not in weighty], inputs, stream)


def _without_stream(model: nn.Module, calls: list[Call]) -> FinalNorm:
    """What is known of a model that says nowhere what its last hidden state is."""
    name = type(model).__name__
    modules = [(model.get_submodule(call.path), call.given) for call in calls]
    if not any(may_be_a_norm(module) and normalises(module, given) for module, given in modules):
        return _nothing("none", f"no module of {name} normalises", model)
    return _nothing("undetermined", f"{name} returns no last hidden state", model)


def _before_head(model: nn.Module, calls: list[Call], stream: Tensor) -> Tensor | Passed:
    """What the head was given where the stream is its logits, as of a language model inside one of pictures."""
    heads = [
        part.get_output_embeddings()
        for _, part in model.named_modules()
        if hasattr(part, "get_output_embeddings") and hasattr(part, "lm_head")
    ]
    for call in calls:
        is_head = any(model.get_submodule(call.path) is head for head in heads)
        if is_head and call.given is not None and same_storage(call.output, stream):
            return call.given
    return stream


def _by_identity(model: nn.Module, calls: list[Call], stream: Tensor | Passed) -> FinalNorm | None:
    """The norm whose output is the stream itself, seen through reshapes and cuts."""
    modules = dict(model.named_modules())
    for call in calls:
        module = modules[call.path]
        if not same_storage(call.output, stream) or not may_be_a_norm(module):
            continue
        behaviour = _behaviour(module, call.output)
        if behaviour.known:
            text = f"the output of {call.path} ({type(module).__name__}) is the model's last hidden state"
            return _found(model, call, calls, behaviour, text)
    return None


def _behaviour(module: nn.Module, output: Passed) -> NormBehaviour:
    """What `module`, which returned `output`, does along its last axis, or along channels ahead of positions."""
    behaviour = probe(module, output.shape[-1])
    if behaviour.family == "other" and output.ndim > 2 and own_vectors(module):
        mapped = probe(module, output.shape[1], axes_after=output.ndim - 2)
        return mapped if mapped.family != "other" else behaviour
    return behaviour


def _by_cutting(model: nn.Module, calls: list[Call], inputs: Mapping[str, Any], stream: Tensor) -> FinalNorm:
    """The last norm through which everything flows: with its output held fixed, the stream no longer hears the input.

    It must come after the last block, or end it: before the blocks everything flows through the embedding's norm too.
    """
    makers = [call.path for call in calls if same_storage(call.output, stream)]
    modules = dict(model.named_modules())
    maker = f"{makers[-1]} ({type(modules[makers[-1]]).__name__})" if makers else "an unnamed operation"
    nothing = _nothing("none", f"the last hidden state comes from {maker}, which is no normalisation", model)
    if stream.device.type == "meta":
        return nothing
    blocks_path, _ = block_list(model, makers[-1] if makers else None)
    last_block = max((i for i, call in enumerate(calls) if _is_block(call.path, blocks_path)), default=-1)
    inside_last = [call.path for call in calls if _is_block(call.path, blocks_path)][-1:]
    last_calls = {call.path: i for i, call in enumerate(calls)}
    for path in sorted(last_calls, key=lambda path: -last_calls[path])[:_CUT_CANDIDATES]:
        module, call = modules[path], calls[last_calls[path]]
        ends_block = any(path.startswith(f"{block}.") for block in inside_last)
        if not may_be_a_norm(module) or (last_calls[path] < last_block and not ends_block):
            continue
        behaviour = _behaviour(module, call.output)
        # A norm of maps inside a convolutional block is a convolution's own; one after the blocks is the stream's.
        of_another_kind = (
            not (ends_block and is_norm_of_maps(module)) and not behaviour.known and normalises(module, call.given)
        )
        if not (behaviour.known or of_another_kind) or not cuts(model, module, inputs, stream):
            continue
        if _normalised_again(model, calls[last_calls[path] + 1 :], path, inputs, stream):
            break
        through = f"the last hidden state depends on the input through {path} ({type(module).__name__})"
        if behaviour.known:
            return _found(model, call, calls, behaviour, f"{through} alone")
        reason = f"{through}, a normalisation that is neither LayerNorm nor RMSNorm"
        return _nothing("undetermined", reason, model)
    return nothing


def _of_what_is_pooled(model: nn.Module, calls: list[Call], stream: Tensor, found: FinalNorm) -> FinalNorm | None:
    """Of timm's models without a final norm: that of the one row which the head pools of an item, as it counts it."""
    if found.family != "none" or getattr(getattr(model, "config", None), "model_type", None) != _TIMM:
        return None
    last = max((i for i, call in enumerate(calls) if same_storage(call.output, stream)), default=len(calls))
    for call in calls[last + 1 :]:
        module = model.get_submodule(call.path)
        behaviour = _behaviour(module, call.output) if may_be_a_norm(module) else NormBehaviour("other")
        width = call.output.shape[1] if call.output.ndim > 1 else 0
        if behaviour.known and call.output.numel() == len(stream) * width:
            reason = (
                f"{call.path} normalises what is pooled of a picture, one row each, and is not read, which takes "
                f"{4 * width} pictures; {found.reason}"
            )
            text = f"the output of {call.path} ({type(module).__name__}), of what is pooled, is what the head is given"
            return replace(_found(model, call, calls, behaviour, text), placement="pre", reason=reason)
    return None


def _normalised_again(
    model: nn.Module, later: list[Call], path: str, inputs: Mapping[str, Any], stream: Tensor
) -> bool:
    """Whether the stream passes a normalisation of any kind after the last call of `path`, which is then not final."""
    modules = dict(model.named_modules())
    for call in {call.path: call for call in later if not path.startswith(f"{call.path}.")}.values():
        module = modules[call.path]
        if not may_be_a_norm(module):
            continue
        if not is_norm_of_maps(module) and not _behaviour(module, call.output).known:
            continue
        held = streams_held(model, module, [inputs])
        if held and (held[0] is None or held[0].shape != stream.shape or not torch.equal(held[0], stream)):
            return True
    return False


def _is_block(path: str, blocks_path: str | None) -> bool:
    return blocks_path is not None and path.rpartition(".")[0] == blocks_path


def _found(model: nn.Module, call: Call, calls: list[Call], behaviour: NormBehaviour, evidence: str) -> FinalNorm:
    _, num_blocks = block_list(model, call.path)
    width, rows = width_and_rows(call.output, behaviour)
    placement = "post" if _ends_a_block(call, calls) else "pre"
    return FinalNorm(call.path, behaviour, placement, width, num_blocks, rows, None, (evidence, *behaviour.evidence))


def width_and_rows(output: Tensor | Passed, behaviour: NormBehaviour) -> tuple[int, int]:
    """The width of a norm that returned `output`, and how many rows of that width one item has."""
    width = output.shape[1 if behaviour.axes_after else -1]
    return width, output.shape[1:].numel() // width if output.ndim > 2 else output.shape[0]


def _ends_a_block(call: Call, calls: list[Call]) -> bool:
    """Whether the norm is part of a block: inside an item of a list, and not what follows the blocks of a stage.

    After the blocks of a stage, what the norm is given is what the last of them returned; inside a block it is a sum.
    A norm that is an item itself (`norms.3`) belongs to the block of that number, by the same test.
    """
    if re.search(r"\.\d+$", call.path):
        return not any(re.search(r"\.\d+$", other.path) and same_storage(other.output, call.given) for other in calls)
    item = re.match(r"(.+\.)?\d+(?=\.)", call.path)
    if item is None:
        return False
    within = re.compile(re.escape(item[0]) + r"\..*\.\d+$")
    return not any(within.match(other.path) and same_storage(other.output, call.given) for other in calls)


def _nothing(family: str, reason: str, model: nn.Module) -> FinalNorm:
    _, num_blocks = block_list(model, None)
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    return FinalNorm(
        None, NormBehaviour(family), None, hidden if isinstance(hidden, int) else None, num_blocks, reason=reason
    )
