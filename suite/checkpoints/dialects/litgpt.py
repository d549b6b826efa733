"""litGPT: one set of names for all architectures, queries, keys and values in one map, and a `model_config.yaml`.

Names and forms: github.com/Lightning-AI/litgpt, `litgpt/scripts/convert_hf_checkpoint.py`.
"""

from collections.abc import Mapping
from typing import Any

from deadbench.suite.checkpoints.dialects.tensors import Tensors, Values, heads_of, need, of_groups, rows

CONFIG_FILE = "model_config.yaml"
_OUTSIDE = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "transformer.ln_f.bias": "model.norm.bias",
    "lm_head.weight": "lm_head.weight",
}
_LLAMA = {
    "transformer.h.{}.norm_1.weight": "model.layers.{}.input_layernorm.weight",
    "transformer.h.{}.norm_2.weight": "model.layers.{}.post_attention_layernorm.weight",
    "transformer.h.{}.attn.proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "transformer.h.{}.attn.proj.bias": "model.layers.{}.self_attn.o_proj.bias",
    "transformer.h.{}.attn.norm_q.weight": "model.layers.{}.self_attn.q_norm.weight",
    "transformer.h.{}.attn.norm_k.weight": "model.layers.{}.self_attn.k_norm.weight",
    "transformer.h.{}.mlp.fc_1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "transformer.h.{}.mlp.fc_2.weight": "model.layers.{}.mlp.up_proj.weight",
    "transformer.h.{}.mlp.proj.weight": "model.layers.{}.mlp.down_proj.weight",
}
_PHI_OUTSIDE = _OUTSIDE | {
    "transformer.ln_f.weight": "model.final_layernorm.weight",
    "transformer.ln_f.bias": "model.final_layernorm.bias",
    "lm_head.bias": "lm_head.bias",
}
_PHI = {
    f"transformer.h.{{}}.{stored}.{which}": f"model.layers.{{}}.{name}.{which}"
    for stored, name in {
        "norm_1": "input_layernorm", "attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2",
    }.items()
    for which in ("weight", "bias")
}  # fmt: skip
_NEOX_OUTSIDE = {
    "transformer.wte.weight": "gpt_neox.embed_in.weight",
    "transformer.ln_f.weight": "gpt_neox.final_layer_norm.weight",
    "transformer.ln_f.bias": "gpt_neox.final_layer_norm.bias",
    "lm_head.weight": "embed_out.weight",
}
_NEOX = {
    f"transformer.h.{{}}.{stored}.{which}": f"gpt_neox.layers.{{}}.{name}.{which}"
    for stored, name in {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "attention.dense",
        "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h",
    }.items()
    for which in ("weight", "bias")
}  # fmt: skip

_NUMBERS = (
    "n_layer", "n_embd", "n_head", "head_size", "n_query_groups", "intermediate_size", "padded_vocab_size",
    "vocab_size", "block_size", "rope_base", "rotary_percentage", "norm_eps",
)  # fmt: skip


def is_litgpt(tensors: Tensors) -> bool:
    """Whether the first block has litGPT's parts."""
    return any(f"transformer.h.0.{part}.weight" in tensors for part in ("norm_1", "attn.qkv", "attn.attn"))


