"""How a model takes pictures among its words: in which form, and in how many places of a sequence.

Both are found by running what the model makes of a picture before its words see it. Of a model on the meta device
that is run too, where values do not matter; where they do, its tower alone is.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.suite.errors import InputError, reason_of
from deadbench.suite.inputs.signals import Crop, plain_pictures
from deadbench.suite.tracing.argument_values import Offers
from deadbench.suite.tracing.meta_passes import attempts
from deadbench.suite.tracing.minimal_inputs import placed

UNMARKED = -1  # stands for a picture's token where a mask, and no token, marks it
MARKS = ("mm_token_type_ids", "token_type_ids", "image_embeds_position_mask")  # one where a picture is
_MAIN = ("pixel_values", "image_patches", "pixel_values_images")
_FINE = "high_res_pixel_values"  # the same picture once more, larger
ASKED = "qformer_input_ids"  # what is asked of the picture, in words of its own
_MOST_PARTS = 6  # into which a picture of the tower's own size is cut, itself counted
_WORDS = ("language_model", "text_model")


def picture_token(part: nn.Module, spec: str) -> int:
    """The id of the token that stands where a picture is.

    Raises:
        InputError: pictures have no places among the model's tokens.
    """
    config: Any = part.config
    accepted = inspect.signature(part.forward).parameters
    image_id = getattr(config, "image_token_id", None)
    known = _main_name(part) is not None and _maker(part) is not None
    if known and isinstance(image_id, int):
        return image_id
    if known and "image_embeds_position_mask" in accepted:
        return UNMARKED
    what = "takes no pictures in its text"
    if "pixel_values" in accepted:
        what = "takes pictures beside its tokens, not in their places"
    elif any("pixel_values" in name for name in accepted):
        what = "takes pictures in a form that is not known here"
    raise InputError(f"input {spec!r}: {type(part).__name__} {what}; give --input text")


def taken(part: nn.Module) -> set[str]:
    """Names of what the forward pass takes beside the tokens and their marks."""
    return set(inspect.signature(part.forward).parameters) - {"input_ids", "attention_mask", *MARKS}


def plain_form(part: nn.Module) -> dict[str, Tensor]:
    """The first likely form of one picture, with what goes with it, that the model's tower takes.

    Raises:
        InputError: it takes none.
    """
    failure = ""
    for form in _likely_forms(part):
        try:
            _counted(part, form)
        except InputError as error:
            failure = failure or str(error)
            continue
        return form
    raise InputError(f"{type(part).__name__} takes pictures in no form that is known here ({failure[:200]})")


def plain_picture(crop: Crop, form: Mapping[str, Tensor], part: nn.Module) -> dict[str, Tensor]:
    """`crop` in the form that `plain_form` gave."""
    made = dict(form)
    for name in (*_MAIN, _FINE):
        pixels = form.get(name)
        if pixels is None:
            continue
        if "image_grid_thw" not in form:
            made[name] = plain_pictures([crop], pixels)
            continue
        config: Any = part.config
        frames = getattr(config.vision_config, "temporal_patch_size", 1) if pixels.ndim == 2 else 1
        flat = pixels.flatten(1)  # a still picture is each of the frames
        still = torch.empty(1, len(flat), flat.shape[1] // frames)
        values = plain_pictures([crop], still)[0]
        if pixels.ndim == 4:  # patches that are pictures: channels first
            side = pixels.shape[-1]
            values = values.reshape(len(flat), side, side, -1).permute(0, 3, 1, 2).flatten(1)
        made[name] = values.repeat(1, frames).reshape(pixels.shape)
    return made


def num_places(part: nn.Module, pictures: Mapping[str, Tensor], form: Mapping[str, Tensor]) -> int:
    """How many tokens the model makes of one item's pictures; `form` is the one that `plain_form` gave.

    Raises:
        InputError: it makes none of them.
    """
    grid = pictures.get("image_grid_thw")
    if grid is not None and next(part.parameters()).is_meta:  # to run a tower on each size of picture would take long
        patches = [int(each.prod(-1).sum()) for each in (form["image_grid_thw"], grid)]
        least = _counted(part, form)
        merged, rest = divmod(patches[0], least)
        if not rest and round(merged**0.5) ** 2 == merged:  # a square of patches makes a place, and nothing is added
            return patches[1] // merged
    return _counted(part, pictures)


def _main_name(part: nn.Module) -> str | None:
    accepted = inspect.signature(part.forward).parameters
    return next((name for name in _MAIN if name in accepted), None)


def _maker(part: nn.Module) -> Any:
    """What makes features of pictures; of a model whose queries take them up, what these look at."""
    whole: Any = part
    if hasattr(part, "get_image_features"):
        return whole.get_image_features
    return whole.vision_model.forward if hasattr(part, "qformer") and hasattr(part, "vision_model") else None


def _likely_forms(part: nn.Module) -> Iterator[dict[str, Tensor]]:
    config: Any = part.config
    tower = next((c for c in (getattr(config, key, None) for key in ("vision_config", "vq_config")) if c), config)
    offers, accepted, main = Offers(tower, torch.device("cpu")), taken(part), _main_name(part)
    assert main is not None
    likely = offers("pixel_values")
    beside = {ASKED: offers(ASKED)[0]} if ASKED in accepted else {}
    if _FINE in accepted:
        beside[_FINE] = Offers(config.high_res_vision_config, torch.device("cpu"))("pixel_values")[0]
    if "image_grid_thw" in accepted:  # a grid is of the patches of all pictures in a row
        beside["image_grid_thw"] = offers("grid_thw")[0]
        if "image_merge_sizes" in accepted:
            beside["image_merge_sizes"] = offers("merge_sizes")[0]
        count = int(beside["image_grid_thw"].prod())
        yield from ({main: pixels, **beside} for pixels in likely if len(pixels) == count and pixels.ndim in (2, 4))
    elif "image_position_ids" in accepted:  # (x, y) of each patch of a picture
        places = offers("pixel_position_ids")[0].flip(-1)
        fitting = (pixels for pixels in likely if pixels.ndim == 3 and pixels.shape[1] == places.shape[1])
        yield from ({main: pixels, "image_position_ids": places} for pixels in fitting)
    elif "spatial_shapes" in accepted:  # rows and columns of a picture's patches
        for pixels in (each for each in likely if each.ndim == 3):
            side = round(pixels.shape[1] ** 0.5)
            mask = torch.ones(1, pixels.shape[1], dtype=torch.long)
            yield {main: pixels, "spatial_shapes": torch.tensor([[side, side]]), "pixel_attention_mask": mask}
    else:
        yield from ({main: pixels[:, :1] if pixels.ndim == 5 else pixels, **beside} for pixels in likely)
    if "image_sizes" in accepted:  # a picture, or itself and its parts, as many as its size asks for
        for pixels in (each for each in likely if each.ndim == 4):
            size = torch.tensor([pixels.shape[-2:]])
            yield {main: pixels, "image_sizes": size}
            for count in range(2, _MOST_PARTS + 1):
                yield {main: pixels[:, None].repeat(1, count, 1, 1, 1), "image_sizes": size}


def _counted(part: nn.Module, pictures: Mapping[str, Tensor]) -> int:
    """Places of the pictures, of what is made of them."""
    make, main = _maker(part), _main_name(part)
    known = inspect.signature(make).parameters
    renamed = {"pixel_values" if name == main and name not in known else name: t for name, t in pictures.items()}
    given = placed({name: tensor for name, tensor in renamed.items() if name in known}, part)
    failure: Exception | None = None
    for attempt in attempts(part):
        try:
            with torch.no_grad(), attempt():
                made = make(**given)
        except Exception as error:  # whatever an architecture's code raises
            failure = error
            continue
        if hasattr(part, "qformer"):
            config: Any = part.config
            return int(config.num_query_tokens) * len(pictures[str(main)])
        pooled = getattr(made, "pooler_output", None)
        made = getattr(made, "last_hidden_state", made) if pooled is None else pooled
        features = made if isinstance(made, (list, tuple)) else [made]
        return sum(each.numel() // each.shape[-1] for each in features)
    assert failure is not None
    if next(part.parameters()).is_meta:  # a tower that reads values: of the picture's size and places, not of its own
        return _counted(_tower_alone(part), pictures)
    raise InputError(f"{type(part).__name__} makes nothing of the picture: {reason_of(failure)}") from failure


def _tower_alone(part: nn.Module) -> nn.Module:
    """A part on the meta device as one on the CPU, with any values, and without the blocks that words go through."""
    tower = copy.deepcopy(part)
    for words in [module for name, module in tower.named_modules() if name in _WORDS]:
        for name, module in list(words.named_modules()):
            if isinstance(module, nn.ModuleList):
                words.set_submodule(name, nn.ModuleList())
    tower = tower.to_empty(device="cpu")  # of which no page is written, and so none is taken
    for buffer in tower.buffers():
        buffer.zero_()
    return tower
