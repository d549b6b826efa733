"""Photographs and sound in the form that a model takes: from its own processor, or the plain one documented here.

Without the model's own processor, photographs are resized (bicubic) to the size that its configuration names and scaled
to [-1, 1], a film is one crop that wanders over a photograph, and sound is seeded Gaussian noise of unit variance.
Shapes: B images, C channels, F frames, H height, W width.
"""

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deadbench.suite.errors import InputError, reason_of
from deadbench.suite.inputs.hub_pictures import read_hub_pictures
from deadbench.suite.inputs.specs import photo_files

_PROCESSOR_FILE = "preprocessor_config.json"
_LOADERS = {"image processor": "AutoImageProcessor", "feature extractor": "AutoFeatureExtractor"}
_SECONDS = 10.0  # of sound an item; extractors with a fixed length cut or fill it


def photographs(spec: str, most: int) -> list[Any]:
    """RGB pictures that `spec` names: all of a folder, the bundled ones, or the first `most` of a Hub dataset.

    Raises:
        InputError: there are none, or one cannot be opened.
        DatasetError: the dataset cannot be read.
    """
    kind, _, rest = spec.partition(":")
    if kind != "hf":
        return [_open_photo(path, str(path)) for path in photo_files(rest)]
    pictures = itertools.islice(read_hub_pictures(rest), most)
    photos = [_open_photo(io.BytesIO(encoded), name) for name, encoded in pictures]
    if not photos:
        raise InputError(f"input {spec!r} has no pictures")
    return photos


def photo_crops(spec: str, count: int, seed: int) -> list[Any]:
    """`count` RGB pictures: each photograph whole, then seeded crops of them, every other one mirrored."""
    photos = photographs(spec, count)
    rng = np.random.default_rng(seed)
    crops = list(photos[:count])
    while len(crops) < count:
        photo = photos[len(crops) % len(photos)]
        side = int(min(photo.size) * rng.uniform(0.3, 0.9))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
        crop = photo.crop((left, top, left + side, top + side))
        crops.append(crop.transpose(0) if rng.random() < 0.5 else crop)  # 0: left-right mirror
    return crops


def plain_pictures(crops: list[Any], form: Tensor) -> Tensor:
    """`crops` as `form` has one: (1, C, H, W), a film (1, F, C, H, W), or patches in a row (1, N, C P P).

    Raises:
        InputError: a form that is none of these.
    """
    if form.ndim == 4:
        return torch.stack([_pixels(crop, form.shape[1:]) for crop in crops])
    if form.ndim == 5:
        return torch.stack([_film(crop, form.shape[1:]) for crop in crops])
    if form.ndim == 3 and (patches := _patch_form(form)) is not None:
        side, channels, patch = patches
        pixels = torch.stack([_pixels(crop, (channels, side * patch, side * patch)) for crop in crops])
        cut = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # B C y x P P
        return cut.permute(0, 2, 3, 4, 5, 1).reshape(len(crops), side * side, -1)
    raise InputError(f"the model takes pictures of shape {list(form.shape)}, which nothing here makes")


def own_pictures(crops: list[Any], folder: Path | None, accepted: set[str]) -> dict[str, Tensor] | None:
    """What the model's own image processor makes of `crops`, of that what the model takes; None without a processor.

    Raises:
        InputError: the processor fails.
    """
    return _processed("image processor", folder, accepted, lambda its: its(images=crops, return_tensors="pt"))


def noise_like(form: Tensor, count: int, seed: int) -> Tensor:
    """`count` items of seeded Gaussian noise, each of the shape of `form`'s one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *form.shape[1:], generator=generator)


def own_sound(count: int, seed: int, folder: Path | None, accepted: set[str]) -> dict[str, Tensor] | None:
    """What the model's own feature extractor makes of `count` seconds-long noises; None without an extractor.

    Raises:
        InputError: the extractor fails.
    """

    def extract(extractor: Any) -> Any:
        rate = int(extractor.sampling_rate)
        waves = noise_like(torch.empty(1, int(_SECONDS * rate)), count, seed).numpy()
        return extractor(list(0.1 * waves), sampling_rate=rate, return_tensors="pt")

    return _processed("feature extractor", folder, accepted, extract)


def _processed(
    kind: str, folder: Path | None, accepted: set[str], make: Callable[[Any], Any]
) -> dict[str, Tensor] | None:
    """The tensors among `accepted` that `make` gets out of the `kind` of processor in `folder`; None without one."""
    import transformers

    if folder is None or not (folder / _PROCESSOR_FILE).is_file():
        return None
    loader = getattr(transformers, _LOADERS[kind])
    try:
        made = make(loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception as error:
        raise InputError(f"the {kind} in {folder} fails ({reason_of(error)})") from error
    return {name: value for name, value in made.items() if name in accepted and isinstance(value, Tensor)}


def distinct_patches(pixels: Tensor, patch: int | None) -> int | None:
    """How many different patches of side `patch` there are in (B, C, H, W); None where it does not divide them."""
    if not patch or pixels.ndim != 4 or pixels.shape[-1] % patch or pixels.shape[-2] % patch:
        return None
    patches = pixels.unfold(2, patch, patch).unfold(3, patch, patch)
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, pixels.shape[1] * patch * patch)
    return len({row.tobytes() for row in flat.numpy()})


def _open_photo(file: Path | io.BytesIO, called: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as photo:
            return photo.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{called}: not a photograph that can be opened ({type(error).__name__})") from error


def _pixels(photo: Any, shape: Any) -> Tensor:
    channels, height, width = shape
    values = np.asarray(photo.resize((width, height), 3), dtype=np.float32)  # 3: bicubic
    pixels = torch.from_numpy(values / 127.5 - 1.0).permute(2, 0, 1)
    if channels != 3:
        pixels = pixels.mean(0, keepdim=True).expand(channels, -1, -1)
    return pixels.contiguous()


def _film(photo: Any, shape: Any) -> Tensor:
    """A window of 0.7 of the sides that wanders from the upper left to the lower right."""
    frames, *still = shape
    (width, height), part = photo.size, 0.7
    positions = np.linspace(0.0, 1.0 - part, frames)
    boxes = [(at * width, at * height, (at + part) * width, (at + part) * height) for at in positions]
    return torch.stack([_pixels(photo.crop(tuple(round(edge) for edge in box)), still) for box in boxes])


def _patch_form(form: Tensor) -> tuple[int, int, int] | None:
    """(patches a side, channels, patch side) of a row of flattened patches; None where it is no square of squares."""
    side, patch = round(form.shape[1] ** 0.5), round((form.shape[2] / 3) ** 0.5)
    return (side, 3, patch) if side * side == form.shape[1] and 3 * patch * patch == form.shape[2] else None
