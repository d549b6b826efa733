"""States of accumulators from the processes of a group to one of them: as they lie in memory, in pieces, not pickled.

Gram matrices of replicas are summed where each tap is decomposed, in the order of the ranks, so that the sums do not
depend on who was first; they may be of other coordinates or offsets, which no collective sum allows for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from deadbench.suite.ranks import RankError

_PIECE_BYTES = 2**26


@dataclass(frozen=True)
class Exchange:
    """What a process of a group sends and receives by.

    Attributes:
        rank: this process.
        gather: as of `Ranks`, for small things.
        send: `(piece, rank)`, and `receive` into a piece from a rank.
        device: where pieces are sent from: NCCL's GPU, or the CPU.
    """

    rank: int
    gather: Callable[[Any], list[Any]]
    send: Callable[[Tensor, int], Any]
    receive: Callable[[Tensor, int], Any]
    device: torch.device | str = "cpu"

    def collect(self, mine: pa.RecordBatch | None, rank: int) -> list[pa.RecordBatch | None]:
        """As of `Ranks`.

        Raises:
            RankError: another rank has failed instead.
        """
        packed = np.zeros(0, np.uint8) if mine is None or rank == self.rank else _packed(mine)
        given = self.gather((None, len(packed)))  # as `Ranks.share` asks: who fails says so there
        told = [text for text, _ in given if text is not None]
        if told:
            raise RankError(told[0])
        if rank == self.rank:
            return [mine if each == rank else self._received(each, length) for each, (_, length) in enumerate(given)]
        for piece in torch.from_numpy(packed).split(_PIECE_BYTES) if len(packed) else ():
            self.send(piece.to(self.device), rank)
        return []

    def _received(self, rank: int, length: int) -> pa.RecordBatch | None:
        if not length:
            return None
        packed = np.empty(length, np.uint8)
        for piece in torch.from_numpy(packed).split(_PIECE_BYTES):
            there = torch.empty_like(piece, device=self.device)
            self.receive(there, rank)
            piece.copy_(there)
        return pa.ipc.open_stream(pa.py_buffer(packed)).read_next_batch()


def _packed(state: pa.RecordBatch) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Arrow's stream of a state, in memory that torch may take as its own."""
    counted = pa.MockOutputStream()
    _write(counted, state)
    packed = np.empty(counted.size(), np.uint8)
    _write(pa.FixedSizeBufferWriter(pa.py_buffer(packed)), state)
    return packed


def _write(sink: Any, state: pa.RecordBatch) -> None:
    with pa.ipc.new_stream(sink, state.schema) as writer:
        writer.write_batch(state)
