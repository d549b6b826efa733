"""Writes the atlas: every architecture of the installed transformers, resolved by behaviour, key by key.

    python -m suite.survey [--out FILE] [MODEL_TYPE…]

Each model type is built small and resolved; then its configuration keys are changed one at a time,
and resolved again. A key that moves the width, the depth or the eps becomes the key of that; one that changes anything
else is decisive; one that changes nothing is indifferent; one that could not be tried is left out of the atlas, so
that any other value of it is answered by behaviour.
"""

import argparse
import json
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import astuple
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers

from suite.architecture import build_config, build_model, locate_final_norm
from suite.atlas import LAST, flatten, harmless
from suite.resolution import ArchitectureError, FinalNorm

_SECONDS = 120  # for one model type
_DEPTH_WORDS = ("layer", "depth", "block")
_WIDTH_KEYS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "n_embed", "emb_dim")
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "depth",
               "num_decoder_layers", "num_encoder_layers")  # fmt: skip
_SMALL = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "intermediate_size": 64, "ffn_dim": 64,
          "moe_intermediate_size": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip
_PER_LAYER = (
    "layer_types",
    "layers_block_type",
    "stage_names",
    "out_features",
    "out_indices",
    "attention_types",
)  # lists as long as the model is deep: derived anew where left out
_ACTIVATIONS = ("relu", "gelu", "silu")
_BLOCKS = 2


def survey(model_type: str) -> dict[str, Any] | None:
    """The atlas entry of a model type; None where its defaults give no final norm."""
    defaults = _defaults(model_type)
    small = _with_blocks(model_type, defaults)
    base = _resolve(model_type, small)
    if base is None or base.path is None:
        return None
    counts = [key for key, value in small.items() if value == _BLOCKS and type(value) is int]
    deeper_by = {key: _resolve(model_type, small | {key: _BLOCKS + 1}) for key in counts}
    blocks = [key for key, found in deeper_by.items() if found is not None and found.num_blocks == _BLOCKS + 1]
    entry: dict[str, Any] = {
        "path": base.path,
        "class": _class_name(model_type, small, base.path),
        "family": base.family,
        "scale": base.behaviour.scale,
        "scale_parameter": base.behaviour.scale_parameter,
        "shift_parameter": base.behaviour.shift_parameter,
        "placement": base.placement,
        "blocks": blocks[0] if len(blocks) == 1 else None,
        "hidden": next((k for k in _by_width(defaults) if defaults[k] == base.hidden_size), base.hidden_size),
        "eps": base.behaviour.eps,
        "indifferent": [],
        "decisive": [],
    }
    if entry["blocks"] is None and not blocks:
        entry["blocks"] = base.num_blocks  # a number of groups or stages, which lists decide
    elif entry["blocks"] is None:
        return None  # how deep it is cannot be told from one key
    if isinstance(entry["blocks"], str):
        deeper = deeper_by[entry["blocks"]]
        if deeper is None or deeper.path is None:
            return None
        entry["path"] = _template(base.path, deeper.path)
        if entry["path"] is None:
            return None
    for key, other in _changes(small):
        _judge(entry, key, _resolve(model_type, small | {key: other}), base, other)
    named = {entry["hidden"], entry["blocks"], entry["eps"], *entry["decisive"]}
    switches = {key: value for key, value in defaults.items() if _is_switch(value) and key not in entry["indifferent"]}
    entry["defaults"] = {key: defaults[key] for key in defaults if key in named} | {
        key: value for key, value in switches.items() if not harmless(key)
    }
    entry["derived"] = _derived(model_type, defaults, [entry["hidden"], entry["blocks"]])
    attribute_map = getattr(transformers.CONFIG_MAPPING[model_type], "attribute_map", None) or {}
    entry["aliases"] = {alias: key for alias, key in attribute_map.items() if isinstance(key, str)}
    return entry


def _judge(entry: dict[str, Any], key: str, found: FinalNorm | None, base: FinalNorm, value: Any) -> None:
    if found is None:
        if not _is_switch(value):
            entry["decisive"].append(key)
    elif _same(found, base):
        if _is_switch(value):
            entry["indifferent"].append(key)
    elif found.path == base.path and found.behaviour.eps == value and entry["eps"] == base.behaviour.eps:
        entry["eps"] = key
    elif key != entry["blocks"]:
        entry["decisive"].append(key)


def _same(a: FinalNorm, b: FinalNorm) -> bool:
    same_behaviour = astuple(a.behaviour)[:5] == astuple(b.behaviour)[:5]
    return same_behaviour and (a.path, a.placement, a.num_blocks) == (b.path, b.placement, b.num_blocks)


