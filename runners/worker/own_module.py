"""A read of a module that lives in this process, whoever built it: the passes and rows of every other read.

Of ranks that train together each gives its own part of the tokens, and the first has the rows.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.runners.engines.base import Blocks, ForwardPass, Swept
from deadbench.runners.engines.device import pick_device
from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.jobs.events import Progress, Reading
from deadbench.runners.jobs.job import ReadJob
from deadbench.runners.jobs.resolved import num_tokens
from deadbench.runners.worker.forward import finished
from deadbench.runners.worker.passes import Passes
from deadbench.suite.architectures.kernel_test import live_norm
from deadbench.suite.architectures.live import Sites, accepted, call, check_taken, look_into
from deadbench.suite.errors import InputError
from deadbench.suite.inputs.batches import Batch, Inputs, check_count
from deadbench.suite.ranks import Ranks
from deadbench.suite.reads.columns import architecture_columns
from deadbench.suite.tracing.flow import mapped, tensors_of

_MASK, _DECODER_MASK = "attention_mask", "decoder_attention_mask"
_KINDS = "a tensor, a dictionary or a tuple of what the module takes"


@dataclass
class OwnEngine(TorchEngine):
    """The module as it stands, on its own device.

    Attributes:
        sites: where it is looked at.
        most_batches: of any rank: where parameters are divided, all ranks run forward equally often.
    """

    sites: Sites | None = None
    most_batches: int = 0
    detail: str = field(default="as it lives in its own process")

    def passes(
        self, model: nn.Module, norm: nn.Module, batches: list[Batch], blocks: Blocks | None = None
    ) -> Iterator[tuple[Batch, ForwardPass] | Swept]:
        """As the engine's own; `norm`, which is a copy, is looked at where it lives."""
        assert self.sites is not None
        yield from super().passes(model, self.sites.norm, batches, blocks)
        for _ in range(self.most_batches - len(batches)):
            self.forward(model, batches[-1])

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """What the module returns for one batch, without gradients."""
        assert self.sites is not None
        with torch.no_grad():
            return call(self.sites.called, accepted(self.sites.called, batch.model_inputs))


@dataclass(frozen=True)
class Held(Inputs):
    """What was given to this rank; `first_row` rows of other ranks come before, and `num_tokens` are all ranks'."""

    first_row: int = 0

    def share(self, rank: int, size: int) -> tuple[list[Batch], int]:
        """This rank's own batches: they are divided already."""
        return self.batches, self.first_row


def device_of(model: nn.Module) -> torch.device:
    """Where the module's parameters are."""
    return next((p.device for p in model.parameters()), pick_device())


def dtype_of(model: nn.Module) -> str:
    """The dtype in which a forward pass runs here: autocast's inside one, else that of most parameters."""
    device = device_of(model).type
    if torch.is_autocast_enabled(device):
        return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
    sizes: dict[torch.dtype, int] = {}
    for parameter in (p for p in model.parameters() if p.is_floating_point()):
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return str(max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)).removeprefix("torch.")


def named_arguments(batch: Any, device: torch.device) -> dict[str, Any]:
    """A batch as arguments by name, on `device`; what has only a place is named by its number.

    Raises:
        InputError: it is of no kind that a module is called with.
    """
    if isinstance(batch, Tensor):
        named: dict[str, Any] = {"0": batch}
    elif isinstance(batch, Mapping):
        named = {str(name): value for name, value in batch.items()}
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        named = {str(place): value for place, value in enumerate(batch)}
    else:
        raise InputError(f"a batch is a {type(batch).__name__}; give {_KINDS}")
    return mapped(named, lambda name, tensor: tensor.to(device))  # type: ignore[no-any-return]