def as_llama(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' Llama, Mistral, Qwen and Gemma have them."""
    tensors.rename(_OUTSIDE)
    for block in tensors.blocks("transformer.h."):
        tensors.rename(_LLAMA, block)
        _split(tensors, config, block)


def as_phi(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' Phi has them."""
    tensors.rename(_PHI_OUTSIDE)
    for block in tensors.blocks("transformer.h."):
        tensors.rename(_PHI, block)
        _split(tensors, config, block)


def as_neox(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' GPT-NeoX has them, where a head's queries, keys and values lie together."""
    tensors.rename(_NEOX_OUTSIDE)
    heads, _, size = heads_of(config)
    for block in tensors.blocks("transformer.h."):
        tensors.rename(_NEOX, block)
        for which in ("weight", "bias"):
            name = f"gpt_neox.layers.{block}.attention.query_key_value.{which}"
            tensors.make(name, (f"transformer.h.{block}.attn.attn.{which}",))
            stored = f"transformer.h.{block}.attn.qkv.{which}"
            if stored in tensors:
                behind = tensors[stored].shape[1:]
                need(tensors[stored], (3 * heads * size, *behind))

                def woven(values: Values, behind: tuple[int, ...] = behind) -> Values:
                    return values.reshape(3, heads, size, *behind).swapaxes(0, 1).reshape(-1, *behind)

                tensors.make(name, (stored,), None, woven)


def _split(tensors: Tensors, config: Mapping[str, Any], block: int) -> None:
    """The map to queries, keys and values as three."""
    heads, groups, size = heads_of(config)
    counts = (heads * size, groups * size, groups * size)
    for which in ("weight", "bias"):
        for form in ("qkv", "attn"):  # the latter before 2025: by groups of queries with their key and value
            stored = f"transformer.h.{block}.attn.{form}.{which}"
            if stored not in tensors:
                continue
            behind = tensors[stored].shape[1:]
            need(tensors[stored], (sum(counts), *behind))
            start = 0
            for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
                take = rows(start, start + counts[number]) if form == "qkv" else of_groups(number, heads, groups, size)
                target = f"model.layers.{block}.self_attn.{name}.{which}"
                tensors.make(target, (stored,), (counts[number], *behind), take)
                start += counts[number]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**48


def config_of(told: Any) -> dict[str, Any] | None:
    """The config.json of the model that a model_config.yaml is of; None where it is of none that transformers has."""
    told = {key: value for key, value in told.items() if value is not None} if isinstance(told, dict) else {}
    if not all(type(told.get(key)) is int for key in ("n_layer", "n_embd", "n_head")):
        return None
    if not all(_is_number(told[key]) for key in _NUMBERS if key in told):
        return None
    norm, mlp = told.get("norm_class_name", "LayerNorm"), told.get("mlp_class_name", "GptNeoxMLP")
    size = told.get("head_size") or told["n_embd"] // max(told["n_head"], 1)
    config = {
        "hidden_size": told["n_embd"],
        "num_hidden_layers": told["n_layer"],
        "num_attention_heads": told["n_head"],
        "intermediate_size": told.get("intermediate_size") or 4 * told["n_embd"],
        "vocab_size": told.get("padded_vocab_size") or told.get("vocab_size"),
        "max_position_embeddings": told.get("block_size", 4096),
        "tie_word_embeddings": False,
    }
    rotary = {"rope_theta": float(told.get("rope_base", 10000)), "rope_type": "default"}
    share, eps = told.get("rotary_percentage", 0.25), told.get("norm_eps", 1e-5)
    if (told.get("rope_adjustments"), told.get("rope_condense_ratio", 1)) != (None, 1):
        return None  # angles that no key here says in full
    if (norm, mlp) == ("LayerNorm", "GptNeoxMLP"):
        act = "gelu" if told.get("gelu_approximate", "none") == "none" else "gelu_pytorch_tanh"
        rotary["partial_rotary_factor"] = share
        config |= {"layer_norm_eps": eps, "rope_parameters": rotary}
        if told.get("shared_attention_norm") and told.get("lm_head_bias"):
            act = "gelu_new" if act != "gelu" else act
            return config | {"model_type": "phi", "architectures": ["PhiForCausalLM"], "hidden_act": act,
                             "num_key_value_heads": told.get("n_query_groups") or told["n_head"]}  # fmt: skip
        if told.get("shared_attention_norm") or told.get("n_query_groups") not in (None, told["n_head"]):
            return None
        return config | {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": act,
                         "use_parallel_residual": told.get("parallel_residual", True),
                         "attention_bias": told.get("bias", True)}  # fmt: skip
    kind = _gated_kind(told, mlp, share)
    if norm != "RMSNorm" or kind is None:
        return None
    model_type, architecture, further = kind
    config |= {
        "model_type": model_type, "architectures": [architecture], "rms_norm_eps": eps, "head_dim": size,
        "num_key_value_heads": told.get("n_query_groups") or told["n_head"], "rope_parameters": rotary,
    }  # fmt: skip
    return config | further


def _gated_kind(told: Mapping[str, Any], mlp: str, share: Any) -> tuple[str, str, dict[str, Any]] | None:
    """Of the architectures with RMSNorm and gated maps the one that the fields are of: type, class, further keys."""
    plain = not any(told.get(key) for key in ("post_attention_norm", "post_mlp_norm", "shared_attention_norm", "bias"))
    plain = plain and told.get("parallel_residual") is False and told.get("sliding_window_size") is None
    if not plain or share != 1.0:
        return None
    if mlp == "GemmaMLP" and told.get("scale_embeddings"):
        act = "gelu" if told.get("gelu_approximate", "none") == "none" else "gelu_pytorch_tanh"
        return "gemma", "GemmaForCausalLM", {"tie_word_embeddings": True, "hidden_act": act}
    if mlp != "LLaMAMLP" or told.get("scale_embeddings"):
        return None
    if told.get("norm_qk"):
        if told.get("norm_qk_type", "default") != "default" or told.get("attn_bias"):
            return None
        return "qwen3", "Qwen3ForCausalLM", {}
    return ("qwen2", "Qwen2ForCausalLM", {}) if told.get("attn_bias") else ("llama", "LlamaForCausalLM", {})
