"""What every engine gives: the final norm's traffic of one batch after another, and the blocks' inputs meanwhile."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import torch
from torch import Tensor, nn

from deadbench.suite.architectures.resolve import Resolved
from deadbench.suite.inputs.batches import Batch
from deadbench.suite.ranks import Ranks

BATCH_TOKENS = 4096  # a forward pass of this size keeps every core busy and a 1 B model's activations below 2 GB
_SMALL = 7e9  # parameters of a model whose batches of so many leave a device idle between kernels
_MOST_BATCHES, _BATCH_SHARE = 4, 8  # in one; of the memory that is free beside the model, it takes one part in so many


def batches_in_one(on_device: bool, num_parameters: int, token_bytes: int, free: int, wanted: float) -> int:
    """How many batches of `BATCH_TOKENS` pass as one: more on a device, where the model is small and memory allows.

    Args:
        on_device: whether an accelerator runs it.
        num_parameters: of the model.
        token_bytes: what one token takes there while it passes.
        free: bytes beside the model.
        wanted: tokens that this process passes.

    Example:
        >>> batches_in_one(True, 10**9, 400_000, 100 * 2**30, 65536), batches_in_one(True, 8 * 10**9, 1, 2**40, 65536)
        (4, 1)
    """
    count = 1
    while (
        on_device
        and num_parameters < _SMALL
        and count < _MOST_BATCHES
        and 2 * count * BATCH_TOKENS <= min(wanted, free / _BATCH_SHARE / token_bytes)
    ):
        count *= 2
    return count


@dataclass
class ForwardPass:
    """The captured (input, output) of one norm in one forward pass.

    `seconds()` are (those of the model alone, those of the taps); who asks waits until the device is through.
    """

    input_BTD: Tensor
    output_BTD: Tensor
    seconds: Callable[[], tuple[float, float]]
    num_block_calls: int


@dataclass(frozen=True)
class Blocks:
    """The blocks to watch, and who is told: `on_input(call, stream, batch)`, calls counted from 0 in each pass."""

    modules: list[nn.Module]
    on_input: Callable[[int, Tensor, Batch], None]


@dataclass(frozen=True)
class Swept:
    """An engine that runs block by block has taken another batch through a block.

    Attributes:
        num_done: of `num_blocks` block calls, those that every batch has passed.
        num_ahead: of `num_batches`, those that have passed one more.
        seconds: of the model since it last told, and `tap_seconds` of the taps.
        state: where the sweep stands at this moment, batch by batch, for another process to go on from.
    """

    num_done: int
    num_blocks: int
    num_ahead: int
    num_batches: int
    seconds: float
    tap_seconds: float
    state: Callable[[], Iterator[pa.RecordBatch]]


class Engine(Protocol):
    """What a read asks of an engine whose forward passes come to its process; `TorchEngine` says what each is."""

    tap_by_tap: ClassVar[bool]
    in_pieces: ClassVar[bool]
    device: torch.device
    load_seconds: float
    detail: str
    ranks: Ranks
    resolved: Resolved | None
    absent: list[str]

    def load_random(self, config: Any, seed: int, dtype: torch.dtype) -> nn.Module:
        """The model that `config` describes, as transformers initialises it."""

    def load_trained(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The checkpoint in `folder`."""

    def passes(
        self, model: nn.Module, norm: nn.Module, batches: list[Batch], blocks: Blocks | None = None
    ) -> Iterator[tuple[Batch, ForwardPass] | Swept]:
        """Run every batch once, yielding what entered and left `norm`; `blocks` are watched meanwhile."""

    def peak_device_bytes(self) -> int | None:
        """Peak accelerator memory of this process; None on CPU."""

    def device_name(self) -> str:
        """What the device calls itself."""


class SweepingEngine(Engine, Protocol):
    """An engine that is `tap_by_tap`: its passes are one sweep over the blocks, of all batches."""

    def go_on_from(self, sweep: Iterable[pa.RecordBatch]) -> None:
        """Have the next passes, over the same batches, begin where a sweep has told that it stood."""


class WorkerExtension(Protocol):
    """What a read asks of an engine that runs in workers of its own, each of which reads there; see `StreamReader`."""

    def deadbench_free(self) -> int:
        """Bytes that accumulators can take where this worker's part of the model lives."""

    def deadbench_begin(self, sought: bytes, num_tokens: int, dtype: str, stride: int) -> None:
        """Hook the model; the pass that follows finds the final norm; each `stride`-th tap is read."""

    def deadbench_pass(self, first: int, count: int) -> None:
        """Read the taps `first` to `first + count - 1` in the pass that follows."""

    def deadbench_end_pass(self) -> bytes:
        """Decompose the taps of the pass; JSON of how many there are, or of what went wrong."""

    def deadbench_finish(self) -> list[bytes]:
        """Arrow tables reads, spectra and blocks of rank 0; nothing from other ranks."""


def mismatch(name: str, stored: Sequence[int], expected: Sequence[int]) -> str:
    """That a checkpoint's tensor is not of the configuration's shape."""
    return (
        f"the checkpoint does not match config.json: {name} is {list(stored)} in the weights and {list(expected)} by "
        "the configuration; take both from the same place"
    )
