"""What a read needs, counted before anything loads: the model on the meta device, one batch through it.

Bytes of weights come from the configuration (or the checkpoint's headers), those of activations from a forward pass
without arithmetic whose live tensors are counted. Shapes: N tokens, D hidden size.
"""

import math
from dataclasses import dataclass

from deadbench.runners.engines.base import BATCH_TOKENS
from deadbench.runners.planning.sizes import ModelSize
from deadbench.suite.read_specs import TAP_BYTES

# In D^2, of one tap while the tokens pass: two halves, each a Gram matrix; with a factor and a whitener where a trained
# model's small directions ask for them. While it is decomposed a tap needs TAP_BYTES.
_HELD = {"random": 16, "trained": 48, "functional": 0}

_KEPT_BYTES = 2**27  # the weights of a smaller block are allocated in pieces that the threads which fetch them keep


@dataclass(frozen=True)
class Needs:
    """Bytes that one read needs, part by part.

    `weights` in the run's dtype; `outside` and `block`: of them, those outside the blocks and in the largest block;
    `resident_load`: what loading the whole model takes in host memory; `drawing`: what loading one tensor takes;
    `activations` of one batch, with the statistics taken from it; `stream`: every batch's hidden states; `held` and
    `decomposed`: one tap's accumulators while tokens pass, and at its end; `num_taps`: how many are read.
    """

    weights: float
    resident_load: float
    outside: float
    block: float
    drawing: float
    activations: float
    stream: float
    held: float
    decomposed: float
    num_taps: int
    num_tokens: int

    def resident(self, taps_at_once: int) -> float:
        """Peak of a resident read that accumulates `taps_at_once` taps a pass, once it is loaded."""
        return self.weights + self.activations + self.held * taps_at_once + self.decomposed

    def sharded(self, tensor_parallel: int) -> float:
        """Peak of one of `tensor_parallel` devices, with one tap at a time: what is outside the blocks is on each."""
        inside = (self.weights - self.outside) / tensor_parallel
        return self.outside + inside + self.activations + min(1, self.num_taps) * self.held + self.decomposed

    def compared(self, *, beside: bool) -> float:
        """Accumulators of a read that goes from tap to tap: of two while one is compared with the one before.

        `beside`: and of the next one, whose rows come meanwhile.
        """
        return min(2 + beside, self.num_taps) * self.held

    def saved(self, taps: int) -> float:
        """Disk for the checkpoint of a running read with so many taps: the new one is written beside the old one.

        The final norm holds as much as two taps at most.
        """
        return 2 * self.held * (taps + 2)

    def swept(self, parked: float) -> float:
        """Disk of block streaming: its checkpoints, with every batch's stream, and the streams that wait there."""
        return self.saved(min(2, self.num_taps)) + 2 * self.stream + max(0.0, self.stream - parked)

    def streamed(self, parked: float = math.inf, *, ahead: bool = False, beside: bool = False) -> float:
        """Peak of block streaming, with at most `parked` bytes of waiting streams in memory.

        The embedding output of every batch stays; `ahead`: the next block is read while one runs; `beside`: a tap is
        decomposed meanwhile.
        """
        kept = 2 if self.block < _KEPT_BYTES else int(ahead)
        blocks, waiting = (1 + kept) * self.block, self.stream + min(self.stream, parked)
        return self.outside + blocks + self.activations + waiting + self.compared(beside=beside) + self.decomposed


def needs(size: ModelSize, read: str, itemsize: int, num_tokens: int, stride: int = 1) -> Needs:
    """The bytes of a read by forward pass that runs in a dtype of `itemsize` bytes over `num_tokens` tokens.

    Each `stride`-th tap is read, and the last; 0: none.
    """
    D = size.hidden_size
    batch = min(BATCH_TOKENS, num_tokens)
    # Beside the activations: the norm's captured input and output, and the float64 rows and products of one update.
    captured = 2 * batch * D * itemsize
    statistics = 3 * batch * D * 8
    weights = size.parameters * itemsize
    drawn = 4 * size.parameters if read == "random" else weights
    largest = size.largest_tensor * (4 + itemsize if read == "random" and itemsize < 4 else itemsize)
    return Needs(
        weights=weights,
        resident_load=drawn if itemsize >= 4 or read == "trained" else drawn + size.largest_tensor * itemsize,
        outside=size.outside_blocks * itemsize,
        block=size.largest_block * itemsize,
        drawing=largest,
        activations=size.activation_bytes * itemsize / 4 * batch / BATCH_TOKENS + captured + statistics,
        stream=num_tokens * D * itemsize,
        held=_HELD[read] * D**2,
        decomposed=TAP_BYTES * D**2,
        num_taps=-(-(size.num_taps - 1) // stride) + 1 if stride else 0,
        num_tokens=num_tokens,
    )
