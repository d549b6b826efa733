"""Likely values of the arguments of a forward pass, by the argument's name and the model's configuration.

Nothing says which shape a model takes its images or its sound in, so for each argument the likely values are listed,
likeliest first: constant for what indexes (tokens, positions), seeded noise for what is measured (pixels, sound).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

_LENGTH = 8  # tokens; enough for a convolution over time and for a window of attention
_SAMPLES = 4000  # a quarter of a second of sound: every feature extractor leaves a few frames of it
_MEL_KEYS = ("num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", "feature_projection_input_dim",
             "num_mel_channels", "mel_bins", "input_dim", "feat_in")  # fmt: skip
_VISION_KEYS = ("vision_config", "image_config", "vision_model_config", "backbone_config")
_AUDIO_KEYS = ("audio_config", "encoder_config", "audio_encoder_config", "speech_config")


class Offers:
    """What the arguments of one model may be given: `offers(name)`, nothing where the name is not known."""

    def __init__(self, config: Any, device: torch.device):
        self.config = config
        self._device = device
        self._generator = torch.Generator().manual_seed(0)
        self._vision, self._audio = _first(config, _VISION_KEYS), _first(config, _AUDIO_KEYS)
        # Where the places of a picture are counted, every token is offered as one.
        self._length = _number(config, ("latent_query_num",), _LENGTH)

    def __call__(self, name: str) -> list[Any]:
        """Likely values of the argument `name`."""
        return _BY_NAME[name](self) if name in _BY_NAME else []

    def __contains__(self, name: str) -> bool:
        return name in _BY_NAME

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self._device)

    def _whole(self, *shape: int, value: int = 5) -> Tensor:
        return torch.full(shape, value, dtype=torch.long, device=self._device)

    def _grid(self, *sizes: int) -> Tensor:
        return torch.tensor([sizes], device=self._device)

    # Words, and what goes with them.

    def _tokens(self) -> list[Any]:
        decoder = getattr(self.config, "decoder", None)
        streams = _number(self.config, ("num_codebooks",), _number(decoder, ("num_codebooks",), 0))  # of sound
        length = self._length
        shapes = [(1, length, streams + 1), (1, length, streams), (streams, length)] if streams else []
        of_sound = [self._whole(*shape, value=2) for shape in shapes]
        return [self._whole(1, length), self._whole(2, length, value=2), *of_sound]

    def _one_for_each_token(self) -> list[Any]:
        return [self._whole(1, self._length, value=1)]

    def _boxes(self) -> list[Any]:
        return [
            self._whole(1, self._length, 4, value=1),
            self._noise(1, self._length, _number(self.config, ("dim_bbox",), 8)),
        ]

    def _task(self) -> list[Any]:
        return [self._whole(1, _number(self.config, ("task_seq_len",), 77), value=2)]

    # What an embedding, an encoder or a cache would have given.

    def _states(self) -> list[Any]:
        return [self._noise(1, _LENGTH, _number(self.config, ("hidden_size", "d_model"), 64))]

    def _encoded(self) -> list[Any]:
        width = _number(self.config, ("encoder_hidden_size", "hidden_size", "d_model"), 64)
        return [self._noise(1, self._length, width)]

    def _cache(self) -> list[Any]:  # of a model that goes on from another's
        from transformers import DynamicCache

        return [DynamicCache()]

    def _noises(self) -> list[Any]:  # of a model that drafts a block of tokens at once
        steps, width = _number(self.config, ("block_size",), _LENGTH), _number(self.config, ("hidden_size",), 64)
        return [self._noise(1, steps, width)]

    def _of_several_layers(self) -> list[Any]:
        layers = getattr(self.config, "target_layer_ids", None) or [0]
        return [self._noise(1, _LENGTH, len(layers) * _number(self.config, ("hidden_size",), 64))]

    # Pictures, films, and their patches in a row.

    def _pictures(self, film_first: bool = False) -> list[Any]:
        vision = self._vision
        height, width = _image_size(vision, self.config, _first(vision, _VISION_KEYS))
        channels = _number(vision, ("num_channels", "in_channels", "in_chans"), 3)
        frames = _number(vision, ("num_frames", "frames_per_clip"), 0)
        patch = _number(vision, ("patch_size",), 16)
        # Twice as high as wide: a picture below its prompt.
        still = self._noise(1, channels, width if height == 2 * width else height, width)
        film = self._noise(1, frames or 2, channels, height, width)
        patches = self._noise(1, (height // max(patch, 1)) * (width // max(patch, 1)), channels * patch * patch)
        side = max(256, 4 * patch)  # of a pyramid whose smallest picture is a patch
        larger = self._noise(1, channels, side, side)
        whole = [film, still] if frames or film_first else [still, film, patches, larger]
        return [*whole, *self._packed_patches()]

    def _patch_sizes(self) -> tuple[int, int, int]:
        """Channels, side of a patch, and frames in a patch of a tower that takes the patches of all images in a row."""
        channels = _number(self.config, ("in_channels", "num_channels", "in_chans"), 3)
        return channels, _number(self.config, ("patch_size",), 14), _number(self.config, ("temporal_patch_size",), 1)

    def _patch_side(self) -> int:
        """Patches along a side of a picture: twice what are merged into one."""
        merged = _number(self.config, ("spatial_merge_size", "pooling_kernel_size", "merge_kernel_size"), 2)
        return 2 * max(2, merged)

    def _packed_patches(self) -> list[Any]:
        (channels, patch, temporal), count = self._patch_sizes(), self._patch_side() ** 2
        values = channels * patch * patch
        return [
            *(self._noise(count, width) for width in dict.fromkeys((values * temporal, values, 2 * values))),
            self._noise(1, count, values),
            self._noise(count, channels, patch, patch),
        ]

    def _patches_or_sound(self) -> list[Any]:
        (channels, patch, temporal), count = self._patch_sizes(), self._patch_side() ** 2
        values = channels * patch * patch
        heard = _number(self.config, ("channels", "audio_channels"), 0)
        width = _number(self.config, ("hidden_size",), 64)
        # A codec's encoder takes sound by this name, its decoder what the encoder made of it.
        sound = [self._noise(1, heard, _SAMPLES), self._noise(1, width, _LENGTH)] if heard else []
        return [self._noise(count, values * temporal), self._noise(count, values), *sound]

    def _patch_grid(self) -> list[Any]:  # of time, height and width
        side = self._patch_side()
        return [self._grid(1, side, side)]

    def _patch_positions(self) -> list[Any]:
        steps = torch.arange(self._patch_side(), device=self._device)
        return [torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).reshape(1, -1, 2)]

    def _patches_a_side(self) -> list[Any]:
        side = _image_size(self._vision)[0] // _number(self._vision, ("patch_size",), 16)
        return [self._grid(side, side)]

    def _picture_mask(self) -> list[Any]:
        size = _image_size(self._vision)
        return [self._whole(1, (size[0] // 16) ** 2, value=1), self._whole(1, *size, value=1)]

    def _visual_features(self) -> list[Any]:
        return [self._noise(1, 4, _number(self.config, ("visual_feat_dim", "visual_embedding_dim"), 2048))]

    # Sound.

    def _sound(self) -> list[Any]:
        bins = _number(self.config, ("num_mel_bins",), 0)
        channels = _number(self.config, ("audio_channels",), 1)
        return [
            *([self._noise(1, _number(self.config, ("max_length",), 1024), bins)] if bins else []),
            self._noise(1, _SAMPLES),
            self._noise(1, channels, _SAMPLES),
            self._noise(1, channels, 8 * _SAMPLES),
            *self._states(),
        ]

    def _spectrograms(self) -> list[Any]:
        audio = self._audio
        bins = _number(audio, _MEL_KEYS, _number(self.config, _MEL_KEYS, 80))
        stacked = _number(audio, ("num_stacked_frames",), 4)
        side = _number(audio, ("spec_size",), 0)  # of the square that a spectrogram is folded into
        return [
            *(self._noise(1, bins, count) for count in self._frame_counts()),
            self._noise(1, bins, self._most_frames()),
            self._noise(1, 128, bins),
            self._noise(1, bins, 128),
            self._noise(1, 128, 2 * bins),
            self._noise(1, 128, stacked * bins),
            self._noise(1, 2 * _LENGTH, stacked * bins),  # of a model with few positions
            self._noise(1, 1, side * side // bins if side else 1001, bins),
        ]

    def _spectrogram_masks(self) -> list[Any]:  # in some models true is padding
        counts = dict.fromkeys((*self._frame_counts(), self._most_frames(), 2 * _LENGTH))
        ones = [self._whole(1, count, value=1) for count in counts]
        return [mask for each in ones for mask in (each, each.bool(), (1 - each).bool())]

    def _most_frames(self) -> int:
        return 2 * _number(self._audio, ("max_source_positions",), 64)

    def _frame_counts(self) -> list[int]:
        """Numbers of frames that a model with windows over time takes, or one that gives each token its own."""
        window = _number(self._audio, ("n_window",), 0)
        frames = _number(self.config, ("audio_length_per_tok",), 0)
        return [count for count in (2 * window, _LENGTH * frames) if count]

    # Trajectories and series.

    def _trajectory(self, key: str = "") -> list[Any]:
        return [self._noise(1, self._length, _number(self.config, (key,), 1))]

    def _actions(self) -> list[Any]:
        width = _number(getattr(self.config, "dit_config", self.config), ("hidden_size",), 64)
        return [self._noise(1, self._length, width)]

    def _past(self) -> list[Any]:
        length, channels = self._past_steps(), _number(self.config, ("num_input_channels",), 1)
        return [self._noise(1, length, channels), self._noise(1, length)]

    def _past_steps(self) -> int:
        """Steps of the context, and those before it that the model looks back to."""
        lags: list[int] = getattr(self.config, "lags_sequence", None) or [0]
        return _number(self.config, ("context_length",), 32) + max(lags)

    def _future(self) -> list[Any]:
        return [self._noise(1, self._future_steps())]

    def _future_steps(self) -> int:
        return _number(self.config, ("prediction_length",), 8)

    def _time_features(self, steps: Callable[["Offers"], int]) -> list[Any]:
        return [self._noise(1, steps(self), _number(self.config, ("num_time_features",), 0))]


_BY_NAME: dict[str, Callable[[Offers], list[Any]]] = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "qformer_input_ids", "conditional_input_ids"), Offers._tokens),
    **dict.fromkeys(
        ("attention_mask", "decoder_attention_mask", "qformer_attention_mask", "image_embeds_position_mask"),
        Offers._one_for_each_token,
    ),
    **dict.fromkeys(("task_inputs", "text_inputs"), Offers._task),
    **dict.fromkeys(("query_embeds", "inputs", "inputs_embeds", "decoder_input_values"), Offers._states),
    **dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks", "image"), Offers._pictures),
    **dict.fromkeys(("pixel_attention_mask", "pixel_mask"), Offers._picture_mask),
    **dict.fromkeys(("spatial_shapes", "target_sizes"), Offers._patches_a_side),
    **dict.fromkeys(("input_features", "audio_mel"), Offers._spectrograms),
    **dict.fromkeys(("input_features_mask", "audio_mel_mask"), Offers._spectrogram_masks),
    **dict.fromkeys(("input_values", "audio_values"), Offers._sound),
    **dict.fromkeys(("rewards", "returns_to_go"), Offers._trajectory),
    "states": partial(Offers._trajectory, key="state_dim"),
    "actions": partial(Offers._trajectory, key="act_dim"),
    "action_embeds": Offers._actions,
    "bbox": Offers._boxes,
    "context_hidden_states": Offers._of_several_layers,
    "encoder_hidden_states": Offers._encoded,
    "future_time_features": partial(Offers._time_features, steps=Offers._future_steps),
    "future_values": Offers._future,
    "freq": lambda offers: [offers._whole(1, 1, value=0)],
    "grid_thw": Offers._patch_grid,
    "hidden_states": Offers._patches_or_sound,
    "image_attention_mask": lambda offers: [offers._whole(1, offers._length, 2, value=1)],
    "is_longer": lambda offers: [offers._whole(1, 1, value=1).bool()],
    "merge_sizes": lambda offers: [offers._whole(1, value=1)],
    "noise_embeds": Offers._noises,
    "past_key_values": Offers._cache,
    "past_observed_mask": lambda offers: [offers._whole(1, offers._past_steps(), value=1)],
    "past_time_features": partial(Offers._time_features, steps=Offers._past_steps),
    "past_values": Offers._past,
    "past_values_padding": lambda offers: [offers._whole(1, offers._past_steps(), value=0)],
    "pixel_position_ids": Offers._patch_positions,
    "pixel_values_videos": partial(Offers._pictures, film_first=True),
    "timesteps": lambda offers: [offers._whole(1, offers._length)],
    "visual_feats": Offers._visual_features,
    "visual_pos": lambda offers: [offers._noise(1, 4, 4)],
}


def _first(config: Any, keys: tuple[str, ...]) -> Any:
    """The nested configuration under the first of `keys` that there is, else `config` itself."""
    return next((c for c in (getattr(config, key, None) for key in keys) if c is not None), config)


def _image_size(*configs: Any) -> tuple[int, int]:
    """Height and width, of the first configuration that says them."""
    keys = ("image_size", "img_size", "max_img_size", "crop_size")
    size = next((size for c in configs for key in keys if (size := getattr(c, key, None))), 224)
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
