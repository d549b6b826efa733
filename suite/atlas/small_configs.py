"""A small configuration of any model type of transformers: a few blocks, narrow, built in milliseconds.

The keys of a configuration are not documented as a whole, so shrinking is tried: what no longer builds is taken back.
Used by the survey and by tests over every architecture, never by a read.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from deadbench.suite.atlas.config_keys import DEPTH_KEYS, PER_LAYER, flatten, last, nest
from deadbench.suite.errors import ArchitectureError

BLOCKS = 2
_WIDTH = re.compile(
    r"(hidden|dim|size|width|embd|channels|features|rank|d_model|d_ff|d_kv|ffn|inner|intermediate|units|embed)"
)
_NO_WIDTH = re.compile(
    r"(vocab|image_size|patch|position|window|kernel|chunk|block_size|token|num_mel|bins|max_|input_|crop|stride|"
    r"head_size_?ratio|num_features|feature_size|grid|sample|context|queries|length|codebook_size|groups)"
)
_EXPERTS = re.compile(r"(num_.*experts|n_routed_experts|n_.*experts)$")
_SMALL_VOCABULARY = 200
# What a person would write, for a model whose widths depend on each other too much to be divided one after the other.
_BY_HAND = (
    (r"vocab_size", 199), (r"hidden_size|d_model|n_embd|embed_dim|hidden_dim|\w*out_hidden_size|projection_dim", 64),
    (r"(moe|shared_expert)_intermediate_size", 32), (r"\w*intermediate_size|\w*ffn_dim|d_ff|mlp_dim", 128),
    (r"n_heads?|num_heads|\w*attention_heads|num_\w*key_value_heads|(index|linear)\w*_heads", 4),
    (r"head_dim|v_head_dim|index_head_dim|linear_head_dim", 16), (r"qk_(rope|nope)_head_dim", 8),
    (r"(q|kv)_lora_rank", 16), (r"index_topk|\w*num_experts|n_routed_experts", 4), (r"num_experts_per_tok", 2),
    (r"n_group|topk_group|n_shared_experts|first_k_dense_replace", 1), (r"image_size", 32), (r"patch_size", 8),
)  # fmt: skip
_NEEDED = ("head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")  # null by default in some models
_QUICK = 5_000_000  # parameters


def small_config(model_type: str) -> dict[str, Any]:
    """A flat configuration (nested keys joined by dots) of the model type, as small as it still builds on meta.

    Raises:
        ArchitectureError: not even its defaults can be built.
    """
    from deadbench.suite.architectures.build import build_config, build_model

    defaults = flatten(transformers.CONFIG_MAPPING[model_type]().to_dict())

    def works(flat: dict[str, Any], running: bool) -> bool:
        try:
            config = build_config(nest(flat) | {"model_type": model_type})
            model = build_model(config, "meta")
            if running and sum(p.numel() for p in model.parameters()) < _QUICK:
                model = build_model(config)  # one kernel an operation: faster than meta
        except ArchitectureError:
            return False
        return all(p.numel() for p in model.parameters()) and (not running or _runs(model))

    starts = [_shallow(defaults, drop=True), _shallow(defaults, drop=False), defaults]
    best = next((start for start in starts if works(start, running=False)), None)
    running = best is not None and works(best, running=True)
    if not running:
        by_hand = next((start for start in _by_hand(starts[0]) if works(start, running=True)), None)
        if by_hand is not None:
            return by_hand
    if best is None:
        build_model(build_config({"model_type": model_type}), "meta")
        raise ArchitectureError(f"{model_type}: its defaults, written out, do not build")
    # What ran must run on; what never did may have values that are looked at, which meta tensors have not.
    for step in (_fewer_experts(best), _small_vocabulary(best)):
        best = best | step if works(best | step, running) else best
    for keys in _groups(best):
        for divisor in (16, 8, 4, 2):
            narrow = {key: _divided(best[key], divisor) for key in keys}
            if narrow and works(best | narrow, running):
                best = best | narrow
                break
    return best


def _runs(model: torch.nn.Module) -> bool:
    from deadbench.suite.tracing.minimal_inputs import running_inputs

    try:
        running_inputs(model)
    except Exception:
        return False
    return True


def _shallow(defaults: dict[str, Any], drop: bool) -> dict[str, Any]:
    kept = {key: value for key, value in defaults.items() if not (drop and last(key) in PER_LAYER)}
    return {
        key: min(value, BLOCKS) if type(value) is int and last(key) in DEPTH_KEYS else value
        for key, value in kept.items()
    }


def _by_hand(flat: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Sizes by the names of keys: with as many heads of keys as of queries, with fewer, and with rotations in parts."""
    sizes = dict(flat)
    for key, value in flat.items():
        size = next((size for name, size in _BY_HAND if re.fullmatch(name, last(key))), None)
        known = (type(value) is int and value > 0) or (value is None and last(key) in _NEEDED)
        if size is not None and known:
            sizes[key] = size
        elif last(key).endswith(("_token_id", "_token_index")) and type(value) is int and value >= 199:
            sizes[key] = 190 - len(key) % 40
    latent = {key.rpartition(".")[0] for key in flat if last(key) == "qk_rope_head_dim"}
    # There the width of a head is the sum of its parts.
    sizes = {key: value for key, value in sizes.items()
             if key.rpartition(".")[0] not in latent or last(key) not in ("head_dim", "qk_head_dim")}  # fmt: skip
    yield sizes
    yield {key: 2 if last(key) == "num_key_value_heads" else value for key, value in sizes.items()}
    parts = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    yield {key: parts if last(key) == "rope_parameters" and _of_words(key) else value for key, value in sizes.items()}


def _of_words(key: str) -> bool:
    return "." not in key or key.startswith("text_config.")


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
