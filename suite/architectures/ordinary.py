"""Whether a configuration is of ordinary size, as far as its numbers tell: then it is built without a trial.

What the numbers of a configuration cost depends on code that only building it runs, and there are more counts than any
list of names has. So what is known to be harmless is listed, not what is harmful: widths of tensors, which cost nothing
without values, and numbers that the class has by default. All others may together make the model
a few times as large as the default one.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from deadbench.suite.architectures.no_network import nothing_fetched

_GROWTH = 12.0  # over the default model, of which a number below _FEW is as good as that
_FEW = 12.0
_WIDTH = 2**20
# A tensor's lengths, or which of its rows are meant: no loop runs over them, and minimal inputs do not grow with them.
_WIDTHS = re.compile(
    r"(moe_|encoder_|decoder_)?(hidden_sizes?|intermediate_size|ffn_dim|d_model|d_ff|d_kv|n_embd|n_inner|head_dim)"
    r"|global_head_dim|word_embed_proj_dim|sliding_window|num_labels"
    r"|vocab_size|(encoder_|decoder_)?(num_)?(attention_heads|key_value_heads|kv_heads|heads)|n_head"
    r"|(original_)?max_position_embeddings|n_positions|n_ctx|max_length|(.*_)?token_(ids?|index)"
)
_SCALES = re.compile(r"(.*_)?(theta|base|freqs?|mrope_section|eps|epsilon|range|std|seed)")  # of arithmetic
_NOT_BUILT = {"id2label", "label2id", "quantization_config", "task_specific_params", "auto_map", "generation_config"}


def excess(config: Mapping[str, Any]) -> str | None:
    """What makes a configuration extraordinary, its largest number by its key; None where it is ordinary."""
    grown: dict[str, float] = {}
    default, aliases = _default(str(config.get("model_type")))
    _grow(config, default, aliases, "", grown)
    if math.prod(grown.values()) <= _GROWTH:
        return None
    return max(grown, key=lambda key: grown[key])


def _grow(
    given: Mapping[str, Any],
    default: Mapping[str, Any],
    aliases: Mapping[str, str],
    above: str,
    grown: dict[str, float],
) -> None:
    for name, value in given.items():
        known = default.get(aliases.get(name, name))
        if name in _NOT_BUILT or (known is not None and type(known) is type(value) and known == value):
            continue
        if isinstance(value, Mapping):
            own, its_aliases = _default(str(value.get("model_type")))
            below = known if isinstance(known, Mapping) else {}  # which may differ from the defaults of its own kind
            _grow(value, {**own, **below}, its_aliases, f"{above}{name}.", grown)
            continue
        factor = _growth(name, value, known)
        if factor > 1:
            grown[f"{above}{name}"] = factor


def _growth(name: str, value: Any, known: Any) -> float:
    """How many times as large a value may make the model."""
    total, usual = _total(value), max(_FEW, _total(known))
    if not math.isfinite(total):
        return 1.0  # which no count can be
    if _WIDTHS.fullmatch(name):
        lists = len(value) / max(1, len(known) if isinstance(known, list) else 1) if isinstance(value, list) else 1.0
        return lists if total <= max(_WIDTH, usual) else total
    if _SCALES.fullmatch(name) or (isinstance(value, float) and total <= max(usual, 1000.0)):
        return 1.0
    return total / usual


def _total(value: Any) -> float:
    """The sum of all numbers in a value, each of a list's elements as one at least."""
    if isinstance(value, list | tuple):
        return sum(max(1.0, _total(each)) for each in value)
    if isinstance(value, Mapping):
        return sum(max(1.0, _total(each)) for each in value.values())
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(float(value)) if abs(value) < 1e300 else 1e300
    return 0.0


@functools.lru_cache(64)
def _default(model_type: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """The default configuration of a model type, and its keys' other names; nothing for an unknown one."""
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        return {}, {}
    of = transformers.CONFIG_MAPPING[model_type]
    try:
        with nothing_fetched():  # some name a backbone by default
            return of().to_dict(), dict(of.attribute_map)
    except Exception:  # some want arguments
        return {}, {}
