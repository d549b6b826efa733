"""What every engine gives: the final norm's traffic of one batch after another, and the blocks' inputs meanwhile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deadbench.suite.inputs.batches import Batch

BATCH_TOKENS = 4096  # a forward pass of this size keeps every core busy and a 1 B model's activations below 2 GB


@dataclass
class ForwardPass:
    """The captured (input, output) of one norm in one forward pass; seconds of the model alone and of the taps."""

    input_BTD: Tensor
    output_BTD: Tensor
    seconds: float
    tap_seconds: float
    num_block_calls: int


@dataclass(frozen=True)
class Blocks:
    """The blocks to watch, and who is told: `on_input(call, stream, batch)`, calls counted from 0 in each pass."""

    modules: list[nn.Module]
    on_input: Callable[[int, Tensor, Batch], None]


@dataclass(frozen=True)
class Swept:
    """An engine that runs block by block: every batch has passed `num_done` of `num_blocks` block calls."""

    num_done: int
    num_blocks: int


def pick_device() -> torch.device:
    """The accelerator that Ray gave this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mismatch(name: str, stored: Sequence[int], expected: Sequence[int]) -> str:
    """That a checkpoint's tensor is not of the configuration's shape."""
    return (
        f"the checkpoint does not match config.json: {name} is {list(stored)} in the weights and {list(expected)} by "
        "the configuration; take both from the same place"
    )