def hold(
    model: nn.Module,
    batches: Iterable[Any],
    final_norm: str | nn.Module | None,
    blocks: str | nn.Module | Sequence[nn.Module] | None,
    most: int | str,
    ranks: Ranks,
) -> tuple[Sites, list[Batch]]:
    """Where the module is read, found on the first batch, and batches until they give `most` rows, or all.

    Of several ranks none runs the module before all have a batch that it can be called with: where parameters are
    divided, one that ran it alone would wait for ever.

    Raises:
        InputError: no batch, or one that no module is called with.
        ArchitectureError: no final norm that can be told.
    """
    device = device_of(model)
    alone = isinstance(batches, Tensor | Mapping)
    given = (named_arguments(batch, device) for batch in ([batches] if alone else batches))
    with ranks.together():
        first = next(given, None)
        if first is None:
            raise InputError(f"there is no batch; give an iterable of {_KINDS}")
        check_taken(model, first)
    with ranks.together():
        sites, output = look_into(model, first, final_norm, blocks)
        D = output.shape[1 if sites.final.behaviour.axes_after else -1]
        rows_of = _RowCounter(first, output.numel() // D, _mask_of(sites.part))
        held, rows, enough = [], 0, num_tokens(most, D)
        for arguments in _chained(first, given):
            batch = rows_of(arguments)
            held.append(batch)
            rows += batch.num_rows
            if rows >= enough:
                break
    return sites, held


def read_own_module(
    read: ReadJob, model: nn.Module, sites: Sites, batches: list[Batch], description: str, ranks: Ranks
) -> Reading:
    """The final norm's spectrum and the residual stream's, of `model` as it stands, on what this rank holds.

    Raises:
        ValueError: what cannot be read, in one line.
    """
    final, dtype = sites.final, dtype_of(model)
    assert final.hidden_size is not None
    mine, distinct = sum(batch.num_rows for batch in batches), _distinct(batches)
    counts = ranks.share((mine, len(batches), distinct))
    total = sum(rows for rows, _, _ in counts)
    check_count(total, final.hidden_size)
    first_row = sum(rows for rows, _, _ in counts[: ranks.rank])
    known = [each for _, _, each in counts if each is not None]
    inputs = Held(batches, total, len(set().union(*known)) if known else None, description, first_row)
    engine = OwnEngine(device_of(model), ranks=ranks, sites=sites, most_batches=max(n for _, n, _ in counts))
    norm = live_norm(sites.plain, final.behaviour, final.hidden_size)
    passes = Passes(
        read, engine, model, final, inputs, norm, dtype, batches[0].num_rows, sites=(sites.plain, sites.blocks)
    )
    yield Progress(read.label(), "forward", 0, total)
    measured, stream, position = yield from passes.run()
    row = architecture_columns(final) | {
        "dtype": dtype,
        "device": engine.device_name(),
        "load_seconds": 0.0,
        "engine_detail": engine.detail + (f"; tokens over {ranks.size} ranks" if ranks.size > 1 else ""),
        "tensor_parallel": 1,
        "input": inputs.description,
        "num_distinct_inputs": inputs.num_distinct,
        "peak_device_bytes": engine.peak_device_bytes(),
    }
    if ranks.rank > 0:
        return {"reads": [row]}
    return finished(row, measured, stream, position, norm, dtype)


def without_blocks(sites: Sites) -> Sites:
    """The same with no block watched: the final norm alone is read."""
    return replace(sites, blocks=[])


def _mask_of(part: nn.Module) -> str:
    """By which name a batch says what of the final norm's rows is padding: of an encoder-decoder, the decoder's."""
    two = getattr(getattr(part, "config", None), "is_encoder_decoder", False)
    return _DECODER_MASK if two and _DECODER_MASK in inspect.signature(part.forward).parameters else _MASK


class _RowCounter:
    """How many rows of the final norm's output a batch gives, by what the first one gave."""

    def __init__(self, first: Mapping[str, Any], rows: int, mask: str):
        tensors = {name: tensor for name, tensor in tensors_of(first).items() if tensor.ndim}
        if not tensors:
            raise InputError(f"a batch holds no tensor; give {_KINDS}")
        self._mask = mask
        fitting = [name for name, t in tensors.items() if t.numel() == rows and t.ndim == 2]
        fitting.sort(key=self._is_mask)  # a mask tells the shape of what comes as embeddings
        self._tokens = next(iter(fitting), None)
        self._main = self._tokens or next(iter(tensors))
        self._per_item, rest = divmod(rows, tensors[self._main].shape[0])
        if rest:
            raise InputError(f"{rows} rows came of a batch of {tensors[self._main].shape[0]}: rows of items differ")

    def __call__(self, arguments: dict[str, Any]) -> Batch:
        tensors = tensors_of(arguments)
        main = tensors[self._main]
        mask = next((t for name, t in tensors.items() if self._is_mask(name) and t.ndim == 2 and not t.all()), None)
        if mask is None:
            return Batch(arguments, rows=self._per_item * main.shape[0] if self._tokens is None else main.numel())
        if self._tokens is None or mask.shape != main.shape:
            raise InputError(
                f"{self._mask} of {tuple(mask.shape)} leaves positions out, and which of the final norm's rows these "
                "are cannot be told; give batches without padding"
            )
        return Batch(arguments, mask.bool().cpu())

    def _is_mask(self, name: str) -> bool:
        return name.rpartition(".")[2] == self._mask


def _distinct(batches: list[Batch]) -> set[int] | None:
    """The token ids that count; None where there are none."""
    found: set[int] = set()
    for batch in batches:
        given = tensors_of(batch.model_inputs)
        ids = next((given[name] for name in ("input_ids", "0") if name in given), None)
        if ids is None or ids.is_floating_point():
            return None
        ids = ids if batch.mask_ST is None else ids[batch.mask_ST.to(ids.device)]
        found |= set(ids.unique().tolist())
    return found


def _chained(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest
