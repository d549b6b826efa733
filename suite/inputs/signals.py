"""Photographs and sound in the form that a model takes: from its own processor, or the plain one documented here.

Without the model's own processor, photographs are resized (bicubic) to the size that its configuration names and scaled
to [-1, 1], a film is one crop that wanders over a photograph, and sound is seeded Gaussian noise of unit variance.
Shapes: B images, C channels, F frames, H height, W width.
"""

import contextlib
import io
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deadbench.suite.architectures.no_network import nothing_fetched
from deadbench.suite.errors import InputError, reason_of
from deadbench.suite.inputs.hub_pictures import read_hub_pictures
from deadbench.suite.inputs.specs import MOST_PHOTO_BYTES, photo_files
from deadbench.suite.storage import read_file

_PROCESSOR_FILE = "preprocessor_config.json"
_LOADERS = {"image processor": "AutoImageProcessor", "feature extractor": "AutoFeatureExtractor"}
# Of a file, whatever it is called; of others some are programs (EPS), which Pillow gives to another one to run.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Of a photograph, which a file of some kilobytes can have: each crop takes time with the pixels that it is made of, of
# so large a one 0.15 s.
_MOST_PIXELS = 50_000_000
_MOST_PIXELS_MADE = 89_478_485  # of one photograph by a stranger's processor
_MOST_PIXELS_AT_ONCE = 400_000_000  # 1.6 GB
_MOST_BYTES_HELD = 2**30  # of the pictures of a dataset, as they are stored
_SECONDS = 10.0  # of sound an item; extractors with a fixed length cut or fill it


@dataclass(frozen=True, eq=False)
class Photo:
    """A photograph: a file of this machine, or `encoded` as a dataset has it."""

    called: str
    encoded: bytes | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """The photograph, not yet decoded; whatever its bytes make the library raise is one line."""
        from PIL import Image

        try:
            encoded = read_file(Path(self.called), MOST_PHOTO_BYTES) if self.encoded is None else self.encoded
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", Image.DecompressionBombWarning
                )  # `size` refuses from a smaller number on
                Image.init()  # else few of these are known by name
                opened = Image.open(io.BytesIO(encoded), formats=_FORMATS)
            with opened:
                yield opened
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self.called}: not a photograph that can be opened ({reason_of(error)})") from error

    def size(self) -> tuple[int, int]:
        """Width and height, by its header alone."""
        with self.opened() as photo:
            width, height = photo.size
        if width * height > _MOST_PIXELS:
            raise InputError(
                f"{self.called}: {width} x {height} pixels; at most {_MOST_PIXELS:,}, of which each of a read's many "
                "crops is made: make the photograph smaller"
            )
        return width, height


@dataclass(frozen=True)
class Crop:
    """A part of a photograph that is not yet decoded: `box` is left, top, right and bottom in its pixels."""

    photo: Photo
    box: tuple[int, int, int, int]
    mirrored: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    def out_of(self, photo: Any) -> Any:
        """The picture, of its photograph."""
        part = photo if self.box == (0, 0, *photo.size) else photo.crop(self.box)
        return part.transpose(0) if self.mirrored else part  # 0: left-right mirror


def photographs(spec: str, most: int) -> list[Photo]:
    """The photographs that `spec` names: all of a folder, the bundled ones, or the first `most` of a Hub dataset.

    Raises:
        InputError: there are none.
        DatasetError: the dataset cannot be read.
    """
    kind, _, rest = spec.partition(":")
    if kind != "hf":
        return [Photo(str(path)) for path in photo_files(rest)]
    photos, held = list[Photo](), 0
    for name, encoded in itertools.islice(read_hub_pictures(rest), most):
        photos.append(Photo(name, encoded))
        held += len(encoded)
        if held > _MOST_BYTES_HELD:
            raise InputError(
                f"{name}: the pictures up to it have {held:,} bytes; at most {_MOST_BYTES_HELD:,} of {most}: give "
                "fewer --tokens, or smaller pictures"
            )
    if not photos:
        raise InputError(f"input {spec!r} has no pictures")
    return photos


def photo_crops(spec: str, count: int, seed: int) -> list[Crop]:
    """`count` RGB pictures: each photograph whole, then seeded crops of them, every other one mirrored.

    Raises:
        InputError: no photographs, or one that is none, or too large.
        DatasetError: the dataset cannot be read.
    """
    photos = [(photo, photo.size()) for photo in photographs(spec, count)]
    rng = np.random.default_rng(seed)
    crops = [Crop(photo, (0, 0, *size)) for photo, size in photos[:count]]
    while len(crops) < count:
        photo, size = photos[len(crops) % len(photos)]
        side = int(min(size) * rng.uniform(0.3, 0.9))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in size)
        crops.append(Crop(photo, (left, top, left + side, top + side), bool(rng.random() < 0.5)))
    return crops


