"""Which module made the last hidden state of one forward pass, by what flowed through its modules."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.suite.architectures.any_norm import is_norm_of_maps, may_be_a_norm, normalises
from deadbench.suite.architectures.kernel_test import own_vectors, probe
from deadbench.suite.architectures.norms import FinalNorm, NormBehaviour
from deadbench.suite.architectures.parts import block_list
from deadbench.suite.tracing.flow import AS_IT_IS, Call, Passed, Way, cuts, same_storage, streams_held
from deadbench.suite.tracing.replay import Replay

_TIMM = "timm_wrapper"
_CUT_CANDIDATES = 40  # modules, last called first, among which a norm behind a projection is looked for


def without_stream(model: nn.Module, calls: list[Call]) -> FinalNorm:
    """What is known of a model that says nowhere what its last hidden state is."""
    name = type(model).__name__
    modules = [(model.get_submodule(call.path), call.given) for call in calls]
    if not any(may_be_a_norm(module) and normalises(module, given) for module, given in modules):
        return no_norm("none", f"no module of {name} normalises", model)
    return no_norm("undetermined", f"{name} returns no last hidden state", model)


def before_head(model: nn.Module, calls: list[Call], stream: Tensor) -> Tensor | Passed:
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


def by_identity(model: nn.Module, calls: list[Call], stream: Tensor | Passed) -> FinalNorm | None:
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


def by_cutting(
    model: nn.Module, calls: list[Call], inputs: Mapping[str, Any], stream: Tensor, replay: Replay | None = None
) -> FinalNorm:
    """The last norm through which everything flows: with its output held fixed, the stream no longer hears the input.

    It must come after the last block, or end it: before the blocks everything flows through the embedding's norm too.

    Args:
        model, calls: and its calls in a pass on `inputs`, which gave `stream`.
        inputs, stream: of that pass.
        replay: of that pass and of one on the other inputs; all is computed anew without.
    """
    makers = [call.path for call in calls if same_storage(call.output, stream)]
    modules = dict(model.named_modules())
    maker = f"{makers[-1]} ({type(modules[makers[-1]]).__name__})" if makers else "an unnamed operation"
    nothing = no_norm("none", f"the last hidden state comes from {maker}, which is no normalisation", model)
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
        if not (behaviour.known or of_another_kind) or not cuts(model, module, inputs, stream, _ways(replay, path)):
            continue
        if _normalised_again(model, calls[last_calls[path] + 1 :], path, inputs, stream, replay):
            break
        through = f"the last hidden state depends on the input through {path} ({type(module).__name__})"
        if behaviour.known:
            return _found(model, call, calls, behaviour, f"{through} alone")
        reason = f"{through}, a normalisation that is neither LayerNorm nor RMSNorm"
        return no_norm("undetermined", reason, model)
    return nothing


def of_what_is_pooled(model: nn.Module, calls: list[Call], stream: Tensor, found: FinalNorm) -> FinalNorm | None:
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


def _ways(replay: Replay | None, path: str) -> Sequence[Way]:
    return replay.ways(path) if replay else AS_IT_IS


def _normalised_again(
    model: nn.Module,
    later: list[Call],
    path: str,
    inputs: Mapping[str, Any],
    stream: Tensor,
    replay: Replay | None,
) -> bool:
    """Whether the stream passes a normalisation of any kind after the last call of `path`, which is then not final."""
    modules = dict(model.named_modules())
    for call in {call.path: call for call in later if not path.startswith(f"{call.path}.")}.values():
        module = modules[call.path]
        if not may_be_a_norm(module):
            continue
        if not is_norm_of_maps(module) and not _behaviour(module, call.output).known:
            continue
        held = streams_held(model, module, [inputs], _ways(replay, call.path))
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


def no_norm(family: str, reason: str, model: nn.Module) -> FinalNorm:
    """That `model` has none (`none`), or that nothing is known of it (`undetermined`), and why."""
    _, num_blocks = block_list(model, None)
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    return FinalNorm(
        None, NormBehaviour(family), None, hidden if isinstance(hidden, int) else None, num_blocks, reason=reason
    )
