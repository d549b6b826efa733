"""A configuration becomes a model: bare or as published, with values or on the meta device."""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from deadbench.suite.architectures.no_network import nothing_fetched
from deadbench.suite.architectures.objectives import stated_architectures
from deadbench.suite.architectures.trial import check
from deadbench.suite.errors import ArchitectureError, ElsewhereError, RemoteCodeError, reason_of

SMALL_MODEL = 500_000_000  # parameters: 2 GB in float32, a few seconds to draw


def build_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object from the contents of a config.json, of which a model can be built.

    Raises:
        ArchitectureError: no model_type, one that the installed transformers does not know, remote code, something that
            would have to be fetched, or a model that takes more time or memory than any that is published.
    """
    import transformers

    known = dict(config)
    model_type = known.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ArchitectureError("the configuration has no model_type; give --model-type NAME")
    if model_type not in transformers.CONFIG_MAPPING:
        if known.get("auto_map"):
            raise RemoteCodeError(f"model_type {model_type!r} needs code from the checkpoint, which is never run")
        raise ArchitectureError(
            f"model_type {model_type!r} is unknown to transformers {transformers.__version__}; give --config or "
            "--model-type of an architecture that it knows"
        )
    if model_type == "timm_wrapper" and importlib.util.find_spec("timm") is None:
        architecture = known.get("architecture")
        raise ArchitectureError(f"its architecture {architecture!r} is timm's, which is not here: pip install timm")
    known.pop("auto_map", None)
    known.pop("return_dict", None)  # outputs are read by name, however the checkpoint's author had them
    known.pop("quantization_config", None)  # weights are not loaded by this object; norms are stored plain
    known.pop("_name_or_path", None)  # where it was once loaded from
    check({"model_type": model_type, **known})
    with _transformers_at_work("refuses the configuration"):
        return transformers.AutoConfig.for_model(model_type, **known)


@contextlib.contextmanager
def _transformers_at_work(failing: str) -> Iterator[None]:
    """Without a network; whatever is raised becomes one line, `failing` in the middle."""
    try:
        with nothing_fetched():
            yield
    except ElsewhereError:
        raise
    except Exception as error:
        raise ArchitectureError(f"transformers {failing}: {reason_of(error)}") from error


def bare_model(published: Any) -> Any:
    """The bare model in a published one; that itself where it holds another library's module in its place."""
    body = published.base_model
    return body if hasattr(body, "base_model_prefix") else published


def build_model(config: Any, device: str = "cpu") -> nn.Module:
    """The bare model (`AutoModel`) of `config` in float32, randomly initialised by transformers; on `meta`, empty.

    The published architecture takes its place where `AutoModel` cannot build one.

    Raises:
        ArchitectureError: transformers has no model for it or refuses to build it.
    """
    import transformers

    try:
        with _transformers_at_work(f"cannot build {config.model_type!r}"), torch.device(device):
            # eager experts: the grouped kernels refuse meta tensors and half of all dtypes
            model: nn.Module = transformers.AutoModel.from_config(
                config, dtype=torch.float32, experts_implementation="eager"
            )
    except ArchitectureError as error:
        if isinstance(error, ElsewhereError) or published_class(config) is None:
            raise
        return build_published(config, device)
    return model.eval()


def published_class(config: Any) -> Any:
    """transformers' class of the published architecture (`config.architectures[0]`), heads included, or None."""
    import transformers

    classes = (
        getattr(transformers, name, None) for name in stated_architectures(getattr(config, "architectures", None))
    )
    return next((found for found in classes if found is not None), None)


def build_published(config: Any, device: str = "cpu") -> nn.Module:
    """The published architecture of `config` with its heads, as `build_model` builds; the bare model if it has none.

    Raises:
        ArchitectureError: transformers refuses to build it.
    """
    published = published_class(config)
    if published is None:
        return build_model(config, device)
    with _transformers_at_work(f"cannot build {published.__name__}"), torch.device(device):
        model: nn.Module = published._from_config(config, dtype=torch.float32, experts_implementation="eager")
    return model.eval()


def count_parameters(model: nn.Module) -> int:
    """Unique parameters of a model, ties once."""
    return sum(p.numel() for p in model.parameters())
