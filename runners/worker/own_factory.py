"""The reads of a module of the user's own, which a factory builds: weights, and batches where it gives them."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deadbench.runners.engines.base import BATCH_TOKENS
from deadbench.runners.engines.device import pick_device
from deadbench.runners.jobs.events import Progress, Reading
from deadbench.runners.jobs.job import ReadJob
from deadbench.runners.jobs.own_factory import built
from deadbench.runners.jobs.resolved import num_tokens
from deadbench.runners.worker.own_module import hold, read_own_module
from deadbench.runners.worker.own_parameters import own_parameters, published_columns
from deadbench.suite.architectures.live import eagerly, inner
from deadbench.suite.inputs.batches import Batch
from deadbench.suite.inputs.positions import position_tables
from deadbench.suite.inputs.tokens import token_batches
from deadbench.suite.ranks import Ranks

_MOST = 1 << 60  # rows: who gives the batches has said how many there are


def read_factory(read: ReadJob) -> Reading:
    """The read `parameters` or `trained` of what the factory builds.

    Raises:
        ValueError: what it builds is no module, or cannot be read; one line.
    """
    model, given = _module(read)
    yield Progress(read.label(), "input")
    with _still(model):
        root = inner(model)
        sites = None
        batches = _tokens(read, root) if given is None and read.input is not None else given
        if batches is None and read.read == "trained":
            raise ValueError(
                f"--model {read.factory}: there is nothing to feed it; give --input tokens:FILE.npy or tokens:random, "
                "or return (module, batches)"
            )
        if batches is not None:
            sites, held = hold(root, batches, None, None, _MOST, Ranks())
        if read.read == "parameters":
            rows = own_parameters(root, sites, None, None)
            rows["reads"][0]["input"] = None  # it told where the norm is, and no number
            return rows
        assert sites is not None
        described = read.input or "batches of the factory"
        rows = yield from read_own_module(read, root, sites, held, described, Ranks())
        rows["reads"][0] |= published_columns(root, sites.final)
        return rows


def _module(read: ReadJob) -> tuple[nn.Module, Iterable[Any] | None]:
    assert read.factory is not None
    found = built(read.factory, read.base)
    model, given = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"--model {read.factory}: returns a {type(model).__name__}; return a module, or it and batches"
        )
    dtype = None if read.dtype == "auto" else getattr(torch, read.dtype)
    return model.to(pick_device(), dtype), given


def _tokens(read: ReadJob, root: nn.Module) -> list[Any]:
    """Token ids for a module that says nowhere how many it knows: its largest embedding does."""
    tables = [module for module in root.modules() if isinstance(module, nn.Embedding)]
    if not tables:
        raise ValueError(f"--model {read.factory}: it embeds no tokens; return (module, batches)")
    words = max(tables, key=lambda table: table.num_embeddings)
    inputs = token_batches(
        str(read.input),
        vocab_size=words.num_embeddings,
        num_tokens=num_tokens(read.protocol.tokens, words.embedding_dim),
        sequence_length=min([read.protocol.sequence_length, *position_tables(root)]),
        seed=read.seed,
        tokenizer_folder=None,
        batch_tokens=BATCH_TOKENS,
        avoided_ids=[],
    )
    if "input_ids" in inspect.signature(root.forward).parameters:
        return [batch.model_inputs for batch in inputs.batches]
    return [ids_ST for batch in inputs.batches for ids_ST in _unpadded(batch)]


def _unpadded(batch: Batch) -> Iterator[torch.Tensor]:
    """Token ids of a batch, for a module that knows of no mask: padded, sequence by sequence."""
    ids_ST = batch.model_inputs["input_ids"]
    if batch.mask_ST is None:
        yield ids_ST
    else:
        yield from (ids_T[mask_T][None] for ids_T, mask_T in zip(ids_ST, batch.mask_ST, strict=True))


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Inside, it is in evaluation mode, uncompiled and without gradients."""
    with torch.no_grad(), eagerly():
        model.eval()
        yield