def _changes(small: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, another value) for every key that is a switch, an eps, or a count of layers."""
    for key, value in small.items():
        name = key.rpartition(".")[2]
        if harmless(key):
            continue
        if isinstance(value, bool):
            yield key, not value
        elif isinstance(value, float) and 0 < value < 1e-2:
            yield key, 7 * value
        elif isinstance(value, int) and any(word in name for word in (*_DEPTH_WORDS, "norm")):
            yield key, value + 1
        elif isinstance(value, str) and value in transformers.activations.ACT2FN:
            yield key, next(name for name in _ACTIVATIONS if name != value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool | str) or value is None


def _template(path: str, deeper: str) -> str | None:
    """`layers.1.norm` and `layers.2.norm` give `layers.{last}.norm`; None where more differs than the last index."""
    parts = list(zip(path.split("."), deeper.split("."), strict=False))
    differing = [i for i, (a, b) in enumerate(parts) if a != b]
    if path.count(".") != deeper.count(".") or len(differing) > 1:
        return None
    if not differing:
        return path
    if parts[differing[0]] != (str(_BLOCKS - 1), str(_BLOCKS)):
        return None
    return ".".join(LAST if i == differing[0] else a for i, (a, _) in enumerate(parts))


def _defaults(model_type: str) -> dict[str, Any]:
    return flatten(transformers.CONFIG_MAPPING[model_type]().to_dict())


def _with_blocks(model_type: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """The default configuration with two blocks, where that is a key, and little else of what costs time to build."""
    small = {key: value for key, value in defaults.items() if not key.endswith(_PER_LAYER)}
    for key, value in small.items():
        name = key.rpartition(".")[2]
        if type(value) is int:
            small[key] = min(value, _BLOCKS if name in _DEPTH_KEYS else _SMALL.get(name, value))
    return small


def _derived(model_type: str, defaults: dict[str, Any], keys: list[Any]) -> list[str]:
    """Keys whose default follows another key: the atlas must not answer for a configuration that leaves them out."""
    derived = set()
    for key in (key for key in keys if isinstance(key, str)):
        others = {k: v for k, v in defaults.items() if k != key and not k.endswith(_PER_LAYER)}
        for other, value in others.items():
            if type(value) is int and other.rpartition(".")[2] in (*_DEPTH_KEYS, *_WIDTH_KEYS):
                changed = _nest(others | {other: 2 * value}) | {"model_type": model_type}
                try:
                    moved = flatten(build_config(changed).to_dict()).get(key) != defaults[key]
                except ArchitectureError:
                    moved = True
                if moved:
                    derived.add(key)
    return sorted(derived)


def _by_width(defaults: dict[str, Any]) -> list[str]:
    ranked = [key for name in _WIDTH_KEYS for key in defaults if key.rpartition(".")[2] == name]
    return [key for key in ranked if "vision" not in key and "audio" not in key]


def _resolve(model_type: str, flat: dict[str, Any]) -> FinalNorm | None:
    """Behaviour, on the meta device where that runs; None where the configuration cannot be built or run."""
    try:
        found = locate_final_norm(build_config(_nest(flat) | {"model_type": model_type}))
    except (ArchitectureError, ValueError, TypeError, AttributeError):
        return None
    return found if found.path is not None else None


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        target = nested
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = value
    return nested


def _class_name(model_type: str, flat: dict[str, Any], path: str) -> str:
    model = build_model(build_config(_nest(flat) | {"model_type": model_type}), "meta")
    return type(model.get_submodule(path)).__name__


def _too_long(signum: int, frame: Any) -> None:
    raise TimeoutError


def main() -> None:
    """Survey the named model types, or all, and write the atlas."""
    parser = argparse.ArgumentParser(prog="python -m suite.survey", description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--out", type=Path, default=Path(str(resources.files("suite").joinpath("data/atlas.json"))))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_long)
    names = arguments.model_types or sorted(
        name for name in transformers.CONFIG_MAPPING if transformers.CONFIG_MAPPING[name] in transformers.MODEL_MAPPING
    )
    entries: dict[str, Any] = {}
    for name in names:
        entry, reason = None, "no final norm is found in its default configuration"
        signal.alarm(_SECONDS)
        try:
            entry = survey(name)
        except Exception as error:  # one architecture that cannot be built must not stop the survey
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
        signal.alarm(0)
        if entry is not None:
            entries[name] = entry
        print(f"{name}: {entry['path'] + ' ' + entry['family'] if entry else reason}", file=sys.stderr, flush=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    arguments.out.write_text(
        f'{{"transformers": "{transformers.__version__}", "model_types": {{\n{lines}\n}}}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
