"""What is settled of a read before it runs, or once for all reads of a model: dtype, tokens, parameters, architecture.

What is found by running a model is found once a process and kept by configuration. Heavy imports wait for that.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from deadbench.suite.architectures.resolve import Resolved
    from deadbench.suite.architectures.wiring import Wiring
    from deadbench.suite.checkpoints.tensors import TensorEntry

_KEPT = 4  # architectures: one process reads one model after another


@dataclass(frozen=True)
class Configuration:
    """The contents of a config.json; equal and hashed by what is written there."""

    raw: Mapping[str, Any] = field(compare=False)
    text: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", json.dumps(self.raw, sort_keys=True))

    def build(self) -> Any:
        """A new configuration object of transformers.

        Raises:
            ArchitectureError: no model_type, one that the installed transformers does not know, or remote code.
        """
        from deadbench.suite.architectures.build import build_config

        return build_config(self.raw)


def dtype_name(asked: str, config: Any, entries: "Mapping[str, TensorEntry] | None") -> str:
    """The dtype of the forward pass: as asked, else that of the stored tensors, else the configuration's."""
    from deadbench.suite.checkpoints.tensors import stored_dtype

    if asked != "auto":
        return asked
    declared = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return (stored_dtype(dict(entries)) if entries else None) or declared


def num_tokens(rule: int | str, hidden_size: int) -> int:
    """A protocol's tokens, a number or a multiple of the width (`8D`), for a model of that width."""
    return rule if isinstance(rule, int) else int(rule[:-1]) * hidden_size


@lru_cache(_KEPT)
def published(config: Configuration) -> Any:
    """The published architecture with its heads, on the meta device; only to be looked at.

    Raises:
        ArchitectureError: transformers cannot build it.
    """
    from deadbench.suite.architectures.build import build_published

    return build_published(config.build(), "meta")


def num_parameters(config: Configuration) -> int:
    """Parameters of the published architecture; raises as `published` does."""
    from deadbench.suite.architectures.build import count_parameters

    return count_parameters(published(config))


@lru_cache(_KEPT)
def published_wiring(config: Configuration) -> "tuple[Wiring | None, int | None]":
    """The wiring of the published architecture, and its dead parameter directions at random initialisation.

    Both are None where it cannot be followed.

    Raises:
        ArchitectureError: transformers cannot build it.
    """
    from deadbench.suite.reads.dead_parameters import dead_at_initialisation, trace_published

    model, wiring = trace_published(config.build(), published(config))
    return wiring, None if wiring is None else dead_at_initialisation(model, wiring)


@lru_cache(_KEPT)
def resolved_without_weights(config: Configuration, modality: str, stack: str) -> "Resolved":
    """`resolve_without_weights`, once."""
    from deadbench.suite.architectures.resolve import resolve_without_weights

    return resolve_without_weights(config.build(), modality, stack)


_RESOLVED: "dict[tuple[Configuration, str, str], Resolved]" = {}


def resolved_in(model: "nn.Module", config: Configuration, modality: str, stack: str) -> "Resolved":
    """What `resolve` finds in a loaded model; what it found in another one of its configuration stands for it."""
    from deadbench.suite.architectures.resolve import resolve

    key = (config, modality, stack)
    found = _RESOLVED.get(key)
    if found is None:
        found = resolve(model, modality, stack, config.build())
        if found.final.path is not None:  # else other weights may tell more
            _RESOLVED[key] = found
    return found
