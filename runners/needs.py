"""What a read needs, counted before anything loads: the model on the meta device, one batch through it.

Bytes of weights come from the configuration (or the checkpoint's headers), those of activations from a forward pass
without arithmetic whose live tensors are counted. Shapes: N tokens, D hidden size.
"""

import contextlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runners.torch_engine import BATCH_TOKENS
from suite.architecture import block_list, build_model, locate_final_norm
from suite.dummy_inputs import minimal_inputs
from suite.feed import part_of
from suite.residual import TAP_BYTES
from suite.valueless import attempts

# In D^2, of one tap while the tokens pass: two halves, each a Gram matrix; with a factor and a whitener where a trained
# model's small directions ask for them. While it is decomposed a tap needs TAP_BYTES.
_HELD = {"random": 16, "trained": 48, "functional": 0}


@dataclass(frozen=True)
class ModelSize:
    """Elements and shapes of a model as it runs (without a head); `activation_bytes` of one batch in float32."""

    parameters: int
    outside_blocks: int
    largest_block: int
    largest_tensor: int
    hidden_size: int
    num_taps: int
    divisors: dict[str, int]
    has_plan: bool
    rows_per_item: int
    activation_bytes: int


@dataclass(frozen=True)
class Needs:
    """Bytes that one read needs, part by part.

    `weights` in the run's dtype; `outside` and `block`: of them, those outside the blocks and in the largest block;
    `resident_load`: what loading the whole model takes in host memory; `drawing`: what loading one tensor takes;
    `activations` of one batch, with the statistics taken from it; `stream`: every batch's hidden states; `held` and
    `decomposed`: one tap's accumulators while tokens pass, and at its end.
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

    def sharded(self, ranks: int) -> float:
        """Peak of one rank of `ranks`, with one tap at a time: what is outside the blocks is on every rank."""
        return self.outside + (self.weights - self.outside) / ranks + self.activations + self.held + self.decomposed

    def streamed(self, parked: float = math.inf) -> float:
        """Peak of block streaming, with at most `parked` bytes of waiting streams in memory.

        Two taps are alive when one is compared with the one before; the embedding output of every batch stays.
        """
        waiting = self.stream + min(self.stream, parked)
        return self.outside + self.block + self.activations + waiting + 2 * self.held + self.decomposed


def measure(config: Any, sequence_length: int, modality: str = "text", stack: str = "encoder") -> ModelSize:
    """Count the model that `config` describes, read in the part that `modality` and `stack` name.

    Raises:
        ArchitectureError: transformers cannot build it.
        ValueError: it has no final norm.
    """
    from runners.streaming_engine import streamed_paths

    model = build_model(config, "meta")
    path, part = part_of(model, modality, stack)
    final = locate_final_norm(config, path)
    if final.path is None or final.hidden_size is None:
        raise ValueError(final.reason or "no final norm")
    blocks = [sum(p.numel() for p in model.get_submodule(path).parameters()) for path in streamed_paths(model)]
    total = sum(p.numel() for p in model.parameters())
    _, num_blocks = block_list(part, final.path)
    return ModelSize(
        parameters=total,
        outside_blocks=total - sum(blocks),
        largest_block=max(blocks, default=0),
        largest_tensor=max(p.numel() for p in model.parameters()),
        hidden_size=final.hidden_size,
        num_taps=(num_blocks or 0) + 1,
        divisors=divisors(part),
        has_plan=has_plan(part),
        rows_per_item=final.rows_per_item,
        activation_bytes=_activation_bytes(part, final.rows_per_item, sequence_length),
    )


def divisors(part: nn.Module) -> dict[str, int]:
    """What the tensor-parallel degree of `part` must divide, by the configuration's name for it.

    Where layers differ it is what their counts have in common.
    """
    config: Any = part.config
    text = config.get_text_config()
    per_layer = getattr(text, "per_layer_config", None)
    layers = [per_layer[i] for i in range(len(per_layer))] if per_layer else [text]
    found = {}
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        counts = [count for count in (getattr(layer, name, None) for layer in layers) if isinstance(count, int)]
        if counts:
            found[name] = math.gcd(*counts)
    return found


def has_plan(part: nn.Module) -> bool:
    """Whether transformers has a tensor-parallel plan for `part`."""
    config: Any = part.config
    return any(getattr(each, "base_model_tp_plan", None) for each in (config, config.get_text_config()))


def needs(size: ModelSize, read: str, itemsize: int, num_tokens: int) -> Needs:
    """The bytes of a read by forward pass that runs in a dtype of `itemsize` bytes over `num_tokens` tokens."""
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
        num_taps=size.num_taps,
        num_tokens=num_tokens,
    )


def _activation_bytes(model: nn.Module, rows_per_item: int, sequence_length: int) -> int:
    """Most bytes alive at once in a forward pass of one batch; from the widest layer where it cannot run on meta."""
    inputs: dict[str, Any] = next(minimal_inputs(model))
    one = next(iter(inputs.values()))
    if one.dtype == torch.long:
        length = min(sequence_length, getattr(model.config, "max_position_embeddings", None) or sequence_length)
        ids = one[:, :1].expand(max(1, BATCH_TOKENS // length), length)
        inputs = dict.fromkeys(inputs, ids) | {"use_cache": False}
    else:
        items = max(1, BATCH_TOKENS // max(1, rows_per_item))
        inputs = {name: tensor.expand(items, *tensor.shape[1:]) for name, tensor in inputs.items()}
    for attempt in attempts(model):
        try:
            with torch.no_grad(), attempt(), _fused_attention(), _LiveBytes() as live:
                model(**inputs)
            peak: int = live.peak
            return peak
        except Exception:  # whatever an architecture's code does with values that are not there
            continue
    widest = max((m.out_features for m in model.modules() if isinstance(m, nn.Linear)), default=0)
    return BATCH_TOKENS * 4 * 4 * widest


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as its kernels do it, which never hold the scores; on the meta device it would be taken apart."""
    functions: Any = torch.nn.functional
    real = functions.scaled_dot_product_attention
    functions.scaled_dot_product_attention = lambda query, key, value, *args, **kwargs: query.new_empty(
        *query.shape[:-1], value.shape[-1]
    )
    try:
        yield
    finally:
        functions.scaled_dot_product_attention = real


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of meta storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and count what it has made."""
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in given:
                    self._known[key] = weakref.finalize(storage, self._gone, key, storage.nbytes())
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]
