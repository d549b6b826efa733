"""One read's input for one model: which part of the model is read, in what form it takes its input, and how much.

The form is found by trying (`suite/tracing/minimal_inputs.py`): the arguments on which the model runs, with their
shapes. They are then filled: tokens, photographs, sound. What else the forward pass needs is made up, and the
description says so.
Shapes: B items, T positions.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.suite.architectures.last_norm import width_and_rows
from deadbench.suite.architectures.locate import find_final_norm
from deadbench.suite.architectures.norms import FinalNorm
from deadbench.suite.architectures.parts import PICTURE_NAMES, SOUND_NAMES
from deadbench.suite.errors import InputError, first_line, reason_of
from deadbench.suite.inputs.batches import Batch, Inputs
from deadbench.suite.inputs.early_checks import check_positions
from deadbench.suite.inputs.mixed import mixed_batches
from deadbench.suite.inputs.positions import longest, position_tables, tokens_for, without_first
from deadbench.suite.inputs.signals import (
    Crop,
    distinct_patches,
    noise_like,
    own_pictures,
    own_sound,
    photo_crops,
    plain_pictures,
)
from deadbench.suite.inputs.specs import MIXED
from deadbench.suite.inputs.tokens import special_ids, token_batches, vocabulary
from deadbench.suite.tracing.meta_passes import attempts
from deadbench.suite.tracing.minimal_inputs import minimal_inputs, placed

_DECODED = 32  # tokens a decoder is given beside pictures or sound
_RANDOM_IDS = ("input_ids", "decoder_input_ids")


def feed(
    part: nn.Module,
    spec: str,
    *,
    modality: str,
    num_tokens: int,
    sequence_length: int,
    seed: int,
    folder: Path | None,
    batch_tokens: int,
    least_items: int = 1,
    skip_positions: int = 0,
    form: Mapping[str, Tensor] | None = None,
    final: FinalNorm | None = None,
) -> Inputs:
    """Batches for `part` that give at least `num_tokens` rows of its final norm's output.

    Args:
        part: what `part_of` returns, on any device.
        spec: what `--input` says.
        modality: text, image or audio.
        num_tokens: rows wanted; exactly so many come of tokens, whole items of pictures and sound.
        sequence_length: of tokens, at most what the model has positions for.
        seed: of random tokens, crops and noise.
        folder: the checkpoint's, with its tokenizer or processor.
        batch_tokens: rows of one forward pass, about.
        least_items: pictures or sounds there must be, however many rows each gives.
        skip_positions: first tokens of each sequence that are run and do not count as rows.
        form: the minimal input that the part runs on, where it is known; else it is looked for.
        final: the part's final norm, where it is known; else it is looked for where its rows must be counted.

    Raises:
        InputError: an input that cannot be had, or a form that nothing here makes.
    """
    if spec.partition(":")[0] in MIXED:
        if skip_positions:
            raise InputError("skip_positions leaves out tokens of text; of pictures and text give image-text/text")
        return mixed_batches(
            part, spec, num_tokens=num_tokens, seed=seed, folder=folder, batch_tokens=batch_tokens,
            least_items=least_items,
        )  # fmt: skip
    rows_of_form = final.rows_per_item if final is not None and form is not None else 0  # 0: not known
    form = working_form(part) if form is None else form
    if modality == "text":
        return _feed_tokens(
            part, spec, form, final, num_tokens, sequence_length, seed, folder, batch_tokens, skip_positions
        )
    if skip_positions:
        raise InputError(f"skip_positions leaves out tokens of text; an input of {modality} has none")
    names = PICTURE_NAMES if modality == "image" else SOUND_NAMES
    main = next((name for name in names if name in form), None)
    if main is None:
        raise InputError(f"the model takes {', '.join(sorted(form))}, no {modality}; its modality is another")
    accepted = set(inspect.signature(part.forward).parameters)

    def made(count: int) -> tuple[dict[str, Tensor], bool]:
        if modality == "image":
            crops = photo_crops(spec, count, seed)
            own = own_pictures(crops, folder, accepted)
            main_only = {} if own else {main: _pictures(crops, form[main])}
        else:
            own = own_sound(count, seed, folder, accepted)
            main_only = {} if own else {main: noise_like(form[main], count, seed)}
        filled = own or main_only
        others = {n: _filled(n, t, count, None, seed, part) for n, t in form.items() if n not in filled}
        return filled | others, bool(own)

    sample, own = made(1)
    one = _one(sample, 0)
    as_form = {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in form.items()}
    rows = rows_of_form if rows_of_form and as_form else _rows(part, one, final)  # which takes minutes of a film
    count = max(least_items, -(-num_tokens // rows))
    everything, _ = made(count)
    packed = everything[main].shape[0] != count if main in everything else False
    per_batch = 1 if packed or (form[main].ndim == 2 and main == "hidden_states") else max(1, batch_tokens // rows)
    batches = [
        Batch(_slice(everything, i, per_batch, count), rows=rows * min(per_batch, count - i))
        for i in range(0, count, per_batch)
    ]
    pixels = everything.get("pixel_values")
    patch = getattr(part.config, "patch_size", None)
    distinct = distinct_patches(pixels, patch) if pixels is not None and isinstance(patch, int) else None
    how = "the model's own processor" if own else "scaled to [-1, 1]" if modality == "image" else "unit variance"
    return Inputs(batches, count * rows, distinct, spec if own else f"{spec} ({how})")


def _feed_tokens(
    part: nn.Module,
    spec: str,
    form: Mapping[str, Tensor],
    final: FinalNorm | None,
    num_tokens: int,
    sequence_length: int,
    seed: int,
    folder: Path | None,
    batch_tokens: int,
    skip_positions: int,
) -> Inputs:
    if "input_ids" not in form:
        raise InputError(f"the model takes {', '.join(sorted(form))}, no text; its modality is another")
    config: Any = part.config
    text_config = config.get_text_config()
    others = {name: tensor for name, tensor in form.items() if name != "input_ids"}
    length = form["input_ids"].shape[1]
    whole_rows = not others or (final.rows_per_item if final else _rows(part, form, None)) == length
    sequence_length = min(sequence_length, num_tokens, longest(part))

    def tokens(count: int) -> Inputs:
        made = token_batches(
            spec,
            vocab_size=vocabulary(text_config),
            num_tokens=count,
            sequence_length=sequence_length,
            seed=seed,
            tokenizer_folder=folder,
            batch_tokens=batch_tokens,
            avoided_ids=special_ids(config),
        )
        if getattr(config, "position_embedding_type", "absolute") == "absolute":
            length = max(batch.model_inputs["input_ids"].shape[1] for batch in made.batches)
            check_positions(length, max(position_tables(part), default=None))  # a smaller table may be another tower's
        return made

    if skip_positions and (not whole_rows or skip_positions >= sequence_length):
        whose = f"sequences of {sequence_length} tokens" if whole_rows else "rows of pictures and text together"
        raise InputError(f"skip_positions {skip_positions} cannot be left out of {whose}; give less in the protocol")
    if not whole_rows:  # rows of pictures and text together: whole sequences only, and as many as give the rows
        sample = Batch({"input_ids": torch.full((1, sequence_length), 5)})
        rows = _rows(part, _accompanied(sample, others, seed, part, length).model_inputs, final)
        made = tokens(-(-num_tokens // rows) * sequence_length)
        count = rows * (made.num_tokens // sequence_length)
        made = replace(made, batches=[replace(b, rows=rows * len(b.model_inputs["input_ids"])) for b in made.batches])
    else:
        made = without_first(tokens(tokens_for(num_tokens, sequence_length, skip_positions)), skip_positions)
        count = made.num_tokens
    batches = [_accompanied(batch, others, seed + i, part, length) for i, batch in enumerate(made.batches)]
    known = [name for name in others if name != "decoder_input_ids"]
    beside = f" (with {', '.join(known)} made up)" if known else ""
    return Inputs(batches, count, made.num_distinct, made.description + beside)


def _accompanied(batch: Batch, others: dict[str, Tensor], seed: int, part: nn.Module, length: int) -> Batch:
    """`batch` with the other arguments, of its batch size and, where the form had one entry a token, of its length."""
    ids = batch.model_inputs["input_ids"]
    added = {n: _filled(n, t, len(ids), (length, ids.shape[1]), seed, part) for n, t in others.items()}
    if "decoder_input_ids" in added:
        added["decoder_input_ids"] = ids
    return replace(batch, model_inputs=added | batch.model_inputs)


def _filled(name: str, form: Tensor, count: int, lengths: tuple[int, int] | None, seed: int, part: nn.Module) -> Tensor:
    if name in _RANDOM_IDS and lengths is None:
        generator = torch.Generator().manual_seed(seed)
        config: Any = part.config
        return torch.randint(3, config.get_text_config().vocab_size, (count, _DECODED), generator=generator)
    if name in PICTURE_NAMES[:2] and form.ndim in (4, 5):
        return _pictures(photo_crops("image", count, seed), form)
    if name in SOUND_NAMES:
        return noise_like(form, count, seed)
    if lengths is not None and form.ndim > 1 and form.shape[1] == lengths[0]:
        form = form[:, :1].expand(-1, lengths[1], *form.shape[2:])
    return form.expand(count, *form.shape[1:]).clone() if form.shape[0] == 1 else form


def _pictures(crops: list[Crop], form: Tensor) -> Tensor:
    """As `plain_pictures`; where the form has no batch dimension, the patches of all pictures in one row."""
    if form.ndim == 2:
        return plain_pictures(crops, form[None]).flatten(0, 1)
    return plain_pictures(crops, form)


def working_form(part: nn.Module) -> dict[str, Tensor]:
    """The first minimal input on which `part` runs, on the CPU.

    Raises:
        InputError: it runs on none.
    """
    failure = "no input is known for its arguments"
    for candidate in minimal_inputs(part, "cpu"):
        try:
            with torch.no_grad():
                part(**placed(candidate, part))
        except Exception as error:
            failure = first_line(error)
            continue
        return {name: value for name, value in candidate.items() if isinstance(value, Tensor)}
    raise InputError(f"{type(part).__name__} runs on no input that is known here ({failure[:200]})")


def _rows(part: nn.Module, inputs: Mapping[str, Tensor], final: FinalNorm | None) -> int:
    """Rows of the final norm's output that one item gives."""
    if final is not None:
        return _rows_out_of(part, inputs, final)
    found = find_final_norm(part, inputs)
    if found.path is None:
        raise InputError(f"the final norm is not reached by this input: {found.reason}")
    return found.rows_per_item


