"""nanoGPT's checkpoints as the GPT-2 of transformers that they are: `model_args` beside the weights.

Its maps are stored the other way round, and where it has no shifts those of GPT-2 are zero.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from deadbench.suite.checkpoints.tensors import Piece, TensorEntry, contiguous_strides

_MAPS = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
_SHIFTED = re.compile(r"(^|\.)(ln_1|ln_2|ln_f|c_attn|c_proj|c_fc)\.weight$")
_COUNTS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def recorded_config(value: Any) -> dict[str, Any] | None:
    """The config.json of the same model; None where the saved `value` is not nanoGPT's."""
    told = value.get("model_args") if isinstance(value, dict) else None
    if not isinstance(told, dict) or not all(type(told.get(key)) is int for key in _COUNTS):
        return None
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": told["n_layer"],
        "n_head": told["n_head"],
        "n_embd": told["n_embd"],
        "n_positions": told["block_size"],
        "vocab_size": told["vocab_size"],
        "activation_function": "gelu",
    }


def as_gpt2(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """The tensors as transformers' GPT-2 has them."""
    known = {entry.name: entry for entry in entries}
    for entry in list(known.values()):
        if _SHIFTED.search(entry.name):
            shift = f"{entry.name.removesuffix('weight')}bias"
            if shift not in known:
                nothing = Piece(entry.file, 0, 0, (0,), (0,))
                known[shift] = replace(entry, name=shift, shape=entry.shape[:1], start=0, end=0, pieces=(nothing,))
        if _MAPS.search(entry.name) and len(entry.shape) == 2:
            known[entry.name] = replace(
                entry, shape=entry.shape[::-1], pieces=tuple(_turned(piece) for piece in entry.pieces)
            )
    return list(known.values())


def _turned(piece: Piece) -> Piece:
    strides = piece.strides or contiguous_strides(piece.shape)
    return replace(piece, place=piece.place[::-1], shape=piece.shape[::-1], strides=strides[::-1])
