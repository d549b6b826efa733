"""Pictures and text in one sequence: each photograph, then its caption, for a model that takes both.

    image-text[:DIR]            every token counts
    image-text/text[:DIR]       the same sequences run, and the tokens of text alone count
    image-text/picture[:DIR]    the same, and the places of pictures alone count

How many places a picture takes is what the model's own `get_image_features` gives for it; they are marked by the image
token's id. Where there is no processor, pictures are the plain ones of `suite/inputs/signals.py`; where there is no
folder (a random read), captions are seeded random ids, and the description says so. Shapes: S sequences, T positions.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deadbench.suite.errors import InputError, reason_of
from deadbench.suite.inputs.batches import Batch, Inputs
from deadbench.suite.inputs.early_checks import check_positions
from deadbench.suite.inputs.positions import longest
from deadbench.suite.inputs.signals import own_pictures, photo_crops, plain_pictures
from deadbench.suite.inputs.specs import captions
from deadbench.suite.inputs.tokens import load_tokenizer, special_ids, special_tokens, vocabulary
from deadbench.suite.tracing.argument_values import Offers
from deadbench.suite.tracing.meta_passes import attempts
from deadbench.suite.tracing.minimal_inputs import placed

_MADE_UP = 48  # tokens of a caption that is made up
_MOST_PARTS = 6  # into which a picture of the tower's own size is cut, itself counted
_AROUND = (("boi_token_id", "vision_start_token_id"), ("eoi_token_id", "vision_end_token_id"))
_WORDS = ("language_model", "text_model")
_MARKS = ("mm_token_type_ids", "token_type_ids")  # one where a picture is


@dataclass(frozen=True)
class _Item:
    """One photograph with its caption, as the model takes them."""

    ids_T: list[int]
    pictures: dict[str, Tensor]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Items of one kind go into one batch."""
        return (len(self.ids_T), *((name, tuple(t.shape)) for name, t in sorted(self.pictures.items())))


def mixed_batches(
    part: nn.Module,
    spec: str,
    *,
    num_tokens: int,
    seed: int,
    folder: Path | None,
    batch_tokens: int,
    least_items: int = 1,
) -> Inputs:
    """Batches of photographs with captions that give at least `num_tokens` rows of the kind that `spec` counts.

    Raises:
        InputError: the model does not take both, or a photograph, caption, processor or tokenizer cannot be had.
    """
    kind, _, directory = spec.partition(":")
    counted = kind.partition("/")[2]
    image_id = getattr(part.config, "image_token_id", None)
    if not hasattr(part, "get_image_features") or not isinstance(image_id, int):
        raise InputError(f"input {spec!r}: {type(part).__name__} takes no pictures in its text; give --input text")
    made_up = folder is None
    items: list[_Item] = []
    rows = 0
    for item in _items(part, spec, directory, image_id, seed, folder):
        check_positions(len(item.ids_T), longest(part))
        items.append(item)
        places = item.ids_T.count(image_id)
        rows += {"": len(item.ids_T), "text": len(item.ids_T) - places, "picture": places}[counted]
        if rows >= num_tokens and len(items) >= least_items:
            break
    batches = []
    alike: dict[tuple[Any, ...], list[_Item]] = {}
    for item in items:
        alike.setdefault(item.kind, []).append(item)
    accepted = inspect.signature(part.forward).parameters
    for group in alike.values():
        per_batch = max(1, batch_tokens // len(group[0].ids_T))
        for start in range(0, len(group), per_batch):
            batches.append(_batch(group[start : start + per_batch], image_id, counted, accepted))
    told = [*(["captions made up: no tokenizer"] if made_up else []), *([f"{counted} tokens count"] if counted else [])]
    return Inputs(batches, rows, None, f"{spec} ({'; '.join(told)})" if told else spec)


def _items(
    part: nn.Module, spec: str, directory: str, image_id: int, seed: int, folder: Path | None
) -> Iterator[_Item]:
    """Each photograph with its caption, then crops of them, without end."""
    config: Any = part.config
    tokenizer = None if folder is None else load_tokenizer(spec, folder)
    prefix, suffix = ([], []) if tokenizer is None else special_tokens(tokenizer)
    begin, end = ([getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)]
                  for names in _AROUND)  # fmt: skip
    texts, vocab_size = captions(directory), vocabulary(config.get_text_config())
    form = _plain_form(part)
    counts: dict[tuple[Any, ...], int] = {}
    done, count = 0, len(texts)
    while True:
        crops = photo_crops(f"image:{directory}", count, seed)
        for place in range(done, count):
            pictures = own_pictures([crops[place]], folder, _accepted(part)) or _plain(crops[place], form, part)
            # What the model makes of a picture depends on its size alone, and on the grid that says it.
            grid = tuple(
                tuple(t.flatten().tolist()) for name, t in sorted(pictures.items()) if not t.is_floating_point()
            )
            key = (*(tuple(t.shape) for _, t in sorted(pictures.items())), grid)
            if key not in counts:
                counts[key] = _places(part, pictures)
            if tokenizer is None:
                text = _random_ids(part, seed, place)
            else:
                text = tokenizer(texts[place % len(texts)], add_special_tokens=False, verbose=False)["input_ids"]
                _check_caption(text, image_id, vocab_size)
            yield _Item([*prefix, *begin, *[image_id] * counts[key], *end, *text, *suffix], pictures)
        done, count = count, 2 * count


def _check_caption(ids: list[int], image_id: int, vocab_size: int) -> None:
    """Raise InputError where a caption would be taken for a picture, or has ids that the model does not know."""
    if image_id in ids:
        raise InputError(f"a caption has the token {image_id}, by which the model knows a picture; write it otherwise")
    if max(ids, default=0) >= vocab_size:
        raise InputError(f"the tokenizer gives id {max(ids)}, the model knows {vocab_size}: not this model's tokenizer")


