"""Batches of model inputs, padding marked; no tokenizer, no file."""

from dataclasses import dataclass

from torch import Tensor

from deadbench.suite.errors import InputError


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
            f"give at least {4 * hidden_size}"
        )
