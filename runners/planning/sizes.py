"""The size of a model in bytes, counted on the meta device."""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from deadbench.runners.engines.base import BATCH_TOKENS
from deadbench.suite.architectures.build import build_model
from deadbench.suite.architectures.locate import locate_final_norm
from deadbench.suite.architectures.parts import block_list, divisors, has_plan, part_of
from deadbench.suite.tracing.meta_passes import attempts
from deadbench.suite.tracing.minimal_inputs import minimal_inputs


@dataclass(frozen=True)
class ModelSize:
    """Elements and shapes of a model as it runs (without a head); `activation_bytes` of one batch in float32.

    `flop_per_token`: of its products and convolutions, without those within attention.
    """

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
    flop_per_token: float


def measure(config: Any, sequence_length: int, modality: str = "text", stack: str = "encoder") -> ModelSize:
    """Count the model that `config` describes, read in the part that `modality` and `stack` name.

    Raises:
        ArchitectureError: transformers cannot build it.
        ValueError: it has no final norm.
    """
    from deadbench.suite.architectures.parts import streamed_paths

    model = build_model(config, "meta")
    path, part = part_of(model, modality, stack)
    final = locate_final_norm(config, path)
    if final.path is None or final.hidden_size is None:
        raise ValueError((final.pooled or final).reason or "no final norm")
    blocks = [sum(p.numel() for p in model.get_submodule(path).parameters()) for path in streamed_paths(model)]
    total = sum(p.numel() for p in model.parameters())
    _, num_blocks = block_list(part, final.path)
    activation_bytes, flop_per_token = _one_batch(part, final.rows_per_item, sequence_length)
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
        activation_bytes=activation_bytes,
        flop_per_token=flop_per_token or 2.0 * sum(blocks),
    )


def _one_batch(model: nn.Module, rows_per_item: int, sequence_length: int) -> tuple[int, float | None]:
    """(most bytes alive at once in a forward pass of one batch, its FLOP a token).

    Where it cannot run on meta, bytes are those of the widest layer, and FLOP are not counted.
    """
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
            rows = next(iter(inputs.values()))
            tokens = rows.numel() if rows.dtype == torch.long else len(rows) * rows_per_item
            return live.peak, live.flop / tokens
        except Exception:  # whatever an architecture's code does with values that are not there
            continue
    widest = max((m.out_features for m in model.modules() if isinstance(m, nn.Linear)), default=0)
    return BATCH_TOKENS * 4 * 4 * widest, None


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
    """Counts the bytes of meta storages that are alive, and the FLOP of products."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.flop = 0, 0, 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and count what it has made."""
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        if (counted := flop_registry.get(func._overloadpacket)) is not None:
            self.flop += counted(*args, **(kwargs or {}), out_val=out)
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
