"""Minimal inputs for the forward pass of any transformers model, from its signature and its configuration.

Nothing says which shape a model takes its images or its sound in, so the likely ones are offered in turn; the first
that the model runs on will do, since only the flow through it is looked at.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LENGTH = 8  # tokens; enough for a convolution over time and for a window of attention
_SAMPLES = 4000  # a quarter of a second of sound: every feature extractor leaves a few frames of it
_MEL_KEYS = ("num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", "feature_projection_input_dim",
             "num_mel_channels", "mel_bins", "input_dim", "feat_in")  # fmt: skip
_VISION_KEYS = ("vision_config", "image_config", "vision_model_config", "backbone_config")
_AUDIO_KEYS = ("audio_config", "encoder_config", "audio_encoder_config", "speech_config")
# What stands for another argument, or goes into the middle of the model.
_INSTEAD = ("inputs_embeds", "hidden_states", "labels", "query_embeds", "inputs", "decoder_input_ids")
_Shape = Callable[..., Tensor]


def minimal_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try, likeliest first; tensors are on the model's device.

    Values are constant for what indexes (tokens, positions) and seeded noise for what is measured (pixels, sound).
    """
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    device = next(iter(model.parameters())).device
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def whole(*shape: int, value: int = 5) -> Tensor:
        return torch.full(shape, value, dtype=torch.long, device=device)

    name = getattr(model, "main_input_name", "input_ids")
    name = name[0] if isinstance(name, list) and name else name
    name = name if isinstance(name, str) and name in parameters else _first_known(parameters)
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    alone = [{name: tensor} for tensor in _offers(name, config, noise, whole)]
    decoding = [*required, "decoder_input_ids"] if "decoder_input_ids" in parameters else required
    companions = [*required, *_companions(parameters, name), *decoding[len(required) :]]
    everything = [*companions, *(n for n in parameters if n not in _INSTEAD and _offers(n, config, noise, whole))]
    text = [] if name == "input_ids" else ["input_ids"]
    cached = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters.values())
    attempts = [_with(alone, names, config, noise, whole, name)
                for names in dict.fromkeys(map(tuple, (required, decoding, companions, everything)))]  # fmt: skip
    if "input_ids" in parameters and text:  # a model of pictures and words may do with words
        words = [{"input_ids": tensor} for tensor in _offers("input_ids", config, noise, whole)]
        attempts.append(_with(words, required, config, noise, whole, "input_ids"))
    for inputs in itertools.chain.from_iterable(attempts):
        yield inputs
        if cached and "input_ids" in inputs:
            yield inputs | {"use_cache": False}  # some caches refuse the layers of a small configuration


def running_inputs(model: nn.Module) -> dict[str, Any]:
    """The first of `minimal_inputs` that the model runs on.

    Raises:
        Exception: what the forward pass raised on the likeliest of them, if it runs on none.
    """
    failure: Exception | None = None
    for inputs in minimal_inputs(model):
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:
            failure = failure or error
            continue
        return inputs
    raise failure or ValueError(f"{type(model).__name__} takes an input that is not known here")


def _with(
    alone: list[dict[str, Any]], names: Sequence[str], config: Any, noise: _Shape, whole: _Shape, main: str
) -> Iterator[dict[str, Any]]:
    """The main input with the first likely form of every other one, then the other forms of those."""
    others = [[(n, t) for t in _offers(n, config, noise, whole)] for n in dict.fromkeys(names) if n != main]
    if any(not offers for offers in others):
        return
    for first in alone:
        yield first | {name: tensor for (name, tensor), *_ in others}
    for combination in itertools.islice(itertools.product(*others), 1, 12):
        for first in alone[:3]:
            yield first | dict(combination)


def _first_known(parameters: Any) -> str:
    known = ("input_ids", "pixel_values", "input_values", "input_features", "pixel_values_videos", "hidden_states")
    return next((n for n in known if n in parameters), next(iter(parameters)))


