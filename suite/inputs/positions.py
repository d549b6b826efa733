"""Positions of token sequences: how many a model knows, and which of them count.

Shapes: S sequences, T positions.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deadbench.suite.inputs.batches import Inputs

_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe", "char_position_embeddings")
_LENGTH_KEYS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_sequence_length", "max_seq_len")


def longest(part: nn.Module) -> int:
    """How many positions the model knows: what its configuration says, and what its position tables hold."""
    config: Any = part.config
    said = [getattr(c, key, None) for c in (config, config.get_text_config()) for key in _LENGTH_KEYS]
    limits = [n for n in said if isinstance(n, int) and n > 0]
    return min([*limits, *position_tables(part)], default=1 << 30)


def position_tables(part: nn.Module) -> Iterator[int]:
    """Positions of each table of them."""
    for name, module in part.named_modules():
        # x_, y_, h_ and w_position_embeddings of document models are of the page, not of the text.
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and leaf in _POSITION_TABLES:
            taken = getattr(module, "offset", 0) or (module.padding_idx + 1 if module.padding_idx is not None else 0)
            yield module.num_embeddings - int(taken)


def tokens_for(num_rows: int, length: int, skipped: int) -> int:
    """How many tokens, in sequences of `length`, leave `num_rows` when the first `skipped` of each do not count."""
    whole, rest = divmod(num_rows, length - skipped)
    return whole * length + (rest + skipped if rest else 0)


def without_first(inputs: Inputs, num_positions: int) -> Inputs:
    """Token inputs of which the first positions of each sequence run like the others and do not count."""
    if not num_positions:
        return inputs
    batches = []
    for batch in inputs.batches:
        ids_ST = batch.model_inputs["input_ids"]
        mask_ST = torch.ones_like(ids_ST, dtype=torch.bool) if batch.mask_ST is None else batch.mask_ST
        batches.append(replace(batch, mask_ST=mask_ST & (mask_ST.cumsum(1) > num_positions)))
    return replace(inputs, batches=batches, num_tokens=sum(batch.num_rows for batch in batches))
