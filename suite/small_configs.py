"""A small configuration of any model type of transformers: a few blocks, narrow, built in milliseconds.

The keys of a configuration are not documented as a whole, so shrinking is tried: what no longer builds is taken back.
Used by the survey and by tests over every architecture, never by a read.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from suite.atlas import flatten
from suite.resolution import ArchitectureError

BLOCKS = 2
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "depth",
              "num_decoder_layers", "num_encoder_layers", "num_blocks")  # fmt: skip
# Lists as long as the model is deep: derived anew where left out.
PER_LAYER = ("layer_types", "layers_block_type", "stage_names", "out_features", "out_indices", "mlp_layer_types",
             "no_rope_layers", "attention_types", "hybrid_layer_ids", "full_attn_idxs")  # fmt: skip
_WIDTH = re.compile(
    r"(hidden|dim|size|width|embd|channels|features|rank|d_model|d_ff|d_kv|ffn|inner|intermediate|units|embed)"
)
_NO_WIDTH = re.compile(
    r"(vocab|image_size|patch|position|window|kernel|chunk|block_size|token|num_mel|bins|max_|input_|crop|stride|"
    r"head_size_?ratio|num_features|feature_size|grid|sample|context|queries|length|codebook_size|groups)"
)
_EXPERTS = re.compile(r"(num_.*experts|n_routed_experts|n_.*experts)$")
_SMALL_VOCABULARY = 200
_QUICK = 5_000_000  # parameters


def small_config(model_type: str) -> dict[str, Any]:
    """A flat configuration (nested keys joined by dots) of the model type, as small as it still builds on meta.

    Raises:
        ArchitectureError: not even its defaults can be built.
    """
    from suite.architecture import build_config, build_model

    defaults = flatten(transformers.CONFIG_MAPPING[model_type]().to_dict())

    def works(flat: dict[str, Any]) -> bool:
        try:
            config = build_config(nest(flat) | {"model_type": model_type})
            model = build_model(config, "meta")
            if (
                runs and sum(p.numel() for p in model.parameters()) < _QUICK
            ):  # one kernel an operation: faster than meta
                model = build_model(config)
        except ArchitectureError:
            return False
        return all(p.numel() for p in model.parameters()) and (not runs or _runs(model))

    runs = False
    starts = [_shallow(defaults, drop=True), _shallow(defaults, drop=False), defaults]
    best = next((start for start in starts if works(start)), None)
    if best is None:
        build_model(build_config({"model_type": model_type}), "meta")
        raise ArchitectureError(f"{model_type}: its defaults, written out, do not build")
    runs = True  # from here on, unless its values are looked at, which meta tensors have not
    runs = works(best)
    for step in (_fewer_experts(best), _small_vocabulary(best)):
        best = best | step if works(best | step) else best
    for keys in _groups(best):
        for divisor in (16, 8, 4, 2):
            narrow = {key: _divided(best[key], divisor) for key in keys}
            if narrow and works(best | narrow):
                best = best | narrow
                break
    return best


def _runs(model: torch.nn.Module) -> bool:
    from suite.dummy_inputs import running_inputs

    try:
        running_inputs(model)
    except Exception:
        return False
    return True


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Keys joined by dots, nested again; the inverse of `suite.atlas.flatten`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        target = nested
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = value
    return nested


def last(key: str) -> str:
    """The name of a key without the configurations that hold it."""
    return key.rpartition(".")[2]


def _shallow(defaults: dict[str, Any], drop: bool) -> dict[str, Any]:
    kept = {key: value for key, value in defaults.items() if not (drop and last(key) in PER_LAYER)}
    return {
        key: min(value, BLOCKS) if type(value) is int and last(key) in DEPTH_KEYS else value
        for key, value in kept.items()
    }


def _fewer_experts(flat: dict[str, Any]) -> dict[str, Any]:
    return {key: 8 for key, value in flat.items() if type(value) is int and value > 8 and _EXPERTS.search(last(key))}


def _small_vocabulary(flat: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in flat.items():
        name = last(key)
        if name.endswith("vocab_size") and type(value) is int:
            small[key] = min(value, _SMALL_VOCABULARY)
        elif name.endswith(("_token_id", "_token_index")) and type(value) is int and value >= _SMALL_VOCABULARY:
            small[key] = _SMALL_VOCABULARY - 1 - len(small) % 50
    return small


def _groups(flat: dict[str, Any]) -> Iterator[list[str]]:
    """Keys that are narrowed together: all widths; else those of each nested configuration; else inner ones alone."""
    widths = [key for key, value in flat.items() if _WIDTH.search(last(key)) and not _NO_WIDTH.search(last(key))
              and _wide(value)]  # fmt: skip
    yield widths
    for parent in dict.fromkeys(key.rpartition(".")[0] for key in widths):
        yield [key for key in widths if key.rpartition(".")[0] == parent]
    yield [*widths, *(key for key in flat if last(key).endswith("heads") and _wide(flat[key]))]
    yield [key for key in widths if re.search(r"(intermediate|ffn|inner|d_ff)", last(key))]


def _wide(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(type(v) is int and v >= 32 and v % 8 == 0 for v in values)


def _divided(value: Any, divisor: int) -> Any:
    if isinstance(value, list):
        return [_divided(v, divisor) for v in value]
    return value // divisor if value % divisor == 0 and value // divisor >= 8 else value


def parameters_of(flat: dict[str, Any], model_type: str) -> int:
    """How many parameters the configuration's bare model has."""
    from suite.architecture import build_config, build_model

    model: torch.nn.Module = build_model(build_config(nest(flat) | {"model_type": model_type}), "meta")
    return sum(p.numel() for p in model.parameters())
