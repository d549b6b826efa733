"""Pictures and text in one sequence: each photograph, then its caption, for a model that takes both.

    image-text[:DIR]            every token counts
    image-text/text[:DIR]       the same sequences run, and the tokens of text alone count
    image-text/picture[:DIR]    the same, and the places of pictures alone count

How many places a picture takes is what the model itself makes of it (`suite/inputs/picture_places.py`); they are marked
by the image token's id, or by a mask. Without a processor, pictures are the plain ones of `suite/inputs/signals.py`;
without a folder (a random read), captions are seeded random ids, and the description says so. Shapes: S sequences,
T positions.
"""

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deadbench.suite.errors import InputError
from deadbench.suite.inputs.batches import Batch, Inputs
from deadbench.suite.inputs.early_checks import check_positions
from deadbench.suite.inputs.picture_places import (
    ASKED,
    MARKS,
    UNMARKED,
    num_places,
    picture_token,
    plain_form,
    plain_picture,
    taken,
)
from deadbench.suite.inputs.positions import longest
from deadbench.suite.inputs.signals import own_pictures, photo_crops
from deadbench.suite.inputs.specs import captions
from deadbench.suite.inputs.tokens import load_tokenizer, special_ids, special_tokens, vocabulary

_MADE_UP = 48  # tokens of a caption that is made up
_AROUND = (("boi_token_id", "vision_start_token_id"), ("eoi_token_id", "vision_end_token_id"))
_UNSEEN = 0  # the token below a picture that a mask marks


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
    image_id = picture_token(part, spec)
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
    texts = captions(directory)
    tokenizer = None if folder is None else load_tokenizer(spec, folder, texts)
    prefix, suffix = ([], []) if tokenizer is None else special_tokens(tokenizer)
    begin, end = ([getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)]
                  for names in _AROUND)  # fmt: skip
    vocab_size = vocabulary(config.get_text_config())
    form = plain_form(part)
    asked = {ASKED: form[ASKED]} if ASKED in form else {}
    counts: dict[tuple[Any, ...], int] = {}
    done, count = 0, len(texts)
    while True:
        crops = photo_crops(f"image:{directory}", count, seed)
        for place in range(done, count):
            own = own_pictures([crops[place]], folder, taken(part))
            pictures = asked | own if own else plain_picture(crops[place], form, part)
            # What the model makes of a picture depends on its size alone, and on the grid that says it.
            grid = tuple(
                tuple(t.flatten().tolist()) for name, t in sorted(pictures.items()) if not t.is_floating_point()
            )
            key = (*(tuple(t.shape) for _, t in sorted(pictures.items())), grid)
            if key not in counts:
                counts[key] = num_places(part, pictures, form)
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
    marks = {name: is_picture_ST.long() for name in MARKS if name in accepted}
    mask_ST = {"": None, "text": ~is_picture_ST, "picture": is_picture_ST}[counted]
    ids_ST = ids_ST.masked_fill(ids_ST == UNMARKED, _UNSEEN)
    return Batch({"input_ids": ids_ST} | pictures | marks, mask_ST)


def _random_ids(part: nn.Module, seed: int, place: int) -> list[int]:
    config: Any = part.config
    avoided = set(special_ids(config))
    drawn = np.random.default_rng((seed, place)).integers(0, vocabulary(config.get_text_config()), 8 * _MADE_UP)
    return list(itertools.islice((int(each) for each in drawn if each not in avoided), _MADE_UP))
