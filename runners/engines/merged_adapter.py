"""A map of a base with what an adapter does to it: PEFT's own arithmetic, one map at a time, when it is asked for.

What a merged model would hold (`merge_and_unload`, in the base's dtype on the CPU). Of adapter_config.json only the
keys below are handed on, values of plain types: no module, code or initialisation of a stranger's choice.
"""

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deadbench.suite.architectures.stored_names import naming, renamed, unwrapped
from deadbench.suite.checkpoints.adapters import AdaptedCheckpoint
from deadbench.suite.checkpoints.no_weights import ADAPTER_FILE
from deadbench.suite.checkpoints.quantised import method_of
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.checkpoints.tensors import TensorEntry
from deadbench.suite.errors import CheckpointError, reason_of

# Kinds that change maps of their own each, and what of their configuration decides the arithmetic.
_DECIDING = {
    "LORA": (
        "r", "lora_alpha", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern",
    ),
    "IA3": ("fan_in_fan_out", "feedforward_modules"),
    "LOHA": ("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d"),
    "LOKR": (
        "r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d", "decompose_both", "decompose_factor",
    ),
    "OFT": ("r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    "HRA": ("r", "apply_GS"),
    "LN_TUNING": (),
}  # fmt: skip
_PLAIN_START = (None, True, False, "gaussian", "orthogonal", "eva")  # initialisations that leave the base as it is
_HALVES = (torch.float16, torch.bfloat16)  # in which PEFT does not keep an adapter
_PATTERN = re.compile(r"[\w.\-^$|()\\*+?\[\]]{1,200}")
_MOST_REPEATS = 4
INSTALL = "an adapter's maps are merged by peft, which is not installed; pip install 'deadbench[peft]'"


class Slice(Protocol):
    """A stored tensor as transformers' loader takes it."""

    def get_shape(self) -> list[int]:
        """Its shape."""

    def get_dtype(self) -> str:
        """Its dtype as safetensors call it."""

    def __getitem__(self, index: Any) -> Tensor:
        """The values, or a part of them."""


def why_not_merged(checkpoint: AdaptedCheckpoint) -> str | None:
    """Why no forward pass can be had of an adapter, in one line; None where one can.

    Raises:
        CheckpointError: the adapter cannot be read, is not of its base, or is refused by `peft_settings`.
    """
    kind, settings = checkpoint.kind, checkpoint.settings
    merge = "merge it into its base (merge_and_unload of peft, then save_pretrained) and give that folder"
    if kind not in _DECIDING:
        return f"{checkpoint.source}: an adapter of {kind}; run are {', '.join(_DECIDING)}; {merge}"
    start = settings.get("init_lora_weights") if kind == "LORA" else None
    if start not in _PLAIN_START:
        return f"{checkpoint.source}: init_lora_weights is {shown(start)}, which changes the base itself; {merge}"
    for key in ("layer_replication", "target_parameters", "trainable_token_indices", "arrow_config"):
        if settings.get(key):
            return f"{checkpoint.source}: {key} in {ADAPTER_FILE} is not followed; {merge}"
    if not checkpoint.tensors.changes:
        return None
    peft_settings(checkpoint)
    if quantised := method_of(checkpoint.config()):
        return (
            f"{checkpoint.source}: its base {checkpoint.base.source} is quantised ({quantised}), and nothing is merged "
            f"into that; name the base's plain weights in base_model_name_or_path of {ADAPTER_FILE}, or {merge}"
        )
    from importlib.util import find_spec

    return f"{checkpoint.source}: {INSTALL}" if find_spec("peft") is None else None


@dataclass(frozen=True)
class MergedSlice:
    """A parameter of a changed map as transformers' loader takes a slice of a safetensors file.

    Attributes:
        path: of the map, as the adapter calls it.
        stored: the base's stored parameters of the map, `weight` and, where the adapter changes it, `bias`.
        parts: the adapter's tensors, by their names below the path.
        wanted: which of the parameters this is.
        module: the base's module, on any device; None where the architecture has none of that path.
        settings: what PEFT is told.
    """

    path: str
    stored: Mapping[str, Slice]
    parts: Mapping[str, Slice]
    wanted: str
    module: nn.Module | None
    settings: Mapping[str, Any]

    def get_shape(self) -> list[int]:
        """Its shape."""
        return self.stored[self.wanted].get_shape()

    def get_dtype(self) -> str:
        """Its dtype as safetensors call it."""
        return self.stored[self.wanted].get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        """The values after merging, or a part of them.

        Raises:
            CheckpointError: an adapter that does not fit the map.
        """
        try:
            return self._merged()[index]
        except CheckpointError:
            raise
        except Exception as error:  # shapes of strangers meet arithmetic of others
            raise CheckpointError(f"{self.path}: the adapter cannot be merged into it ({reason_of(error)})") from error

    def _merged(self) -> Tensor:
        import peft

        *above, last = self.path.split(".")
        holder = owner = nn.Module()
        for part in above:  # patterns of a rank or of maps are of whole paths
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, self._map())
        tensors = {f"{self.path}.{name}": each[...] for name, each in self.parts.items()}
        tensors = {name: t.float() if t.dtype in _HALVES else t for name, t in tensors.items()}
        told = {key: value for key, value in self.settings.items() if key != "peft_type"}
        of_kind: Any = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.settings["peft_type"])]
        named = told.get("feedforward_modules")
        targets = {self.path, *(named if isinstance(named, list) else ())}  # PEFT wants those among them
        config = of_kind(**told, target_modules=targets, inference_mode=True)
        # Ranks that a stranger's configuration tells take no memory; OFT computes with constants, and has none.
        device = "cpu" if self.settings["peft_type"] == "OFT" else "meta"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of patterns that are other maps'
            with torch.device(device):
                peft.inject_adapter_in_model(config, holder, state_dict=tensors)
            holder.peft_config = {"default": config}  # type: ignore[assignment]
            layer: Any = owner.get_submodule(last)
            layer._move_adapter_to_device_of_base_layer = lambda *_: None  # it would round to the base's dtype
            loaded: Any = peft.set_peft_model_state_dict(holder, tensors, low_cpu_mem_usage=True)
            lacking = [name for name, parameter in holder.named_parameters() if parameter.is_meta]
            if loaded.unexpected_keys or lacking:
                raise CheckpointError(
                    f"{self.path}: the adapter's tensors are not those of its {ADAPTER_FILE} "
                    f"({(loaded.unexpected_keys or lacking)[0]}); take both from the same place"
                )
            layer.merge()
        merged: Tensor = getattr(layer.get_base_layer(), self.wanted)
        return merged.detach()

    def _map(self) -> nn.Module:
        """The base's module with its stored values; of a path that the architecture does not have, a linear map."""
        values = {name: nn.Parameter(each[...], requires_grad=False) for name, each in self.stored.items()}
        weight, found = values["weight"], self.module
        if found is None or getattr(found, "weight", weight).shape != weight.shape:
            found = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        found = copy.deepcopy(found)
        found.weight = weight
        if isinstance(getattr(found, "bias", None), nn.Parameter) or "bias" in values:
            found.register_parameter("bias", values.get("bias"))
        return found


