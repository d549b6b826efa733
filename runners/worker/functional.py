"""The functional read: the published model with its head, its linear maps moved along dead directions and controls."""

import contextlib
import time
from typing import Any

import torch
from torch import Tensor, nn

from deadbench.runners.engines.base import BATCH_TOKENS
from deadbench.runners.engines.device import pick_device
from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.jobs.events import Progress, Reading
from deadbench.runners.jobs.job import ReadJob
from deadbench.runners.jobs.resolved import Configuration, num_parameters, published_wiring
from deadbench.runners.worker.request import StoredWeights, Weights, make_inputs
from deadbench.suite.architectures.build import published_class
from deadbench.suite.architectures.kernel_test import live_norm
from deadbench.suite.architectures.locate import find_final_norm
from deadbench.suite.inputs.batches import Batch
from deadbench.suite.reads.columns import architecture_columns
from deadbench.suite.reads.dead_units import InFloat64, hidden_layer, read_units
from deadbench.suite.reads.kl_order import with_orders
from deadbench.suite.reads.perturbation import finest_roundoff, read_head, read_inner, sites
from deadbench.suite.schema import Row
from deadbench.suite.spectra.directions import UNIT_ROUNDOFF

_IMAGES = 16  # stand for the tokens of an image classifier, which gives one distribution a picture


def read_functional(read: ReadJob, config: Configuration, weights: Weights) -> Reading:
    """Rows of `functional`: every site, direction and step.

    Raises:
        ValueError: what cannot be read, in one line.
    """
    dtype = getattr(torch, read.dtype)
    engine = TorchEngine(pick_device())
    if isinstance(weights, StoredWeights):
        model = engine.load_trained(weights.folder, dtype, published_class(config.build()))
    else:
        model = engine.load_random(config.build(), weights.seed, dtype, published=True)
    wiring, _ = published_wiring(config)
    if wiring is None or not wiring.reads:
        reason = "cannot be followed on a minimal input" if wiring is None else "has no linear map that a norm feeds"
        raise ValueError(f"{type(model).__name__} {reason}: nothing to move")
    rule = read.protocol.tokens
    assert isinstance(rule, int)
    yield Progress(read.label(), "input", 0, rule)
    inputs = make_inputs(read, model, weights.folder, rule, BATCH_TOKENS, least_items=_IMAGES)

    modules = dict(model.named_modules())
    norms = {path: live_norm(modules[path], behaviour, D) for path, (behaviour, D) in wiring.norms.items()}
    started = time.perf_counter()
    captured: dict[str, list[Tensor]] = {path: [] for path in set(wiring.reads.values())}
    handles = [modules[path].register_forward_hook(_keep(captured[path])) for path in captured]
    try:
        outputs = [_output(engine.forward(model, batch)) for batch in inputs.batches]
    finally:
        for handle in handles:
            handle.remove()
    has_logits = all(found for _, found in outputs)
    before = _rows([tensor for tensor, _ in outputs], inputs.batches)

    def run() -> Tensor:
        return _rows([_output(engine.forward(model, batch))[0] for batch in inputs.batches], inputs.batches)

    head = _head(model, wiring.reads) if has_logits else None
    wanted = sites(model, wiring, norms, head)
    inner = next((site for site in wanted if site.path != head), None)
    roundoff = UNIT_ROUNDOFF[read.dtype]
    if inner is not None:
        roundoff = finest_roundoff(inner, before, run, [read.seed, wanted.index(inner)], read.dtype)
    rows: list[Row] = []
    for number, site in enumerate(wanted):
        yield Progress(read.label(), "sites", number, len(wanted))
        seed = [read.seed, number]
        replayed = None
        once = len(captured[site.norm_path]) == len(inputs.batches)
        acts = _rows(captured[site.norm_path], inputs.batches) if once else None
        if site.path == head and acts is not None:
            replayed = read_head(site, acts, before, seed)
        if replayed is None:
            replayed = []
            for row in read_inner(site, before, run, seed, has_logits=has_logits, acts_ND=acts):
                replayed.append(row)
                yield Progress(read.label(), "sites", number, len(wanted))
        # A map that the measured output does not depend on (a pooler) says nothing.
        rows += with_orders(replayed, roundoff) if any(row["output_change"] for row in replayed) else []
    layer = hidden_layer(model, wiring, norms)
    if layer is not None:
        planted = []
        with InFloat64() if read.dtype == "float64" else contextlib.nullcontext():  # the third order is small
            for row in read_units(
                layer, run, [read.seed, len(wanted)], UNIT_ROUNDOFF[read.dtype], has_logits=has_logits
            ):
                planted.append(row)
        rows += with_orders(planted, UNIT_ROUNDOFF[read.dtype])
    kind = "trained" if isinstance(weights, StoredWeights) else "random"
    row = architecture_columns(find_final_norm(getattr(model, "base_model", model))) | {
        "num_parameters": num_parameters(config),
        "dtype": read.dtype,
        "device": engine.device_name(),
        "load_seconds": engine.load_seconds,
        "forward_seconds": time.perf_counter() - started,
        "input": inputs.description,
        "num_tokens": len(before),
        "num_distinct_inputs": inputs.num_distinct,
        "peak_device_bytes": engine.peak_device_bytes(),
    }
    return {"reads": [row], "functional": [{"weights": kind} | each for each in rows]}


def _keep(into: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        into.append(args[0].detach())

    return hook


def _output(output: Any) -> tuple[Tensor, bool]:
    """The model's logits, else its last hidden state; and whether it is logits."""
    logits = getattr(output, "logits", None)
    found = logits if isinstance(logits, Tensor) else getattr(output, "last_hidden_state", None)
    if not isinstance(found, Tensor):
        raise ValueError(f"{type(output).__name__} has neither logits nor a last hidden state to compare")
    return found, found is logits


def _rows(tensors: list[Tensor], batches: list[Batch]) -> Tensor:
    """The last axis of each position that counts, as float64 rows on CPU."""
    parts = []
    for tensor, batch in zip(tensors, batches, strict=True):
        mask_ST = batch.mask_ST
        counted = mask_ST is not None and tensor.shape[:2] == mask_ST.shape
        kept = tensor[mask_ST.to(tensor.device)] if counted and mask_ST is not None else tensor
        parts.append(kept.detach().double().cpu().reshape(-1, tensor.shape[-1]))
    return torch.cat(parts)


def _head(model: nn.Module, reads: dict[str, str]) -> str | None:
    """Path of the map that makes the logits, if a norm feeds it: what the model says, else its last map outside."""
    embeddings = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    bare: Any = getattr(model, "base_model", model)
    inside = {id(module) for module in bare.modules()}
    outside = [path for path in reads if id(model.get_submodule(path)) not in inside]
    named = [path for path in reads if model.get_submodule(path) is embeddings]
    return next(iter([*named, *reversed(outside)]), None)
