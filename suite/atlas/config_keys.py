"""Keys of a configuration, flat and by what they decide."""

from collections.abc import Mapping
from typing import Any

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "depth",
              "num_decoder_layers", "num_encoder_layers", "num_blocks", "layers")  # fmt: skip
# Lists as long as the model is deep: derived anew where left out.
PER_LAYER = ("layer_types", "layers_block_type", "stage_names", "out_features", "out_indices", "mlp_layer_types",
             "no_rope_layers", "attention_types", "hybrid_layer_ids", "full_attn_idxs", "indexer_types")  # fmt: skip


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Keys joined by dots, nested again; the inverse of `suite/atlas/lookup.py:flatten`."""
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


# Keys that say how a model is stored, tokenised, trained or sped up, or of which kind each block is: never where its
# final norm is.
HARMLESS = (
    "_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "id2label",
    "label2id", "task_specific_params", "tokenizer_class", "quantization_config", "use_cache", "_attn_implementation",
    "attn_implementation", "prefix", "rope_scaling", "rope_parameters", "layer_types", "problem_type",
    "generation_config", "finetuning_task", "output_attentions", "output_hidden_states", "return_dict",
    "gradient_checkpointing", "pruned_heads", "max_position_embeddings", "vocab_size", "no_rope_layers",
    "layers_block_type", "mlp_layer_types", "suppress_tokens", "begin_suppress_tokens", "rope_theta",
    "position_embedding_type", "indexer_types",
    "out_features", "out_indices", "stage_names",  # of a backbone, which AutoModel is not
)  # fmt: skip
HARMLESS_ENDINGS = ("_token_id", "_token_index", "_token", "_dropout", "_pdrop", "_init", "_initializer")


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
