"""The metadata of a GGUF as the config.json that they are, and what they tell of the norms."""

from collections.abc import Mapping, Sequence
from typing import Any

from deadbench.suite.checkpoints.tensors import StoredNorm, TensorEntry

# transformers' model types under other names, and the keys of a configuration that are not the usual ones.
_MODEL_TYPES = {
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text", "phi2": "phi", "gptneox": "gpt_neox",
    "command-r": "cohere", "gpt-oss": "gpt_oss",
}  # fmt: skip
_LAYERS = {"gpt2": "n_layer", "bloom": "n_layer", "gptj": "n_layer", "t5": "num_decoder_layers"}
_WIDTHS = {"gpt2": "n_embd", "gptj": "n_embd", "t5": "d_model"}
_HEADS = {"gpt2": "n_head", "gptj": "n_head", "bloom": "n_head"}
_EPSILONS = {
    "gpt2": "layer_norm_epsilon", "gptj": "layer_norm_epsilon", "bloom": "layer_norm_epsilon",
    "falcon": "layer_norm_epsilon", "starcoder2": "norm_epsilon", "mamba": "layer_norm_epsilon",
    "nemotron": "norm_eps", "t5": "layer_norm_epsilon",
}  # fmt: skip
_ADD_ONE = ("gemma", "gemma2", "gemma3_text", "nemotron")  # their scales are 1 + weight, and stored as that sum
_BY_EPSILON = {"attention.layer_norm_rms_epsilon": "rmsnorm", "attention.layer_norm_epsilon": "layernorm"}
# Of those of which a forward pass is had: the published class.
_CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM", "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
}  # fmt: skip
_ABSOLUTE = ("gpt2",)  # positions are counted, not turned


def adds_one(config: Mapping[str, Any] | None) -> bool:
    """Whether the architecture adds one to its scales, which are stored as that sum."""
    return bool(config) and (config or {}).get("model_type") in _ADD_ONE


def config_of(facts: Mapping[str, Any], entries: Sequence[TensorEntry]) -> dict[str, Any] | None:
    """The config.json of the same model, as far as the metadata go."""
    known = _architecture(facts)
    if known is None:
        return None
    told, model_type = known
    keys = {
        "embedding_length": _WIDTHS.get(model_type, "hidden_size"),
        "block_count": _LAYERS.get(model_type, "num_hidden_layers"),
        "attention.head_count": _HEADS.get(model_type, "num_attention_heads"),
        "attention.head_count_kv": "num_key_value_heads",
        "feed_forward_length": "intermediate_size",
        "attention.layer_norm_rms_epsilon": _EPSILONS.get(model_type, "rms_norm_eps"),
        "attention.layer_norm_epsilon": _EPSILONS.get(model_type, "layer_norm_eps"),
    }
    if model_type in _HEADS:
        del keys["attention.head_count_kv"], keys["feed_forward_length"]
    found = {ours: facts.get(f"{told}.{theirs}") for theirs, ours in keys.items()}
    vocabulary = next((entry.shape[0] for entry in entries if entry.name == "token_embd.weight"), None)
    numbers = {k: v for k, v in (found | {"vocab_size": vocabulary}).items() if type(v) in (int, float)}
    return {"model_type": model_type} | numbers | _of_forward_pass(facts, told, model_type, entries)


def _of_forward_pass(
    facts: Mapping[str, Any], told: str, model_type: str, entries: Sequence[TensorEntry]
) -> dict[str, Any]:
    """What the final norm does not depend on, and a forward pass does."""
    if model_type not in _CLASSES:
        return {}
    number = {key: value for key, value in facts.items() if type(value) in (int, float, bool)}
    found: dict[str, Any] = {"architectures": [_CLASSES[model_type]]}
    if f"{told}.context_length" in number:
        found["n_positions" if model_type in _ABSOLUTE else "max_position_embeddings"] = number[
            f"{told}.context_length"
        ]
    head_size = number.get(f"{told}.attention.key_length")
    if head_size is not None and model_type not in (*_HEADS, "gpt_neox"):
        found["head_dim"] = head_size
    if model_type not in _ABSOLUTE:
        found["rope_parameters"] = {"rope_type": "default"} | _angles(number, told, model_type)
        found["tie_word_embeddings"] = not any(entry.name == "output.weight" for entry in entries)
    if f"{told}.use_parallel_residual" in number:
        found["use_parallel_residual"] = bool(number[f"{told}.use_parallel_residual"])
    return found


def _angles(number: Mapping[str, Any], told: str, model_type: str) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_theta": float(number.get(f"{told}.rope.freq_base", 10000))}
    turned, width = number.get(f"{told}.rope.dimension_count"), number.get(f"{told}.embedding_length")
    heads = number.get(f"{told}.attention.head_count")
    if model_type == "gpt_neox" and turned and width and heads:
        found["partial_rotary_factor"] = turned * heads / width
    return found


def unfit(facts: Mapping[str, Any]) -> str | None:
    """Why no forward pass is had of it: what the configuration above does not say; None where nothing is left out."""
    known = _architecture(facts)
    scaled = facts.get(f"{known[0]}.rope.scaling.type") if known else None
    return None if scaled in (None, "none") else f"its angles are scaled ({scaled}); give the original checkpoint"


def norm_of(facts: Mapping[str, Any], names: set[str]) -> StoredNorm | None:
    """What is told of the norms, and what the final one is called."""
    known = _architecture(facts)
    told = known[0] if known else ""
    blocks = facts.get(f"{told}.block_count")
    candidates = (
        "output_norm",
        "dec.output_norm",
        f"blk.{blocks - 1}.layer_output_norm" if type(blocks) is int else "",
    )
    name = next((each for each in candidates if f"{each}.weight" in names), None)
    keys = [(family, facts[f"{told}.{key}"]) for key, family in _BY_EPSILON.items() if f"{told}.{key}" in facts]
    width = facts.get(f"{told}.embedding_length")
    family, eps = keys[0] if keys else (None, None)
    return StoredNorm(
        name=name,
        family=family,
        eps=eps if type(eps) is float else None,
        hidden_size=width if type(width) is int else None,
        num_blocks=blocks if type(blocks) is int else None,
    )


def _architecture(facts: Mapping[str, Any]) -> tuple[str, str] | None:
    told = facts.get("general.architecture")
    return (told, _MODEL_TYPES.get(told, told.replace("-", "_"))) if isinstance(told, str) else None