def _batch(items: list[_Item], image_id: int, counted: str, accepted: Mapping[str, Any]) -> Batch:
    ids_ST = torch.tensor([item.ids_T for item in items])
    is_picture_ST = ids_ST == image_id
    pictures = {name: torch.cat([item.pictures[name] for item in items]) for name in items[0].pictures}
    marks = {name: is_picture_ST.long() for name in _MARKS if name in accepted}
    mask_ST = {"": None, "text": ~is_picture_ST, "picture": is_picture_ST}[counted]
    return Batch({"input_ids": ids_ST} | pictures | marks, mask_ST)


def _accepted(part: nn.Module) -> set[str]:
    return set(inspect.signature(part.forward).parameters) - {"input_ids", "attention_mask", *_MARKS}


def _plain_form(part: nn.Module) -> dict[str, Tensor]:
    """The first likely form of one picture, with what goes with it, that the model's tower takes.

    Raises:
        InputError: it takes none.
    """
    failure = "it takes no pixel_values"
    for form in _likely_forms(part):
        try:
            _places(part, form)
        except InputError as error:
            failure = str(error)
            continue
        return form
    raise InputError(f"{type(part).__name__} takes pictures in no form that is known here ({failure[:200]})")


def _likely_forms(part: nn.Module) -> Iterator[dict[str, Tensor]]:
    config: Any = part.config
    offers, accepted = Offers(getattr(config, "vision_config", config), torch.device("cpu")), _accepted(part)
    likely = offers("pixel_values") if "pixel_values" in accepted else []
    if "image_grid_thw" in accepted:  # a grid is of the patches of all pictures in a row
        grid = offers("grid_thw")[0]
        yield from ({"pixel_values": pixels, "image_grid_thw": grid} for pixels in likely if pixels.ndim == 2)
    elif "image_position_ids" in accepted:  # (x, y) of each patch of a picture
        places = offers("pixel_position_ids")[0].flip(-1)
        fitting = (pixels for pixels in likely if pixels.ndim == 3 and pixels.shape[1] == places.shape[1])
        yield from ({"pixel_values": pixels, "image_position_ids": places} for pixels in fitting)
    else:
        yield from ({"pixel_values": pixels[:, :1] if pixels.ndim == 5 else pixels} for pixels in likely)
    if "image_sizes" in accepted:  # a picture, or itself and its parts, as many as its size asks for
        for pixels in (each for each in likely if each.ndim == 4):
            size = torch.tensor([pixels.shape[-2:]])
            yield {"pixel_values": pixels, "image_sizes": size}
            for count in range(2, _MOST_PARTS + 1):
                yield {"pixel_values": pixels[:, None].repeat(1, count, 1, 1, 1), "image_sizes": size}


def _plain(crop: Any, form: Mapping[str, Tensor], part: nn.Module) -> dict[str, Tensor]:
    pixels = form["pixel_values"]
    if pixels.ndim > 2:
        return {**form, "pixel_values": plain_pictures([crop], pixels)}
    config: Any = part.config
    frames = getattr(config.vision_config, "temporal_patch_size", 1)  # a still picture is each of them
    still = torch.empty(1, len(pixels), pixels.shape[1] // frames)
    return {**form, "pixel_values": plain_pictures([crop], still)[0].repeat(1, frames)}


def _places(part: nn.Module, pictures: Mapping[str, Tensor]) -> int:
    """How many tokens the model makes of one item's pictures.

    Raises:
        InputError: it makes none of them.
    """
    whole: Any = part
    known = inspect.signature(whole.get_image_features).parameters
    given = placed({name: tensor for name, tensor in pictures.items() if name in known}, part)
    failure: Exception | None = None
    for attempt in attempts(part):
        try:
            with torch.no_grad(), attempt():
                made = whole.get_image_features(**given)
        except Exception as error:  # whatever an architecture's code raises
            failure = error
            continue
        made = getattr(made, "pooler_output", made)
        features = made if isinstance(made, (list, tuple)) else [made]
        return sum(each.numel() // each.shape[-1] for each in features)
    assert failure is not None
    if "image_grid_thw" in pictures and next(part.parameters()).is_meta:  # a tower that reads the grid, which is told
        config: Any = part.config
        merged: int = config.vision_config.spatial_merge_size**2  # patches in a place
        return int(pictures["image_grid_thw"].prod(-1).sum()) // merged
    if next(part.parameters()).is_meta:  # a tower that reads values: of the picture's size and places, not of its own
        return _places(_tower_alone(part), pictures)
    raise InputError(f"{type(part).__name__} makes nothing of the picture: {reason_of(failure)}") from failure


def _tower_alone(part: nn.Module) -> nn.Module:
    """A part on the meta device as one on the CPU, with any values, and without what makes words of its states."""
    tower = copy.deepcopy(part)
    for name in _WORDS:
        if hasattr(tower, name):
            setattr(tower, name, nn.Identity())
    tower = tower.to_empty(device="cpu")  # of which no page is written, and so none is taken
    for buffer in tower.buffers():
        buffer.zero_()
    return tower


def _random_ids(part: nn.Module, seed: int, place: int) -> list[int]:
    config: Any = part.config
    avoided = set(special_ids(config))
    drawn = np.random.default_rng((seed, place)).integers(0, vocabulary(config.get_text_config()), 8 * _MADE_UP)
    return list(itertools.islice((int(each) for each in drawn if each not in avoided), _MADE_UP))
