"""Where the final norm of an architecture is: built from its configuration, found by what flows out of the model.

The model is built on the meta device and run once on a token or two: no weights, no arithmetic. The final norm is the
module whose output *is* the model's last hidden state (the same storage, seen through reshapes and cuts), provided the
kernel test says that it normalises. Names decide nothing.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from suite.dummy_inputs import minimal_inputs
from suite.flow import Call, cuts, hears, recorded_calls, same_storage, stream_of, streams_held, without_zeros
from suite.norms import is_norm_of_maps, normalises, own_vectors, probe
from suite.renaming import renamings
from suite.resolution import ArchitectureError, FinalNorm, NormBehaviour, RemoteCodeError
from suite.valueless import attempts

SMALL_MODEL = 500_000_000  # parameters: 2 GB in float32, a few seconds to draw
_CUT_CANDIDATES = 40  # modules, last called first, among which a norm behind a projection is looked for

OBJECTIVES = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForPreTraining": "pretraining",
    "ForConditionalGeneration": "conditional",
    "ForImageClassification": "classification",
    "ForSequenceClassification": "classification",
    "ForMaskedImageModeling": "masked",
    "ForCTC": "ctc",
    "SentenceTransformer": "contrastive",
    "CLIPModel": "contrastive",
}


def build_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object from the contents of a config.json.

    Raises:
        ArchitectureError: no model_type, one that the installed transformers does not know, or remote code.
    """
    import transformers

    known = dict(config)
    model_type = known.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ArchitectureError("the configuration has no model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        if known.get("auto_map"):
            raise RemoteCodeError(f"model_type {model_type!r} needs code from the checkpoint, which is never run")
        raise ArchitectureError(f"model_type {model_type!r} is unknown to transformers {transformers.__version__}")
    known.pop("auto_map", None)
    known.pop("return_dict", None)  # outputs are read by name, however the checkpoint's author had them
    known.pop("quantization_config", None)  # weights are not loaded by this object; norms are stored plain
    try:
        return transformers.AutoConfig.for_model(model_type, **known)
    except Exception as error:
        raise ArchitectureError(f"transformers refuses the configuration: {_one_line(error)}") from error


def build_model(config: Any, device: str = "cpu") -> nn.Module:
    """The bare model (`AutoModel`) of `config` in float32, randomly initialised by transformers; on `meta`, empty.

    The published architecture takes its place where `AutoModel` cannot build one.

    Raises:
        ArchitectureError: transformers has no model for it or refuses to build it.
    """
    import transformers

    try:
        with torch.device(device):
            # eager experts: the grouped kernels refuse meta tensors and half of all dtypes
            model: nn.Module = transformers.AutoModel.from_config(
                config, dtype=torch.float32, experts_implementation="eager"
            )
    except Exception as error:
        if published_class(config) is not None:
            return build_published(config, device)
        raise ArchitectureError(f"transformers cannot build {config.model_type!r}: {_one_line(error)}") from error
    return model.eval()


def published_class(config: Any) -> Any:
    """transformers' class of the published architecture (`config.architectures[0]`), heads included, or None."""
    import transformers

    names = (name for name in config.architectures or () if isinstance(name, str))
    return next((found for name in names if (found := getattr(transformers, name, None)) is not None), None)


def build_published(config: Any, device: str = "cpu") -> nn.Module:
    """The published architecture of `config` with its heads, as `build_model` builds; the bare model if it has none.

    Raises:
        ArchitectureError: transformers refuses to build it.
    """
    published = published_class(config)
    if published is None:
        return build_model(config, device)
    try:
        with torch.device(device):
            model: nn.Module = published._from_config(config, dtype=torch.float32, experts_implementation="eager")
    except Exception as error:
        raise ArchitectureError(f"transformers cannot build {published.__name__}: {_one_line(error)}") from error
    return model.eval()


def count_parameters(config: Any) -> int:
    """Unique parameters of the published architecture (`config.architectures[0]`), heads included, ties once."""
    return sum(p.numel() for p in build_published(config, "meta").parameters())


def objective(config: Mapping[str, Any]) -> str | None:
    """What the published model class is trained for, as its name in config.json's `architectures` says; else None."""
    for name in config.get("architectures") or ():
        for ending, meaning in OBJECTIVES.items():
            if str(name).endswith(ending):
                return meaning
    return None


def locate_final_norm(config: Any, part: str = "") -> FinalNorm:
    """The final norm of the architecture that `config` describes, or of its module `part`, without any weights.

    First on the meta device. Some forward passes look at values, which meta tensors have not, and some norms are told
    only by values; those models are built on CPU where they are small.
    """
    model = build_model(config, "meta")
    found = find_final_norm(model.get_submodule(part))
    if found.path is None and sum(p.numel() for p in model.parameters()) <= SMALL_MODEL:
        found = find_final_norm(build_model(config).get_submodule(part))
    elif found.family == "none":
        # On meta only identity is seen; a norm behind a copy or a projection would be missed.
        found = _nothing("undetermined", f"{found.reason}, and the model is too large to be tried", model)
    return replace(found, renamings=renamings(model))


def find_final_norm(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> FinalNorm:
    """Run `model` once and find the norm that makes its last hidden state.

    Args:
        model: what `build_model` returns, on any device.
        inputs: keyword arguments of the forward pass; minimal dummy inputs, tried in turn, for None.
    """
    failure, deaf = "", False
    candidates = minimal_inputs(model) if inputs is None else [inputs]
    for candidate, attempt in itertools.product(candidates, attempts(model)):
        try:
            with torch.no_grad(), attempt(), recorded_calls(model) as calls:
                output = model(**candidate)
        except Exception as error:
            failure = failure or _one_line(error)
            continue
        stream = stream_of(output)
        if stream is None and hasattr(output, "last_hidden_state"):  # it has one, but not of these inputs
            failure = failure or f"{type(model).__name__} returns no last hidden state of them"
            continue
        if stream is None:
            return _without_stream(model, calls)
        if not stream.numel():  # a decoder that was given nothing to decode
            failure = failure or "the last hidden state is empty"
            continue
        found = _by_identity(model, calls, stream)
        if found is not None:
            return found
        if stream.device.type == "meta" or hears(model, candidate, stream):
            return _by_cutting(model, calls, candidate, stream)
        failure, deaf = failure or "the last hidden state does not depend on them", True
    drawn = without_zeros(model) if deaf else None
    if drawn is not None:
        return find_final_norm(drawn, inputs)
    return _nothing("undetermined", f"no minimal input was of use: {failure}", model)


def _without_stream(model: nn.Module, calls: list[Call]) -> FinalNorm:
    """What is known of a model that says nowhere what its last hidden state is."""
    name = type(model).__name__
    modules = [(model.get_submodule(call.path), call.given) for call in calls]
    if not any(_may_be_a_norm(module) and normalises(module, given) for module, given in modules):
        return _nothing("none", f"no module of {name} normalises", model)
    return _nothing("undetermined", f"{name} returns no last hidden state", model)


def _by_identity(model: nn.Module, calls: list[Call], stream: Tensor) -> FinalNorm | None:
    """The norm whose output is the stream itself, seen through reshapes and cuts."""
    modules = dict(model.named_modules())
    for call in calls:
        module = modules[call.path]
        if not same_storage(call.output, stream) or not _may_be_a_norm(module):
            continue
        behaviour = _behaviour(module, call.output)
        if behaviour.known:
            text = f"the output of {call.path} ({type(module).__name__}) is the model's last hidden state"
            return _found(model, call, calls, behaviour, text)
    return None


def _may_be_a_norm(module: nn.Module) -> bool:
    """Whether it is worth a probe: it holds no other modules, or vectors of its own beside them."""
    return bool(own_vectors(module)) or not any(True for _ in module.children())


def _behaviour(module: nn.Module, output: Tensor) -> NormBehaviour:
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
    blocks_path, _num_blocks = block_list(model, makers[-1] if makers else None)
    last_block = max((i for i, call in enumerate(calls) if _is_block(call.path, blocks_path)), default=-1)
    inside_last = [call.path for call in calls if _is_block(call.path, blocks_path)][-1:]
    last_calls = {call.path: i for i, call in enumerate(calls)}
    for path in sorted(last_calls, key=lambda path: -last_calls[path])[:_CUT_CANDIDATES]:
        module, call = modules[path], calls[last_calls[path]]
        ends_block = any(path.startswith(f"{block}.") for block in inside_last)
        if not _may_be_a_norm(module) or (last_calls[path] < last_block and not ends_block):
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


def _normalised_again(
    model: nn.Module, later: list[Call], path: str, inputs: Mapping[str, Any], stream: Tensor
) -> bool:
    """Whether the stream passes a normalisation of any kind after the last call of `path`, which is then not final."""
    modules = dict(model.named_modules())
    for call in {call.path: call for call in later if not path.startswith(f"{call.path}.")}.values():
        module = modules[call.path]
        if not _may_be_a_norm(module):
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
    width = call.output.shape[1 if behaviour.axes_after else -1]
    rows = call.output[0].numel() // width if call.output.ndim > 2 else len(call.output)
    placement = "post" if _ends_a_block(call, calls) else "pre"
    return FinalNorm(call.path, behaviour, placement, width, num_blocks, rows, None, (evidence, *behaviour.evidence))


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


def block_list(model: nn.Module, final_norm: str | None) -> tuple[str | None, int | None]:
    """Path and length of the list of blocks that the final norm ends or follows; (None, None) if there is no list.

    Of the outermost ModuleLists, the one that shares the longest path with the final norm, then the one with most
    parameters: a language model's blocks rather than its vision tower's.
    """
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if not outermost:
        return None, None

    def rank(path: str) -> tuple[int, int]:
        pairs = zip(path.split("."), (final_norm or "").split("."), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return shared, sum(p.numel() for p in lists[path].parameters())

    best = max(outermost, key=rank)
    return best, len(lists[best])


def _nothing(family: str, reason: str, model: nn.Module) -> FinalNorm:
    _, num_blocks = block_list(model, None)
    config: Any = model.config
    hidden = getattr(config, "hidden_size", None)
    return FinalNorm(
        None, NormBehaviour(family), None, hidden if isinstance(hidden, int) else None, num_blocks, reason=reason
    )


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    # A heading says nothing without the line below it.
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}"[:300]