def plain_pictures(crops: list[Crop], form: Tensor) -> Tensor:
    """`crops` as `form` has one: (1, C, H, W), a film (1, F, C, H, W), or patches in a row (1, N, C P P).

    Raises:
        InputError: a form that is none of these.
    """
    if form.ndim == 4:
        return torch.stack(pictures_of(crops, lambda picture: _pixels(picture, form.shape[1:])))
    if form.ndim == 5:
        return torch.stack(pictures_of(crops, lambda picture: _film(picture, form.shape[1:])))
    if form.ndim == 3 and (patches := _patch_form(form)) is not None:
        side, channels, patch = patches
        pixels = torch.stack(pictures_of(crops, lambda it: _pixels(it, (channels, side * patch, side * patch))))
        cut = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # B C y x P P
        return cut.permute(0, 2, 3, 4, 5, 1).reshape(len(crops), side * side, -1)
    raise InputError(f"the model takes pictures of shape {list(form.shape)}, which nothing here makes")


def own_pictures(crops: list[Crop], folder: Path | None, accepted: set[str]) -> dict[str, Tensor] | None:
    """What the model's own image processor makes of `crops`, of that what the model takes; None without a processor.

    Raises:
        InputError: the processor fails, or the pictures, which it takes all at once, are too large together.
    """

    def process(processor: Any) -> Any:
        _check_made(processor)
        pixels = sum(math.prod(crop.size) for crop in crops)
        if pixels > _MOST_PIXELS_AT_ONCE:
            raise InputError(
                f"{Path(crops[0].photo.called).parent}: {len(crops)} pictures of {pixels:,} pixels together, which the "
                f"model's own processor takes at once; at most {_MOST_PIXELS_AT_ONCE:,}: make the photographs smaller"
            )
        return processor(images=pictures_of(crops), return_tensors="pt")

    return _processed("image processor", folder, accepted, process)


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
        if not 0 < count * _SECONDS * rate <= _MOST_PIXELS_AT_ONCE:
            raise InputError(f"its sampling rate is {rate}; for {count} items at most {_MOST_PIXELS_AT_ONCE:,} values")
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
        with nothing_fetched():
            made = make(loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the {kind} in {folder} fails ({reason_of(error)})") from error
    return {name: value for name, value in made.items() if name in accepted and isinstance(value, Tensor)}


def _check_made(processor: Any) -> None:
    """Raise InputError where what a stranger's processor makes of one picture, however small, would be too much."""
    told = processor.to_dict()
    merges = "merge_size" in told  # whose edges are numbers of pixels

    def pixels(name: str, value: Any) -> int:
        if isinstance(value, dict):
            whole = [side for side in map(value.get, ("height", "width")) if isinstance(side, int)]
            area = math.prod(whole) if len(whole) == 2 else 0
            return max([area, *(pixels(key, each) for key, each in value.items())], default=0)
        if isinstance(value, (list, tuple)):  # the sizes that a picture may be cut to
            area = math.prod(value) if len(value) == 2 and all(isinstance(side, int) for side in value) else 0
            return max([area, *(pixels(name, each) for each in value)], default=0)
        if not isinstance(value, int) or isinstance(value, bool):
            return 0
        if name == "max_patches":
            return value * 256
        if name == "min_pixels" or (merges and name == "shortest_edge"):
            return value
        return value**2 if name in ("shortest_edge", "size") else 0

    for name, value in told.items():
        if pixels(name, value) > _MOST_PIXELS_MADE:
            raise InputError(
                f"the model's own image processor makes more than {_MOST_PIXELS_MADE:,} pixels of one ({name})"
            )


def distinct_patches(pixels: Tensor, patch: int | None) -> int | None:
    """How many different patches of side `patch` there are in (B, C, H, W); None where it does not divide them."""
    if not patch or pixels.ndim != 4 or pixels.shape[-1] % patch or pixels.shape[-2] % patch:
        return None
    patches = pixels.unfold(2, patch, patch).unfold(3, patch, patch)
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, pixels.shape[1] * patch * patch)
    return len({row.tobytes() for row in flat.numpy()})


def pictures_of(crops: list[Crop], make: Callable[[Any], Any] = lambda picture: picture) -> list[Any]:
    """What `make` makes of each picture, in their order; of the photographs one is decoded at a time."""
    places: dict[Photo, list[int]] = {}
    for place, crop in enumerate(crops):
        places.setdefault(crop.photo, []).append(place)
    made: list[Any] = [None] * len(crops)
    for photo, wanted in places.items():
        with photo.opened() as opened:
            decoded = opened.convert("RGB")
        for place in wanted:
            made[place] = make(crops[place].out_of(decoded))
    return made


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
