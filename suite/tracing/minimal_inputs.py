"""Minimal inputs for the forward pass of any transformers model, from its signature and its configuration.

The likely values of its arguments (`suite/tracing/argument_values.py`) are put together and tried in turn; the first
that the model runs on will do, since only the flow through it is looked at.
"""

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.suite.tracing.argument_values import Offers

# What stands for another argument, or goes into the middle of the model.
_INSTEAD = ("inputs_embeds", "hidden_states", "labels", "query_embeds", "inputs", "decoder_input_ids",
            "past_key_values")  # fmt: skip
# What a decoder starts from.
_DECODED = ("decoder_input_ids", "decoder_input_values", "future_values", "future_time_features")
# Optional arguments without which a model of several towers does not run.
_COMPANIONS = ("input_ids", "pixel_values", "bbox", "image", "visual_feats", "visual_pos", "input_features",
               "input_values", "attention_mask", "pixel_attention_mask", "spatial_shapes")  # fmt: skip
_LARGE = 2**20  # numbers


def minimal_inputs(model: nn.Module, device: str | None = None) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try, likeliest first; tensors are on `device`, or on the model's.

    First the main input with what the signature demands, then with more and more of what it allows.
    """
    parameters = inspect.signature(model.forward).parameters
    offers = Offers(model.config, torch.device(device) if device else next(iter(model.parameters())).device)
    name = getattr(model, "main_input_name", "input_ids")
    name = name[0] if isinstance(name, list) and name else name
    name = name if isinstance(name, str) and name in parameters else _first_known(parameters)
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    decoding = [*required, *(n for n in _DECODED if n in parameters)]
    companions = [*required, *(n for n in _COMPANIONS if n in parameters), *decoding[len(required) :]]
    everything = [*companions, *(n for n in parameters if n not in _INSTEAD and n in offers)]
    kinds = [required, decoding, companions, everything]
    if "past_key_values" in parameters:
        kinds.append([*required, "past_key_values"])
    attempts = [_with(name, names, offers) for names in dict.fromkeys(map(tuple, kinds))]
    if "input_ids" in parameters and name != "input_ids":  # a model of pictures and words may do with words
        attempts.append(_with("input_ids", required, offers))
    cached = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters.values())
    tried: set[tuple[Any, ...]] = set()
    for inputs in itertools.chain.from_iterable(attempts):
        form = tuple(_form(argument, value) for argument, value in inputs.items())
        if form in tried:  # a signature that demands nothing has its main input in each kind
            continue
        tried.add(form)
        yield inputs
        if cached and "input_ids" in inputs:
            yield inputs | {"use_cache": False}  # some caches refuse the layers of a small configuration


def _form(name: str, value: Any) -> tuple[Any, ...]:
    """What tells an argument from another by which a model may fail: of noise the shape, of whole numbers all."""
    if not isinstance(value, Tensor):
        return name, type(value)
    whole = () if value.is_floating_point() else (id(value),) if value.is_meta else tuple(value.flatten().tolist())
    return name, value.dtype, tuple(value.shape), whole


def takes_large(model: nn.Module) -> bool:
    """Whether an input of a model is a film, or a picture of 600 pixels a side: a pass that is kept is gigabytes."""
    given = (value for inputs in minimal_inputs(model, "cpu") for value in inputs.values())
    return any(isinstance(value, Tensor) and value.numel() > _LARGE for value in given)


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


def placed(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """`inputs` where the model is, and its floating ones in the model's dtype."""
    like = next(p for p in model.parameters() if p.is_floating_point())

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    return {name: moved(value) for name, value in inputs.items()}


def _with(main: str, names: Sequence[str], offers: Offers) -> Iterator[dict[str, Any]]:
    """The main input with the first likely form of every other one, then the other forms of those."""
    alone = [{main: value} for value in offers(main)]
    others = [[(n, value) for value in offers(n)] for n in dict.fromkeys(names) if n != main]
    if any(not each for each in others):
        return
    for first in alone:
        yield first | {name: value for (name, value), *_ in others}
    for combination in itertools.islice(itertools.product(*others), 1, 12):
        for first in alone:
            yield first | dict(combination)


def _first_known(parameters: Any) -> str:
    known = ("input_ids", "pixel_values", "input_values", "input_features", "pixel_values_videos", "hidden_states")
    return next((n for n in known if n in parameters), next(iter(parameters)))
