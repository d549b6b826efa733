"""Writes the atlas: every architecture of the installed transformers, resolved by behaviour, key by key.

    python -m deadbench.suite.atlas [--out FILE] [--processes N] [MODEL_TYPE…]

Each model type is built small and resolved; then its configuration keys are changed one at a time, and it is resolved
again. A key that moves the width, the depth or the eps becomes the key of that; one that changes anything else is
decisive; one that changes nothing is indifferent; one that could not be tried is left out, so that any other value of
it is answered by behaviour. Where a switch is decisive, the other side of it gets an entry of its own.
"""

import re
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import transformers

from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.locate import find_final_norm, locate_final_norm
from deadbench.suite.architectures.norms import FinalNorm
from deadbench.suite.architectures.stored_names import Renaming, naming
from deadbench.suite.atlas.config_keys import DEPTH_KEYS, PER_LAYER, flatten, harmless, last, nest
from deadbench.suite.atlas.lookup import LAST
from deadbench.suite.atlas.small_configs import small_config
from deadbench.suite.errors import ArchitectureError

_WIDTH_KEYS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "n_embed", "emb_dim")
_QUICK = 5_000_000  # parameters
_COUNT = 12  # an integer up to this may be a number of blocks, groups, stages or kinds
_COUNTED = re.compile(r"(layer|depth|block|group|stage|level|norm|num_(?!.*head))")
_ACTIVATIONS = ("relu", "gelu", "silu")


def survey(model_type: str) -> list[dict[str, Any]]:
    """The atlas entries of a model type: that of its defaults, and one for the other side of each decisive switch.

    Raises:
        ArchitectureError: its defaults cannot be resolved.
    """
    small = small_config(model_type)
    first = _entry(model_type, small, {})
    others = []
    for key in first["decisive"]:
        if isinstance(small.get(key), bool):
            switched = {key: not small[key]}
            try:
                others.append(_entry(model_type, small | switched, switched))
            except ArchitectureError:
                continue
    return [first, *others]


def _entry(model_type: str, small: dict[str, Any], switched: dict[str, bool]) -> dict[str, Any]:
    """The entry of the configuration `small`, whose keys have default values but for those `switched`."""
    defaults = flatten(transformers.CONFIG_MAPPING[model_type]().to_dict()) | switched
    base = _resolve(model_type, small)
    if base is None:
        config = build_config(nest(small) | {"model_type": model_type})
        raise ArchitectureError(locate_final_norm(config).reason or "not resolved")
    behaviour = base.behaviour
    entry: dict[str, Any] = {
        "path": base.path,
        "class": None,
        "family": base.family,
        "scale": behaviour.scale,
        "scale_parameter": behaviour.scale_parameter,
        "shift_parameter": behaviour.shift_parameter,
        "placement": base.placement,
        "blocks": base.num_blocks,
        "hidden": None,
        "eps": behaviour.eps,
        "reason": base.reason,
        "indifferent": [],
        "decisive": [],
    }
    if base.path is not None:
        model = build_model(build_config(nest(small) | {"model_type": model_type}), "meta")
        entry |= {"axes_after": behaviour.axes_after} if behaviour.axes_after else {}
        entry["class"] = type(model.get_submodule(base.path)).__name__
        entry["hidden"] = _width_key(model_type, small, base)
        entry["base"] = naming(model).base
        entry["renamings"] = [astuple(rule) for rule in _that_name(model, f"{base.path}.{behaviour.scale_parameter}")]
        if entry["hidden"] is None and behaviour.scale_parameter is None:
            raise ArchitectureError("neither a key nor a tensor gives the width")
    entry["towers"] = _other_towers(model_type, small, entry["hidden"], base)
    for key, values in _changes(small):
        if key not in switched and not key.startswith(tuple(entry["towers"])):
            _judge(entry, model_type, small, key, values, base)
    if base.path is None and isinstance(entry["blocks"], str):
        entry["reason"] = str(base.reason).replace(f".{small[entry['blocks']] - 1} (", f".{LAST} (")
    named = {entry["hidden"], entry["blocks"], entry["eps"], *entry["decisive"]}
    entry["defaults"] = {
        key: value
        for key, value in defaults.items()
        if not key.startswith(tuple(entry["towers"])) and (key in named or _only_by_default(key, value, entry))
    }
    entry["derived"] = sorted({*switched, *_derived(model_type, defaults, [entry["hidden"], entry["blocks"]])})
    attribute_map = getattr(transformers.CONFIG_MAPPING[model_type], "attribute_map", None) or {}
    entry["aliases"] = {alias: key for alias, key in attribute_map.items() if isinstance(key, str)}
    return entry


def _judge(
    entry: dict[str, Any], model_type: str, small: dict[str, Any], key: str, values: list[Any], base: FinalNorm
) -> None:
    """Put `key` where what happens at other values of it says."""
    tried = ((value, _resolve(model_type, small | {key: value})) for value in values)
    value, found = next(((value, found) for value, found in tried if found is not None), (None, None))
    count = type(small[key]) is int
    if found is None:
        if isinstance(small[key], float) or last(key) in DEPTH_KEYS:
            entry["decisive"].append(key)
    elif _same(found, base):
        if not count:
            entry["indifferent"].append(key)
    elif found.path == base.path and found.behaviour.eps == value and entry["eps"] == base.behaviour.eps:
        entry["eps"] = key
    elif count and type(entry["blocks"]) is not str and _is_depth(small[key], value, base, found):
        entry["blocks"] = key
        if base.path is not None and found.path is not None:
            entry["path"] = _template(base.path, found.path, small[key])
    else:
        entry["decisive"].append(key)


