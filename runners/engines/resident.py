"""The torch engine: build or load one model with transformers, run it, and hand the final norm's traffic to the read.

Shapes: B sequences or images, T positions, D hidden size.
"""

import inspect
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deadbench.runners.engines.base import Blocks, ForwardPass, Swept, mismatch
from deadbench.runners.engines.device import Moment
from deadbench.runners.engines.random_weights import drawn_side_by_side
from deadbench.runners.engines.stored_state import stored_state
from deadbench.suite.architectures.build import build_model, build_published, published_class
from deadbench.suite.architectures.no_network import nothing_fetched
from deadbench.suite.architectures.resolve import Resolved, resolve_without_weights
from deadbench.suite.architectures.stored_names import unwrapped, unwrapping, wrapped
from deadbench.suite.architectures.stored_tensors import whole_models
from deadbench.suite.errors import CheckpointError, reason_of
from deadbench.suite.inputs.batches import Batch
from deadbench.suite.ranks import Ranks

# What takes the place of masked patches and of masked stretches of sound, and where it is part of the outputs.
_MASKED_WITH = ("mask_token", "masked_spec_embed", "mask_emb")
_MASKING_IS_THE_TASK = ("vit_mae", "videomae", "hiera", "seggpt")


@dataclass
class TorchEngine:
    """One model on one device.

    Attributes:
        in_pieces: no process has the whole model with its values, and inputs are tried on one without.
        tap_by_tap: one pass gives one tap after another (`Swept` between them), not all taps of one batch at a time.
        device: where the model lives.
        load_seconds: how long the last load took.
        detail: what a row says of how the model was run.
        ranks: the processes that share the model; this one alone, unless an engine says otherwise.
        resolved: what is known of the architecture; where `in_pieces`, set before the model is loaded, or found then.
        absent: parameters that the checkpoint lacks and that only training uses.
    """

    tap_by_tap: ClassVar[bool] = False
    in_pieces: ClassVar[bool] = False

    device: torch.device
    load_seconds: float = field(default=0.0)
    detail: str = field(default="resident on one device")
    ranks: Ranks = field(default=Ranks())
    resolved: Resolved | None = None
    absent: list[str] = field(default_factory=list)

    def load_random(self, config: Any, seed: int, dtype: torch.dtype, *, published: bool = False) -> nn.Module:
        """transformers' own initialisation: `set_seed(seed)`, `AutoModel.from_config` in float32, cast to `dtype`.

        With `published` the published class takes AutoModel's place: the same body with its heads.
        """
        started = time.perf_counter()
        build = build_published if published else build_model
        model = drawn_side_by_side(lambda: build(config), seed, self.device, dtype)
        self.load_seconds = time.perf_counter() - started
        return model

    def load_trained(self, folder: Path, dtype: torch.dtype, model_class: Any = None) -> nn.Module:
        """The checkpoint in `folder` as `model_class` (None: AutoModel), no code from the checkpoint, pickles included.

        Raises:
            CheckpointError: weights that transformers cannot load, or that miss tensors of the architecture.
        """
        started = time.perf_counter()
        model = self.from_pretrained(folder, dtype, model_class)
        model = model.to(self.device)
        self.load_seconds = time.perf_counter() - started
        return model  # type: ignore[no-any-return]

    def from_pretrained(self, folder: Path, dtype: torch.dtype, model_class: Any = None, **placement: Any) -> Any:
        """transformers' loading of `folder` with `placement` (device map, offload folder), in evaluation mode.

        Raises:
            CheckpointError: weights that transformers cannot load, or that miss tensors of the architecture.
        """
        model, report = _load(folder, dtype, model_class, placement)
        mended = unwrapping() if wrapped(report["unexpected_keys"]) else {}
        if mended:
            model, report = _load(folder, dtype, model_class, placement | {"key_mapping": mended})
        if root := _root(model, report, folder):
            mended |= {f"^{re.escape(root)}": ""}
            model, report = _load(folder, dtype, model_class, placement | {"key_mapping": mended})
        if tied := _stored_as_head(model, report):
            model, report = _load(folder, dtype, model_class, placement | {"key_mapping": mended | tied})
        for name, stored, expected in sorted(report["mismatched_keys"])[:1]:
            raise CheckpointError(f"{folder}: {mismatch(name, stored, expected)}")
        self.absent = sorted(name for name in report["missing_keys"] if _only_in_training(name, model))
        with torch.no_grad():
            for name in self.absent:
                model.get_parameter(name).fill_(torch.nan)  # should a forward pass use it, no row comes of it
        # Poolers come after the final norm and are often not stored.
        missing = sorted(n for n in report["missing_keys"] if "pooler" not in n and n not in self.absent)
        if missing:
            raise CheckpointError(
                f"{folder}: the weights lack {len(missing)} tensors of {type(model).__name__}, {missing[0]} among them"
            )
        return model.eval()

    def passes(
        self, model: nn.Module, norm: nn.Module, batches: list[Batch], blocks: Blocks | None = None
    ) -> Iterator[tuple[Batch, ForwardPass] | Swept]:
        """Run every batch once, yielding what entered and left `norm` in its last call of each pass.

        `blocks.on_input` is given what enters each block, in call order, while the pass runs: nothing of it is kept
        here, and nobody waits for the device.
        """
        captured: dict[str, Tensor] = {}
        tapped: list[tuple[Moment, Moment]] = []
        current: Batch | None = None

        def before_block(module: nn.Module, args: Any, kwargs: Any) -> None:
            assert blocks is not None
            assert current is not None
            started = Moment.on(self.device)
            stream = _first_given(args, kwargs)
            if stream is None:
                raise ValueError(f"{type(module).__name__} is not called with a stream of hidden states")
            blocks.on_input(len(tapped), stream.detach(), current)
            tapped.append((started, Moment.on(self.device)))

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = _first_given(args, kwargs)
            if given is None:
                raise ValueError(f"{type(module).__name__}, the final norm, is not called with a tensor")
            captured["input"] = given.detach()
            captured["output"] = (output[0] if isinstance(output, tuple) else output).detach()

        handles = [norm.register_forward_hook(hook, with_kwargs=True)]
        if blocks is not None:
            handles += [m.register_forward_pre_hook(before_block, with_kwargs=True) for m in blocks.modules]
        try:
            for batch in batches:
                current, tapped = batch, []
                started = Moment.on(self.device)
                self.forward(model, batch)
                seconds = partial(_seconds, (started, Moment.on(self.device)), tapped)
                yield batch, ForwardPass(captured["input"], captured["output"], seconds, len(tapped))
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """What `model` returns for one batch, without gradients."""
        with torch.no_grad():
            return model(**self._on_device(model, batch.model_inputs))

    def peak_device_bytes(self) -> int | None:
        """Peak accelerator memory of this process; None on CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def device_name(self) -> str:
        """What the device calls itself."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return "cpu"

    def _on_device(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        moved: dict[str, Any] = {
            name: t.to(self.device, dtype if t.is_floating_point() else None) for name, t in inputs.items()
        }
        if "use_cache" in inspect.signature(model.forward).parameters:
            moved["use_cache"] = False
        return moved


@dataclass
class PartEngine(TorchEngine):
    """An engine of which no process ever has the whole model with its values."""

    in_pieces: ClassVar[bool] = True

    def _resolved(self, config: Any) -> Resolved:
        if self.resolved is None:
            self.resolved = resolve_without_weights(config)
        return self.resolved


def _first_given(args: Any, kwargs: Any) -> Tensor | None:
    """What a module normalises or adds to: the first place, or by name `hidden_states`, or the first real tensor."""
    told = args[0] if args else kwargs.get("hidden_states")
    if isinstance(told, Tensor):
        return told
    return next((each for each in kwargs.values() if isinstance(each, Tensor) and each.is_floating_point()), None)


def _seconds(whole: tuple[Moment, Moment], tapped: list[tuple[Moment, Moment]]) -> tuple[float, float]:
    """(of the model alone, of the taps)."""
    spent = sum((begun.seconds_to(ended) for begun, ended in tapped), 0.0)
    return whole[0].seconds_to(whole[1]) - spent, spent


def _load(folder: Path, dtype: torch.dtype, model_class: Any, placement: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' report of its loading."""
    import transformers

    try:
        what: Any = {"pretrained_model_name_or_path": folder, "local_files_only": True, "use_safetensors": True}
        loader = model_class or transformers.AutoModel
        if (state := stored_state(folder)) is not None:
            with nothing_fetched():
                config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            what = {"pretrained_model_name_or_path": None, "config": config, "state_dict": state}
            loader = model_class or type(build_model(config, "meta"))
        with nothing_fetched():
            return loader.from_pretrained(  # type: ignore[no-any-return]
                **what,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named by who asked
                **placement,
            )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({reason_of(error)})") from error


def _root(model: Any, report: dict[str, Any], folder: Path) -> str:
    """Below which path a checkpoint has the model, of which most is not found otherwise; empty where there is none.

    A training script's own module, an optimizer or an average beside the model, leave such paths.

    Raises:
        CheckpointError: below several.
    """
    missing, base = set(report["missing_keys"]), f"{model.base_model_prefix}."
    found: Counter[str] = Counter()
    for name in report["unexpected_keys"] if missing else ():
        parts = unwrapped(name).split(".")
        found.update(".".join(parts[:cut]) + "." for cut in range(1, len(parts)) if ".".join(parts[cut:]) in missing)
    most = (root for root, count in found.items() if 2 * count > len(model.state_dict()))
    roots = whole_models({root.removesuffix(base).removesuffix(".") for root in most} - {""})
    if len(roots) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(roots)} models, below {', '.join(sorted(roots)[:4])}; save the one meant by itself"
        )
    return f"{roots[0]}." if roots else ""


def _only_in_training(name: str, model: Any) -> bool:
    """Whether a parameter stands for what training masks, which an evaluating forward pass does not."""
    return name.endswith(_MASKED_WITH) and model.config.model_type not in _MASKING_IS_THE_TASK


def _stored_as_head(model: Any, report: dict[str, Any]) -> dict[str, str]:
    """Where an embedding is stored only as the head that the published class ties to it: the head's name, its own."""
    published = published_class(model.config)
    unexpected = set(report["unexpected_keys"])
    if published is None or isinstance(model, published) or not (report["missing_keys"] and unexpected):
        return {}
    whole: Any = build_published(model.config, "meta")
    prefix = f"{whole.base_model_prefix}."
    own = {head: source.removeprefix(prefix) for head, source in whole.all_tied_weights_keys.items()}
    return {
        f"^{re.escape(head)}$": source
        for head, source in own.items()
        if head in unexpected and source in report["missing_keys"]
    }
