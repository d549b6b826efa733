"""Stored tensors that the architecture of a configuration has no place for, by their headers alone.

transformers drops them. Some cannot matter: heads and towers beside what is read, buffers of earlier versions. Others
say that the weights are of another model than the configuration's: a bias, the scales of quantised numbers, the halves
of an adapter that is not merged. What belongs to a module of a block, or to any module without parts, is of the latter.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from deadbench.suite.architectures.stored_names import unwrapped
from deadbench.suite.checkpoints.quantised import is_part, method_of, without_parts
from deadbench.suite.checkpoints.tensors import TensorEntry
from deadbench.suite.errors import CheckpointError

# What cannot matter although it lies in a module of the model, and why.
_IMMATERIAL = {
    r"(^|\.)(attn|attention|self_attn|crossattention|self)\.(bias|masked_bias|mask|attn_mask|causal_mask)$": "masks",
    r"(^|\.)attn_mask$": "masks of shifted windows",
    r"inv_freq$|(^|[._])(cos|sin)(_cached)?$|(^|\.)freqs(_cis)?$": "rotary angles, computed from the configuration",
    r"(^|\.)(position_ids|token_type_ids|relative_position_index)$": "counted positions",
    r"(^|\.)embed_positions\.(weights|_float_tensor)$": "sinusoids of fairseq, computed from the configuration",
    r"(^|\.)num_batches_tracked$": "a counter that only training uses",
    r"(^|\.)(mask_token|masked_spec_embed|mask_emb)$": "a vector that only training uses",
    r"(^|\.)_extra_state$": "the state of FP8 training",
    r"(^|\.)(k|v|kv|q|prob)_scale$": "scales of a cache that is not quantised here",
}
_ADAPTER = re.compile(
    r"(^|[._])lora_(A|B|a|b|down|up|embedding_A|embedding_B|magnitude_vector)(\.|$)"
    r"|\.(dora_scale|ia3_l|vera_lambda_[bd]|hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_[rR]|base_layer)(\.|$)"
)
_WHOLE, _EIGHT_BITS = ("I8", "U8", "I16", "I32", "I64"), ("F8_E4M3", "F8_E5M2")  # dtypes of numbers
_SCALES = re.compile(r"scale|absmax|zeros|quant", re.IGNORECASE)
# What the blocks of draft heads, for the prediction of further tokens, have beside a block's own parts.
_DRAFT = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")


def refuse_unexpected(
    model: Any, raw_config: Mapping[str, Any], entries: Mapping[str, TensorEntry], source: str
) -> list[str]:
    """Stored tensors inside the model that it has no place for and that cannot matter.

    Heads and towers beside the model that is read, and what transformers itself leaves out, are not among them.

    Args:
        model: what is read of the checkpoint, on any device: the published model, or the bare one in it.
        raw_config: the contents of config.json; where it says that the weights are quantised, parts of such weights are
            none of the model's tensors, and where those parts are not known, further blocks alone are refused.
        entries: the tensors of the checkpoint.
        source: what the checkpoint is called.

    Raises:
        CheckpointError: a tensor without a place, beside or inside a module that the model has, or in one more block;
            whole numbers in the place of a weight.
    """
    without_place, placed = _without_place(model, entries)
    if method_of(raw_config) is None:
        _refuse_whole_numbers(model, placed, entries, source)
    if further := _in_further_blocks(without_place, model):
        raise CheckpointError(
            f"{source}: the checkpoint does not match config.json: {further[0]} is of a block that the configuration "
            "does not have; take both from the same place"
        )
    telling = set(without_parts(entries, raw_config))
    modules = dict(model.named_modules())
    computed = {name for name, _ in model.named_buffers()}
    immaterial = []
    for stored, name in (each for each in without_place if each[0] in telling):
        name = _nearest(name, modules, model)
        owner = _owner(name, modules)
        if name in computed:
            continue
        bias = name.endswith("bias") and len(entries[stored].shape) == 1  # a mask of that name has more axes
        if not bias and any(re.search(pattern, name) for pattern in _IMMATERIAL):
            immaterial.append(stored)
        elif _ADAPTER.search(stored) or (owner and _is_part(owner, modules[owner])):
            raise CheckpointError(f"{source}: {_told(stored, type(model).__name__, entries[stored].file)}")
        elif owner and owner != model.base_model_prefix:
            immaterial.append(stored)
    return immaterial


def remarks(
    model: Any, raw_config: Mapping[str, Any], entries: Mapping[str, TensorEntry], immaterial: list[str]
) -> list[str]:
    """What a row has to say of a checkpoint's tensors, of which `refuse_unexpected` found some `immaterial`.

    `model` is the published one, with its heads.
    """
    without_place, placed = _without_place(model, entries)
    computed = {name for name, _ in model.named_buffers()}
    unplaced = [stored for stored, name in without_place if stored not in immaterial and name not in computed]
    beside = [] if _has_another_root(unplaced, model) else without_parts(unplaced, raw_config)
    raw = [n for n in placed if entries[n].dtype in _EIGHT_BITS and method_of(raw_config) is None]
    return [
        f"{told}: {_first_of(names)}"
        for told, names in (
            ("not loaded, and of no effect", immaterial),
            ("stored beside the model, and not loaded", beside),
            ("floats of 8 bits without scales, taken as they are", raw),
        )
        if names
    ]


def _has_another_root(stored: Iterable[str], model: Any) -> bool:
    """Whether a script or an average has put a path before names of the model: what lies there is a script's own."""
    places, prefix = model.state_dict(), f"{model.base_model_prefix}."
    for name in stored:
        parts = unwrapped(name).split(".")
        rests = (".".join(parts[cut:]) for cut in range(1, len(parts)))
        if any(rest in places or prefix + rest in places for rest in rests):
            return True
    return False


