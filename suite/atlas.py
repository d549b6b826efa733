"""The atlas: what behaviour once established about an architecture, kept: neither torch nor transformers is imported.

`python -m suite.survey` writes `data/atlas.json` from the installed transformers: for each model type the final norm,
which keys give its width, its depth and its eps, and which change the answer. A configuration that the atlas does not
cover, key by key, is answered by behaviour (`suite.architecture`).
"""

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from suite.resolution import FinalNorm, NormBehaviour

LAST = "{last}"  # in a path: the index of the last block
# Keys that say how a model is stored, tokenised, trained or sped up, and never where its final norm is.
HARMLESS = (
    "_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "id2label",
    "label2id", "task_specific_params", "tokenizer_class", "quantization_config", "use_cache", "_attn_implementation",
    "attn_implementation", "prefix", "rope_scaling", "rope_parameters", "layer_types", "problem_type",
    "generation_config", "finetuning_task", "output_attentions", "output_hidden_states", "return_dict",
    "gradient_checkpointing", "pruned_heads", "max_position_embeddings", "vocab_size",
)  # fmt: skip
HARMLESS_ENDINGS = ("_token_id", "_token_index", "_token", "_dropout", "_pdrop", "_init", "_initializer")


def lookup(raw_config: Mapping[str, Any]) -> FinalNorm | None:
    """The final norm of the configuration, from the atlas alone; None where the atlas cannot answer for it."""
    entry = _entries().get(str(raw_config.get("model_type")))
    if entry is None:
        return None
    given = {entry["aliases"].get(key, key): value for key, value in flatten(raw_config).items()}
    if not all(key in given for key in entry["derived"]):
        return None
    if not all(_covered(key, value, entry) for key, value in given.items()):
        return None

    def number(key: Any) -> Any:
        return given.get(key, entry["defaults"].get(key)) if isinstance(key, str) else key

    blocks, width, eps = number(entry["blocks"]), number(entry["hidden"]), number(entry["eps"])
    if not isinstance(width, int) or not isinstance(eps, int | float) or (blocks is None) != (entry["blocks"] is None):
        return None
    path = entry["path"] if blocks is None else entry["path"].replace(LAST, str(blocks - 1))
    keys = [
        f"{key} = {number(key)}" for key in (entry["hidden"], entry["blocks"], entry["eps"]) if isinstance(key, str)
    ]
    behaviour = NormBehaviour(
        entry["family"],
        entry["scale"],
        entry["scale_parameter"],
        entry["shift_parameter"],
        float(eps),
        (f"config: {', '.join(keys)}",),
    )
    evidence = (
        f"atlas of transformers {_atlas()['transformers']}: {path} ({entry['class']}) makes the last hidden state and "
        f"behaves as {entry['family']}, effective scale {entry['scale']}",
        *behaviour.evidence,
    )
    return FinalNorm(path, behaviour, entry["placement"], width, blocks, evidence=evidence)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys of nested configurations (those that name a model_type) joined by dots; other dicts stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and (key.endswith("_config") or "model_type" in value) and key not in HARMLESS:
            flat |= flatten(value, f"{prefix}{key}.")
        elif key != "model_type" or prefix:
            flat[f"{prefix}{key}"] = value
    return flat


def harmless(key: str) -> bool:
    """Whether a key never says anything of the final norm, in any architecture."""
    name = key.rpartition(".")[2]
    return name in HARMLESS or name.endswith(HARMLESS_ENDINGS)


def _covered(key: str, value: Any, entry: Mapping[str, Any]) -> bool:
    """Whether the entry's answer is known to hold with this value of this key."""
    if key in (entry["blocks"], entry["hidden"], entry["eps"]) or key in entry["indifferent"] or harmless(key):
        return True
    if key in entry["defaults"] and entry["defaults"][key] == value:
        return True
    measured = isinstance(value, int | float) and not isinstance(value, bool)
    return measured and key not in entry["decisive"]


@functools.cache
def _atlas() -> Any:
    return json.loads(resources.files("suite").joinpath("data/atlas.json").read_text())


def _entries() -> dict[str, Any]:
    return _atlas()["model_types"]  # type: ignore[no-any-return]