def _companions(parameters: Any, main: str) -> list[str]:
    """Optional arguments without which a model of several towers does not run."""
    wanted = ("input_ids", "pixel_values", "bbox", "image", "visual_feats", "visual_pos", "input_features",
              "input_values", "attention_mask", "pixel_attention_mask", "spatial_shapes")  # fmt: skip
    return [n for n in wanted if n in parameters and n != main]


def _offers(name: str, config: Any, noise: _Shape, whole: _Shape) -> list[Any]:
    """Likely values of the argument `name`."""
    if name in ("input_ids", "decoder_input_ids", "qformer_input_ids", "conditional_input_ids"):
        streams = _number(config, ("num_codebooks",), 0)  # of sound, beside the one of text
        several = [whole(1, _LENGTH, streams + 1, value=2), whole(1, _LENGTH, streams, value=2)] if streams else []
        return [whole(1, _LENGTH), whole(2, _LENGTH, value=2), *several]
    if name in ("attention_mask", "decoder_attention_mask", "qformer_attention_mask"):
        return [whole(1, _LENGTH, value=1)]
    if name == "bbox":
        return [whole(1, _LENGTH, 4, value=1), noise(1, _LENGTH, 8)]
    if name in ("pixel_values", "pixel_values_videos", "prompt_pixel_values", "image"):
        return [*_pictures(name, config, noise), *_packed_patches(name, config, noise, whole)]
    if name == "image_attention_mask":
        return [whole(1, _LENGTH, 2, value=1)]
    if name in ("task_inputs", "text_inputs"):
        return [whole(1, _number(config, ("task_seq_len",), 77), value=2)]
    if name in ("pixel_attention_mask", "pixel_mask"):
        size = _image_size(_vision(config))
        return [whole(1, (size[0] // 16) ** 2, value=1), whole(1, *size, value=1)]
    if name in ("spatial_shapes", "target_sizes"):
        side = _image_size(_vision(config))[0] // _number(_vision(config), ("patch_size",), 16)
        return [torch.tensor([[side, side]], device=whole(1).device)]
    if name in ("input_features", "audio_mel"):
        return _spectrograms(config, noise)
    if name in ("input_features_mask", "audio_mel_mask"):  # in some models true is padding
        lengths = dict.fromkeys((2 * _number(_audio(config), ("max_source_positions",), 64), *_frame_counts(config)))
        return [mask for n in lengths for mask in (whole(1, n, value=1), whole(1, n, value=1).bool(),
                                                   whole(1, n, value=0).bool())]  # fmt: skip
    if name == "is_longer":
        return [whole(1, 1, value=1).bool()]
    if name in ("states", "actions", "rewards", "returns_to_go"):
        wide = {"states": ("state_dim",), "actions": ("act_dim",)}.get(name, ())
        return [noise(1, _LENGTH, _number(config, wide, 1))]
    if name == "timesteps":
        return [whole(1, _LENGTH)]
    if name in ("input_values", "audio_values"):
        bins = _number(config, ("num_mel_bins",), 0)
        frames = _number(config, ("max_length",), 1024)
        mel = [noise(1, frames, bins)] if bins else []
        channels = _number(config, ("audio_channels",), 1)
        return [*mel, noise(1, _SAMPLES), noise(1, channels, _SAMPLES), noise(1, channels, 8 * _SAMPLES)]
    if name in ("hidden_states", "grid_thw", "pixel_position_ids", "merge_sizes"):
        return _packed_patches(name, config, noise, whole)
    if name == "visual_feats":
        return [noise(1, 4, _number(config, ("visual_feat_dim", "visual_embedding_dim"), 2048))]
    if name == "visual_pos":
        return [noise(1, 4, 4)]
    if name == "encoder_hidden_states":
        return [noise(1, _LENGTH, _number(config, ("encoder_hidden_size", "hidden_size", "d_model"), 64))]
    if name in ("query_embeds", "inputs", "inputs_embeds"):
        return [noise(1, _LENGTH, _number(config, ("hidden_size", "d_model"), 64))]
    if name == "past_values":
        length = _number(config, ("context_length",), 32)
        return [noise(1, length, _number(config, ("num_input_channels",), 1)), noise(1, length)]
    if name == "past_values_padding":
        return [whole(1, _number(config, ("context_length",), 32), value=0)]
    if name == "freq":
        return [whole(1, 1, value=0)]
    return []


def _pictures(name: str, config: Any, noise: _Shape) -> list[Any]:
    vision = _vision(config)
    height, width = _image_size(vision)
    channels = _number(vision, ("num_channels", "in_channels", "in_chans"), 3)
    frames = _number(vision, ("num_frames", "frames_per_clip"), 0)
    patch = _number(vision, ("patch_size",), 16)
    still, film = noise(1, channels, height, width), noise(1, frames or 2, channels, height, width)
    patches = noise(1, (height // max(patch, 1)) * (width // max(patch, 1)), channels * patch * patch)
    side = max(256, 4 * patch)  # of a pyramid whose smallest picture is a patch
    larger = noise(1, channels, side, side)
    return [film, still] if frames or name.endswith("videos") else [still, film, patches, larger]


def _spectrograms(config: Any, noise: _Shape) -> list[Any]:
    audio = _audio(config)
    bins = _number(audio, _MEL_KEYS, _number(config, _MEL_KEYS, 80))
    frames = 2 * _number(audio, ("max_source_positions",), 64)
    return [
        noise(1, bins, frames),
        noise(1, 128, bins),
        noise(1, bins, 128),
        *(noise(1, 128, stacked * bins) for stacked in (2, _number(audio, ("num_stacked_frames",), 4))),
        noise(1, 1, 1001, 64),
        *(noise(1, bins, count) for count in _frame_counts(config)),
    ]


def _frame_counts(config: Any) -> list[int]:
    """Numbers of frames that a model with windows over time takes."""
    window = _number(_audio(config), ("n_window",), 0)
    return [2 * window] if window else []


def _packed_patches(name: str, config: Any, noise: _Shape, whole: _Shape) -> list[Any]:
    """Vision towers that take the patches of all images in one row, and a grid of (time, height, width) patches."""
    merge = max(2, _number(config, ("spatial_merge_size", "pooling_kernel_size", "merge_kernel_size"), 2))
    side = 2 * merge
    patch = _number(config, ("patch_size",), 14)
    values = _number(config, ("in_channels", "num_channels", "in_chans"), 3) * patch * patch
    temporal = _number(config, ("temporal_patch_size",), 1)
    if name == "hidden_states":
        return [noise(side * side, values * temporal), noise(side * side, values)]
    if name.startswith("pixel_values"):
        channels = values // (patch * patch)
        return [
            *(noise(side * side, width) for width in dict.fromkeys((values * temporal, values, 2 * values))),
            noise(1, side * side, values),
            noise(side * side, channels, patch, patch),
        ]
    if name == "grid_thw":
        return [torch.tensor([[1, side, side]], device=whole(1).device)]
    if name == "merge_sizes":
        return [whole(1, value=1)]
    steps = torch.arange(side, device=whole(1).device)
    return [torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).reshape(1, -1, 2)]


def _audio(config: Any) -> Any:
    return next((c for c in (getattr(config, key, None) for key in _AUDIO_KEYS) if c is not None), config)


def _vision(config: Any) -> Any:
    return next((c for c in (getattr(config, key, None) for key in _VISION_KEYS) if c is not None), config)


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or getattr(config, "img_size", None) or 224
    if isinstance(size, (list, tuple)):
        return (int(size[0]), int(size[-1]))
    return (size, size) if isinstance(size, int) else (224, 224)


def _number(config: Any, names: tuple[str, ...], default: int) -> int:
    """The first of `names` that `config` gives as a number."""
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default