def _is_depth(before: int, after: Any, base: FinalNorm, found: FinalNorm) -> bool:
    """Whether a key that went from `before` to `after` is the number of blocks, and moved nothing else."""
    told = (base.num_blocks, found.num_blocks) == (before, after)
    if base.path is None or found.path is None:
        return told and base.path == found.path
    same = astuple(base.behaviour)[:5] == astuple(found.behaviour)[:5] and base.placement == found.placement
    return told and same and found.path in (base.path, _renumbered(base.path, before - 1, after - 1))


def _template(path: str, deeper: str, blocks: int) -> str:
    """`layers.1.norm` and `layers.2.norm`, of two blocks and of three, give `layers.{last}.norm`."""
    return path if path == deeper else _renumbered(path, blocks - 1, LAST)


def _renumbered(path: str, index: int, other: int | str) -> str:
    """The path with another number in the place of `index`, inside it or at its end."""
    return re.sub(rf"\.{index}(?=\.|$)", f".{other}", path)


def _same(a: FinalNorm, b: FinalNorm) -> bool:
    same_behaviour = astuple(a.behaviour)[:5] == astuple(b.behaviour)[:5]
    return same_behaviour and (a.path, a.placement, a.num_blocks) == (b.path, b.placement, b.num_blocks)


def _changes(small: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """(key, other values to try in turn) for every key that is a switch, an eps, a count or a list of numbers."""
    for key, value in small.items():
        if harmless(key):
            continue
        if isinstance(value, bool):
            yield key, [not value]
        elif isinstance(value, float) and 0 < value < 1e-2:
            yield key, [7 * value]
        elif type(value) is int and (last(key) in DEPTH_KEYS or (0 < value <= _COUNT and _COUNTED.search(last(key)))):
            yield key, [value + 1, 2 * value, value - 1]
        elif isinstance(value, str) and value in transformers.activations.ACT2FN:
            yield key, [next(name for name in _ACTIVATIONS if name != value)]
        elif isinstance(value, list) and value and all(type(v) in (int, float) for v in value):
            yield key, [[*value[:-1], value[-1] + 1], value[::-1], [2 * v for v in value], [value[0]] * len(value)]


def _only_by_default(key: str, value: Any, entry: dict[str, Any]) -> bool:
    """Whether it is by its default that a key is covered: a switch that was not judged, or a collection of any kind."""
    judged = key in entry["indifferent"]
    return not harmless(key) and (isinstance(value, list | dict) or (_is_switch(value) and not judged))


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool | str) or value is None


def _width_key(model_type: str, small: dict[str, Any], base: FinalNorm) -> str | None:
    """The key that gives the norm's width: doubled, it doubles it; None where no key alone does."""
    keys = [key for key, value in small.items() if type(value) is int and value == base.hidden_size]
    keys.sort(key=lambda key: _WIDTH_KEYS.index(last(key)) if last(key) in _WIDTH_KEYS else len(_WIDTH_KEYS))
    for key in keys:
        wider = _resolve(model_type, small | {key: 2 * small[key]})
        if wider is not None and wider.path == base.path and wider.hidden_size == 2 * small[key]:
            return key
    return None


def _other_towers(model_type: str, small: dict[str, Any], width: str | None, base: FinalNorm) -> list[str]:
    """Prefixes of nested configurations other than that of the norm's width, whose depth does not move the norm."""
    if width is None:
        return []
    others = []
    for prefix in sorted({key.rpartition(".")[0] + "." for key in small if "." in key}):
        depths = [
            key for key in small if key.startswith(prefix) and last(key) in DEPTH_KEYS and type(small[key]) is int
        ]
        if not width.startswith(prefix) and depths:
            deeper = [_resolve(model_type, small | {key: small[key] + 1}) for key in depths]
            if any(deeper) and all(found is None or _same(found, base) for found in deeper):
                others.append(prefix)
    return others


def _that_name(model: Any, parameter: str) -> list[Renaming]:
    """The rules that lead from a stored name to `parameter`, or away from it; found by following them back."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    named = naming(model)
    back = [
        each.reverse_transform()
        for each in reversed(get_model_conversion_mapping(model, add_legacy=False))
        if isinstance(each, WeightRenaming)
    ]
    names = {parameter, f"{named.base}.{parameter}"} if named.base else {parameter}
    begun = set(names)
    for each in back:
        names |= {each.rename_source_key(name)[0] for name in names}
    renamed = any(rule(name) != name for rule in named.rules for name in begun)
    return list(named.rules) if names != begun or renamed else []


def _derived(model_type: str, defaults: dict[str, Any], keys: list[Any]) -> list[str]:
    """Keys whose default follows another key: the atlas must not answer for a configuration that leaves them out."""
    derived = set()
    for key in (key for key in keys if isinstance(key, str)):
        others = {k: v for k, v in defaults.items() if k != key and last(k) not in PER_LAYER}
        for other, value in others.items():
            if type(value) is int and last(other) in (*DEPTH_KEYS, *_WIDTH_KEYS):
                changed = nest(others | {other: 2 * value}) | {"model_type": model_type}
                try:
                    moved = flatten(build_config(changed).to_dict()).get(key) != defaults[key]
                except ArchitectureError:
                    moved = True
                if moved:
                    derived.add(key)
    return sorted(derived)


def _resolve(model_type: str, flat: dict[str, Any]) -> FinalNorm | None:
    """What behaviour says; None where the configuration cannot be built or run."""
    try:
        config = build_config(nest(flat) | {"model_type": model_type})
        model = build_model(config, "meta")
        # Small models run faster on CPU, where one operation is one kernel, than on meta.
        small = sum(p.numel() for p in model.parameters()) <= _QUICK
        found = find_final_norm(build_model(config)) if small else locate_final_norm(config)
    except (ArchitectureError, ValueError, TypeError, AttributeError):
        return None
    return found if found.family != "undetermined" else None