def adapted_slices(
    checkpoint: AdaptedCheckpoint, slice_of: Callable[[TensorEntry], Slice], architecture: Any
) -> dict[str, Slice]:
    """Every stored parameter that the adapter changes or has under another name, as it is with the adapter.

    Args:
        checkpoint: the adapter and its base.
        slice_of: a stored tensor.
        architecture: the base as published, on any device.

    Raises:
        CheckpointError: a map that the base does not have; `peft_settings` refuses its configuration.
    """
    stored, tensors = checkpoint.headers(), checkpoint.tensors
    prefix, modules = f"{architecture.base_model_prefix}.", dict(architecture.named_modules())
    rules = naming(architecture).rules
    called = {renamed(unwrapped(name), rules): name for name in stored}

    def in_any_form(name: str, known: Mapping[str, Any]) -> Any:
        return next((known[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in known), None)

    found: dict[str, Slice] = {
        place: slice_of(entry) for name, entry in tensors.others.items() if (place := in_any_form(name, called))
    }
    settings = peft_settings(checkpoint) if tensors.changes else {}
    for change in tensors.changes:
        weight = change.weight or in_any_form(f"{change.path}.weight", called)
        if weight is None:
            raise CheckpointError(
                f"{checkpoint.source}: it changes {change.path}, of which its base {checkpoint.base.source} stores no "
                f"weight; name the base that it was trained on in base_model_name_or_path of {ADAPTER_FILE}"
            )
        bias = change.bias or in_any_form(f"{change.path}.bias", called)
        whole = settings["peft_type"] == "IA3" or any(name.endswith(".bias") for name in change.tensors)
        names = {"weight": weight} | ({"bias": bias} if bias and whole else {})
        own = {parameter: found.get(name) or slice_of(stored[name]) for parameter, name in names.items()}
        parts = {name: slice_of(entry) for name, entry in change.tensors.items()}
        module = in_any_form(change.path, modules)
        for parameter, name in names.items():
            found[name] = MergedSlice(change.path, own, parts, parameter, module, settings)
    return found


def peft_settings(checkpoint: AdaptedCheckpoint) -> dict[str, Any]:
    """What of an adapter's configuration PEFT is told.

    Raises:
        CheckpointError: a value of another type than it is of, or a pattern that may take for ever.
    """
    told: dict[str, Any] = {"peft_type": checkpoint.kind}
    for key in _DECIDING[checkpoint.kind]:
        value = checkpoint.settings.get(key)
        if value is None:
            continue
        patterns = [value] if isinstance(value, str) else list(value) if isinstance(value, (dict, list)) else []
        numbers = list(value.values()) if isinstance(value, dict) else [] if patterns or value == [] else [value]
        harmless = all(isinstance(each, str) and _is_harmless(each) for each in patterns)
        if not harmless or not all(isinstance(each, (bool, int, float)) for each in numbers):
            raise CheckpointError(f"{checkpoint.source}: {ADAPTER_FILE}: {key} is {shown(value)}; hostile or corrupt")
        told[key] = value
    return told


def _is_harmless(pattern: str) -> bool:
    """Whether a pattern of module names is one that cannot take long: no repeated groups, few repeats."""
    repeats = len(re.findall(r"[*+]", pattern))
    return bool(_PATTERN.fullmatch(pattern)) and not re.search(r"\)[*+?]", pattern) and repeats <= _MOST_REPEATS
