"""Batches of model inputs, padding marked; no tokenizer, no file."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deadbench.suite.errors import InputError

_ENOUGH = 4  # rows for a direction; with so many different ones, those that repeat do not matter


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of one forward pass, and which positions count (None: all).

    `rows` of the final norm's output will come of it; None: as many as there are token ids that count.
    """

    model_inputs: dict[str, Tensor]
    mask_ST: Tensor | None = None
    rows: int | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the final norm's output that count."""
        if self.rows is not None:
            return self.rows
        return self.model_inputs["input_ids"].numel() if self.mask_ST is None else int(self.mask_ST.sum())

    def items(self) -> Iterator[tuple[bytes, int]]:
        """Of each item a hash of all that the model is given of it, padding left out, and how many rows it gives.

        Where items cannot be told apart (all pictures' patches in one row) the batch is one.
        """
        tensors = {name: t for name, t in sorted(self.model_inputs.items()) if name != "attention_mask"}
        counts = {t.shape[0] if t.ndim else 1 for t in tensors.values()}
        count = counts.pop() if len(counts) == 1 else 1
        if count == 0 or (self.num_rows % count and self.mask_ST is None):
            count = 1
        for item in range(count):
            digest = hashlib.blake2b(digest_size=16)
            mask_T = self.mask_ST[item] if self.mask_ST is not None and count > 1 else None
            for tensor in tensors.values():
                part = tensor[item] if count > 1 else tensor
                if mask_T is not None and part.shape[:1] == mask_T.shape:
                    part = part[mask_T]
                digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            rows = self.num_rows // count if mask_T is None else int(mask_T.sum())
            yield digest.digest(), rows


@dataclass(frozen=True)
class Inputs:
    """All that one read is fed; `num_tokens` rows of the final norm's output will come of it."""

    batches: list[Batch]
    num_tokens: int
    num_distinct: int | None
    description: str

    def share(self, rank: int, size: int) -> tuple[list[Batch], int]:
        """The batches of worker `rank` of `size`, consecutive, and how many rows come before them.

        All shares together are all batches, in order; some are empty where there are fewer batches than workers.
        """
        first, last = (-(-len(self.batches) * place // size) for place in (rank, rank + 1))
        return self.batches[first:last], sum(batch.num_rows for batch in self.batches[:first])


def check_count(num_tokens: int, hidden_size: int) -> None:
    """Raise InputError where the covariance would be rank-deficient by construction, before anything is run."""
    if num_tokens <= hidden_size:
        raise InputError(
            f"{num_tokens} tokens for hidden size {hidden_size}: the rank would be the sample's, not the model's; "
            f"give at least {_ENOUGH * hidden_size}"
        )


def check_distinct(num_distinct: int, num_rows: int, hidden_size: int) -> None:
    """Raise InputError where so few of the rows differ that the rank is that of the input.

    As few as `check_count` refuses; or fewer than four for a direction, where most are repetitions.
    """
    needed = _ENOUGH * hidden_size
    if num_distinct <= hidden_size or (num_distinct < needed and 2 * num_distinct < num_rows):
        raise InputError(
            f"only {num_distinct} of {num_rows} rows differ, for hidden size {hidden_size}: the rank would be the "
            f"input's, not the model's; give input that repeats less, at least {needed} different rows"
        )


def check_inputs(inputs: Inputs, hidden_size: int) -> None:
    """`check_count` and `check_distinct`, as far as the inputs alone tell: equal items give equal rows."""
    check_count(inputs.num_tokens, hidden_size)
    rows: dict[bytes, int] = {}
    total, needed = 0, _ENOUGH * hidden_size
    for batch in inputs.batches:
        for item, count in batch.items():
            if item not in rows:
                rows[item] = count
                total += count
            if total >= needed:
                return
    check_distinct(total, inputs.num_tokens, hidden_size)