def _first_of(tensors: list[str]) -> str:
    """The first of them, and how many there are."""
    return tensors[0] + (f" and {len(tensors) - 1} more" if len(tensors) > 1 else "")


def _refuse_whole_numbers(
    model: Any, placed: Mapping[str, str], entries: Mapping[str, TensorEntry], source: str
) -> None:
    """Whole numbers are no weights: they were quantised, and what says how is lost."""
    places = model.state_dict()
    for stored, name in placed.items():
        entry = entries[stored]
        if entry.dtype in _WHOLE and len(entry.shape) > 1 and places[name].is_floating_point():
            raise CheckpointError(
                f"{source}: {entry.file}: {stored} holds whole numbers ({entry.dtype}), where {type(model).__name__} "
                "has a weight; give config.json the quantization_config of these weights"
            )


def _told(stored: str, model: str, file: str) -> str:
    if _ADAPTER.search(stored):
        return (
            f"{file}: {stored} is of an adapter beside its base, which {model} leaves out; merge it (merge_and_unload)"
        )
    told = f"{file}: {stored} has no place in the {model} of config.json, which transformers would load without it"
    if is_part(stored) or _SCALES.search(stored.rpartition(".")[2]):
        return f"{told}; give config.json the quantization_config of these weights"
    return f"{told}; take both from the same place"


def _without_place(model: Any, stored: Iterable[str]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """(stored name, transformers' name) of what transformers calls unexpected; of all else the second by the first."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    rules = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    places, base = model.state_dict(), model.base_model_prefix
    left_out = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]
    found, placed = [], {}
    for stored_name in sorted(stored):
        name = unwrapped(stored_name)
        own = rename_source_key(name, rules, converters, base, places)[0]
        if own not in places:
            plain = rename_source_key(name, [], [], base, places)[0]
            if plain not in places and not any(pattern.search(own) for pattern in left_out):
                found.append((stored_name, own))
            own = plain
        if own in places:
            placed[stored_name] = own
    return found, placed


def _in_further_blocks(without_place: list[tuple[str, str]], model: Any) -> list[str]:
    """Of the tensors without a place, those that are named as another block's would be; draft heads are no such block.

    transformers leaves some architectures' draft heads out, by the number that their blocks have in one release.
    """
    kinds = {re.sub(r"\d+", "#", name) for name in model.state_dict()}
    prefix = f"{model.base_model_prefix}."
    drafts = tuple(f"{name[: match.start()]}." for _, name in without_place if (match := _DRAFT.search(name)))

    def of_a_block(name: str) -> bool:
        kind = re.sub(r"\d+", "#", name)
        return "#" in kind and bool({kind, kind.removeprefix(prefix), prefix + kind} & kinds)

    return [stored for stored, name in without_place if of_a_block(name) and not name.startswith(drafts)]


def _nearest(name: str, modules: dict[str, nn.Module], model: Any) -> str:
    """`name` without or with the prefix of the base model, whichever leads deepest into the model."""
    prefix = f"{model.base_model_prefix}."
    return max((name, name.removeprefix(prefix), prefix + name), key=lambda each: len(_owner(each, modules)))


def _owner(name: str, modules: dict[str, nn.Module]) -> str:
    """The innermost module of the model on the way to a tensor."""
    parts = name.split(".")[:-1]
    paths = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((path for path in paths if path in modules), "")


def _is_part(path: str, module: nn.Module) -> bool:
    """Whether a module is one of a block, or has no parts: what holds blocks and towers may hold heads beside them."""
    return not any(True for _ in module.children()) or bool(re.search(r"(^|\.)\d+(\.|$)", path))
