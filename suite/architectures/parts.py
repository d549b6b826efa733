"""Parts of a model: which is read, its blocks, what is streamed, what may be divided over devices."""

import inspect
import itertools
import math
from typing import Any

from torch import nn


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


_TOWERS = {
    "image": ("vision_config", "image_config", "vision_model_config"),
    "audio": ("audio_config", "audio_encoder_config", "speech_config"),
}


def norm_and_blocks(model: nn.Module, path: str) -> tuple[nn.Module, list[nn.Module]]:
    """The final norm at `path`, and the blocks that it ends or follows."""
    blocks_path, _ = block_list(model, path)
    return model.get_submodule(path), list(model.get_submodule(blocks_path).children()) if blocks_path else []


def part_of(model: nn.Module, modality: str, stack: str) -> tuple[str, nn.Module]:
    """The part of `model` that is read, with its path ("" for the whole).

    A model of several towers is read in its text, except where `modality` names another; an encoder-decoder in its
    encoder, except where `stack` is "decoder" or the encoder takes nothing but embeddings.
    """
    config: Any = model.config
    wanted = [getattr(config, key, None) for key in _TOWERS.get(modality, ())]
    for path, module in model.named_modules():
        if path and any(c is not None and type(getattr(module, "config", None)) is type(c) for c in wanted):
            return path, module
    if getattr(config, "is_encoder_decoder", False) and stack == "encoder" and hasattr(model, "get_encoder"):
        whole: Any = model
        encoder = whole.get_encoder()
        takes = set(inspect.signature(encoder.forward).parameters) if isinstance(encoder, nn.Module) else set()
        if takes & {"input_ids", *PICTURE_NAMES[:2], *SOUND_NAMES}:
            path = next((path for path, module in model.named_modules() if module is encoder), "")
            if path:
                return path, encoder
    return "", model


PICTURE_NAMES = ("pixel_values", "pixel_values_videos", "image", "hidden_states")
SOUND_NAMES = ("input_features", "input_values", "audio_values", "audio_mel")


def streamed_paths(model: nn.Module) -> list[str]:
    """The entries of every outermost ModuleList that hold weights: decoder's blocks, encoder's, a vision tower's."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    entries = [(f"{path}.{name}", m) for path in outermost for name, m in model.get_submodule(path).named_children()]
    return [path for path, module in entries if any(True for _ in module.parameters())]


def divisors(part: nn.Module) -> dict[str, int]:
    """What the tensor-parallel degree of `part` must divide, by the configuration's name for it.

    Where layers differ it is what their counts have in common.
    """
    config: Any = part.config
    text = config.get_text_config()
    per_layer = getattr(text, "per_layer_config", None)
    layers = [per_layer[i] for i in range(len(per_layer))] if per_layer else [text]
    found = {}
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        counts = [count for count in (getattr(layer, name, None) for layer in layers) if isinstance(count, int)]
        if counts:
            found[name] = math.gcd(*counts)
    return found


def has_plan(part: nn.Module) -> bool:
    """Whether transformers has a tensor-parallel plan for `part`."""
    config: Any = part.config
    return any(getattr(each, "base_model_tp_plan", None) for each in (config, config.get_text_config()))
