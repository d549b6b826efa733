"""Where the final norm of an architecture is: built from its configuration, found by what flows out of the model.

The model is built on the meta device and run once on a token or two: no weights, no arithmetic. The final norm is the
module whose output *is* the model's last hidden state (the same storage, seen through reshapes and cuts), provided the
kernel test says that it normalises. Names decide nothing.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from suite.norms import NormBehaviour, probe

SMALL_MODEL = 500_000_000  # parameters: 2 GB in float32, a few seconds to draw


class ArchitectureError(ValueError):
    """A configuration that transformers cannot build."""


class RemoteCodeError(ArchitectureError):
    """A configuration that needs code from the checkpoint, which is never run."""


@dataclass(frozen=True)
class FinalNorm:
    """The final norm of an architecture, or the reason why there is none (`path` None).

    `rows_per_item` is how many rows of its output one item of the minimal input gave: for images, what a picture gives.
    """

    path: str | None
    behaviour: NormBehaviour
    placement: str | None
    hidden_size: int | None
    num_blocks: int | None
    rows_per_item: int = 0
    reason: str | None = None
    evidence: tuple[str, ...] = field(default=())

    @property
    def family(self) -> str:
        """layernorm, rmsnorm or other; none or undetermined where no norm was found."""
        return self.behaviour.family


def build_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object from the contents of a config.json.

    Raises:
        ArchitectureError: no model_type, one that the installed transformers does not know, or remote code.
    """
    import transformers

    known = dict(config)
    model_type = known.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ArchitectureError("the configuration has no model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        if known.get("auto_map"):
            raise RemoteCodeError(f"model_type {model_type!r} needs code from the checkpoint, which is never run")
        raise ArchitectureError(f"model_type {model_type!r} is unknown to transformers {transformers.__version__}")
    known.pop("auto_map", None)
    known.pop("quantization_config", None)  # weights are not loaded by this object; norms are stored plain
    try:
        return transformers.AutoConfig.for_model(model_type, **known)
    except Exception as error:
        raise ArchitectureError(f"transformers refuses the configuration: {_one_line(error)}") from error


def build_model(config: Any, device: str = "cpu") -> nn.Module:
    """The bare model (`AutoModel`) of `config` in float32, randomly initialised by transformers; on `meta`, empty.

    Raises:
        ArchitectureError: transformers has no model for it or refuses to build it.
    """
    import transformers

    try:
        with torch.device(device):
            # eager experts: the grouped kernels refuse meta tensors and half of all dtypes
            model: nn.Module = transformers.AutoModel.from_config(
                config, dtype=torch.float32, experts_implementation="eager"
            )
    except Exception as error:
        raise ArchitectureError(f"transformers cannot build {config.model_type!r}: {_one_line(error)}") from error
    return model.eval()


def published_class(config: Any) -> Any:
    """transformers' class of the published architecture (`config.architectures[0]`), heads included, or None."""
    import transformers

    names = (name for name in config.architectures or () if isinstance(name, str))
    return next((found for name in names if (found := getattr(transformers, name, None)) is not None), None)


def build_published(config: Any, device: str = "cpu") -> nn.Module:
    """The published architecture of `config` with its heads, as `build_model` builds; the bare model if it has none.

    Raises:
        ArchitectureError: transformers refuses to build it.
    """
    published = published_class(config)
    if published is None:
        return build_model(config, device)
    try:
        with torch.device(device):
            model: nn.Module = published._from_config(config, dtype=torch.float32, experts_implementation="eager")
    except Exception as error:
        raise ArchitectureError(f"transformers cannot build {published.__name__}: {_one_line(error)}") from error
    return model.eval()


def count_parameters(config: Any) -> int:
    """Unique parameters of the published architecture (`config.architectures[0]`), heads included, ties once."""
    return sum(p.numel() for p in build_published(config, "meta").parameters())


def locate_final_norm(config: Any) -> FinalNorm:
    """The final norm of the architecture that `config` describes, without any weights.

    Some forward passes look at values, which meta tensors have not; those are repeated on CPU where the model is small.
    """
    model = build_model(config, "meta")
    found = find_final_norm(model)
    if found.family == "undetermined" and sum(p.numel() for p in model.parameters()) <= SMALL_MODEL:
        found = find_final_norm(build_model(config))
    return found


def find_final_norm(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> FinalNorm:
    """Run `model` once and find the norm that makes its last hidden state.

    Args:
        model: what `build_model` returns, on any device.
        inputs: keyword arguments of the forward pass; a minimal dummy input for None.
    """
    try:
        with torch.no_grad(), _recorded_calls(model) as calls:
            output = model(**(minimal_inputs(model) if inputs is None else inputs))
    except Exception as error:
        return _nothing("undetermined", f"the forward pass on a minimal input failed: {_one_line(error)}", model)

    last = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    if not isinstance(last, Tensor):
        return _nothing("undetermined", f"{type(model).__name__} returns no last_hidden_state", model)
    makers = [(path, tensor) for path, tensor in calls if _same_storage(tensor, last)]
    modules = dict(model.named_modules())
    for path, tensor in makers:
        module, width = modules[path], tensor.shape[-1]
        if any(True for _ in module.children()):
            continue
        behaviour = probe(module, width)
        if behaviour.family in ("layernorm", "rmsnorm"):
            blocks_path, num_blocks = block_list(model, path)
            post = blocks_path is not None and path.startswith(f"{blocks_path}.")
            evidence = (
                f"the output of {path} ({type(module).__name__}) is the model's last hidden state",
                *behaviour.evidence,
            )
            rows = tensor[0].numel() // width if tensor.ndim > 2 else len(tensor)
            return FinalNorm(path, behaviour, "post" if post else "pre", width, num_blocks, rows, None, evidence)
    maker = f"{makers[-1][0]} ({type(modules[makers[-1][0]]).__name__})" if makers else "an unnamed operation"
    return _nothing("none", f"the last hidden state comes from {maker}, which is no normalisation", model)


def block_list(model: nn.Module, final_norm: str | None) -> tuple[str | None, int | None]:
    """Path and length of the list of blocks that the final norm ends or follows; (None, None) if there is no list.

    Of the outermost ModuleLists, the one that shares the longest path with the final norm, then the one with most
    parameters: a language model's blocks rather than its vision tower's.
    """
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if not outermost:
        return None, None

    def rank(path: str) -> tuple[int, int]:
        pairs = zip(path.split("."), (final_norm or "").split("."), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return shared, sum(p.numel() for p in lists[path].parameters())

    best = max(outermost, key=rank)
    return best, len(lists[best])


def minimal_inputs(model: nn.Module) -> dict[str, Tensor]:
    """The smallest valid input of `model`, on its device."""
    config: Any = model.config
    device = next(iter(model.parameters())).device
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {name: torch.zeros(1, getattr(vision, "num_channels", 3), height, width, device=device)}
    if name == "input_values":
        return {name: torch.zeros(1, 4000, device=device)}
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 64)
        inputs = {name: torch.zeros(1, config.num_mel_bins, frames, device=device)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.zeros(1, 4, dtype=torch.long, device=device)
        return inputs
    tokens = torch.full((1, 4), 5, dtype=torch.long, device=device)
    inputs = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens.clone()
    return inputs


@contextlib.contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Every module's tensor output, in call order; keeping the tensors keeps their storages distinct."""
    calls: list[tuple[str, Tensor]] = []

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            if isinstance(tensor, Tensor):
                calls.append((path, tensor))

        return hook

    handles = [module.register_forward_hook(record(path)) for path, module in model.named_modules() if path]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _nothing(family: str, reason: str, model: nn.Module) -> FinalNorm:
    _, num_blocks = block_list(model, None)
    config: Any = model.config
    hidden = getattr(config, "hidden_size", None)
    return FinalNorm(
        None, NormBehaviour(family), None, hidden if isinstance(hidden, int) else None, num_blocks, reason=reason
    )


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
