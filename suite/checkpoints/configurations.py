"""The contents of a config.json, checked and completed: what any reader may build from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deadbench.suite.checkpoints.dialects.timm import as_wrapped, is_timm
from deadbench.suite.checkpoints.strict_json import MAX_JSON_BYTES, parse_object, shown
from deadbench.suite.errors import CheckpointError
from deadbench.suite.plain_text import plain
from deadbench.suite.storage import read_file, refusal

# Numbers in a configuration that make transformers build so many objects, whatever the device.
_COUNTS = re.compile(r"^(n_layers?|num_.*layers|.*_layers|depths?|num_labels|(n|num)_.*experts)$")
_MAX_COUNT = 100_000
_MAX_DEPTH = 40  # of objects in objects; the deepest published one has seven
# What has transformers and timm take code or values from elsewhere: a kernel's repository, a model's, a file.
_HOW_COMPUTED = re.compile(r"_?(attn|experts)_implementation")
_TIMM_NAMES, _TIMM_SCHEME = ("architecture", "backbone"), re.compile(r"[\w-]+:")
_TIMM_ARGUMENTS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained", "cache_dir")
_MAX_VALUES = 200_000  # the labels of 21 000 classes, both ways, are a fifth


def config_file(path: Path) -> dict[str, Any]:
    """The configuration in a file of any name.

    Raises:
        CheckpointError: not JSON, not an object, or of counts that no model has.
    """
    try:
        raw = read_file(path, MAX_JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: no configuration ({refusal(error)})") from error
    return checked(parse_object(raw, str(path)), str(path))


def checked(config: Mapping[str, Any], called: str, model_type: str | None = None) -> dict[str, Any]:
    """A configuration as it is read: plain floats, and a `model_type` where its `architectures` or the user tell it.

    Raises:
        CheckpointError: counts, or so many values, that no model has; code or values from elsewhere.
    """
    _check_depth(config, called)
    if _num_values(config) > _MAX_VALUES:
        raise CheckpointError(f"{called}: more than {_MAX_VALUES:,} values; no model's configuration has so many")
    _check_counts(config, called)
    _check_elsewhere(config, called)
    plain = {key: _plain_floats(value) for key, value in config.items()}
    if not isinstance(plain.get("model_type"), str):
        if not model_type and is_timm(plain):
            return as_wrapped(plain)
        told = model_type or _type_of(plain.get("architectures"))
        plain |= {"model_type": told} if told else {}
    return plain


def _num_values(value: Any) -> int:
    """How many numbers, texts and the like a configuration holds."""
    if isinstance(value, Mapping):
        return sum(_num_values(each) for each in value.values())
    return sum(_num_values(each) for each in value) if isinstance(value, list) else 1


def _type_of(architectures: Any) -> str | None:
    """The model type whose class in transformers is the first that is named; None where there are none, or several."""
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(named, str):
        return None
    from transformers.models.auto import modeling_auto

    found = set()
    for mapping in (value for name, value in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")):
        for model_type, names in mapping.items():
            if named in ((names,) if isinstance(names, str) else names):
                found.add(model_type)
    own = {each for each in found if named.lower().startswith(re.sub(r"[-_]", "", each))}  # others borrow its class
    candidates = own or found
    longest = max(map(len, candidates), default=0)
    longest_named = [each for each in candidates if len(each) == longest]
    return longest_named[0] if len(longest_named) == 1 else None


def _check_depth(config: Mapping[str, Any], called: str) -> None:
    level: list[Any] = [config]
    for _ in range(_MAX_DEPTH):
        level = [each for value in level for each in (value.values() if isinstance(value, Mapping) else value)]
        level = [each for each in level if isinstance(each, (dict, list))]
        if not level:
            return
    raise CheckpointError(f"{called}: nested more than {_MAX_DEPTH} deep; no configuration is")


def _check_counts(config: Mapping[str, Any], called: str) -> None:
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            _check_counts(value, called)
        elif _COUNTS.match(key) and any(isinstance(v, (int, float)) and v > _MAX_COUNT for v in values):
            raise CheckpointError(f"{called}: {plain(key)} is {shown(value)}; no model has more than {_MAX_COUNT}")


def _check_elsewhere(config: Any, called: str) -> None:
    """Refuse what names code, or values that are not the checkpoint's; who builds it fetches nothing besides."""
    if isinstance(config, list):
        for each in config:
            _check_elsewhere(each, called)
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        if _HOW_COMPUTED.fullmatch(key) and "/" in str(value):
            raise CheckpointError(
                f"{called}: {key} is {shown(value)}, code from elsewhere, which is never run; take the key out"
            )
        if key in _TIMM_NAMES and isinstance(value, str) and _TIMM_SCHEME.match(value):
            raise CheckpointError(
                f"{called}: {key} is {shown(value)}, which lies elsewhere; write the name of timm's architecture"
            )
        told = [name for name in _TIMM_ARGUMENTS if name in value] if key == "model_args" and value else []
        if told:
            raise CheckpointError(f"{called}: {key} has {told[0]}, which takes values from elsewhere; take it out")
        _check_elsewhere(value, called)


def _plain_floats(value: Any) -> Any:
    """`value` with transformers' spelling of what JSON has no number for, `{"__float__": "Infinity"}`, as floats."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _plain_floats(each) for key, each in value.items()}
    return [_plain_floats(each) for each in value] if isinstance(value, list) else value