def _rows_out_of(part: nn.Module, inputs: Mapping[str, Tensor], final: FinalNorm) -> int:
    """The same where the norm is known: what it returns is looked at."""
    assert final.path is not None
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    failure = "it is not called"
    handle = part.get_submodule(final.path).register_forward_hook(keep)
    try:
        for attempt in attempts(part):
            outputs.clear()
            try:
                with torch.no_grad(), attempt():
                    part(**placed(inputs, part))
            except Exception as error:  # whatever an architecture's code raises
                failure = reason_of(error)
                continue
            if outputs:
                return width_and_rows(outputs[-1], final.behaviour)[1]
    finally:
        handle.remove()
    raise InputError(f"the final norm is not reached by this input: {failure}")


def _one(inputs: dict[str, Tensor], item: int) -> dict[str, Tensor]:
    return _slice(inputs, item, 1, 1)


def _slice(inputs: dict[str, Tensor], start: int, per_batch: int, count: int) -> dict[str, Tensor]:
    """Items `start` to `start + per_batch`; of a row of all items' patches, its share."""
    part = {}
    for name, tensor in inputs.items():
        share = max(1, tensor.shape[0] // count)
        part[name] = tensor[start * share : (start + per_batch) * share] if tensor.shape[0] >= count else tensor
    return part
