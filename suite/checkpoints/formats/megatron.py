"""Megatron-LM's own checkpoints: a Namespace of the command's arguments beside the weights says what the model is."""

from collections.abc import Iterable, Mapping
from typing import Any

from deadbench.suite.checkpoints.formats.pickled_names import Record
from deadbench.suite.checkpoints.tensors import StoredNorm

_FAMILIES = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}
_FINAL = ("final_layernorm", "final_norm")
_FIRST_FORM = 2.0  # of a checkpoint in which a head's queries, keys and values lie together
_BEYOND_LLAMA = (
    "add_qkv_bias", "qk_layernorm", "rotary_interleaved", "use_rope_scaling", "multi_latent_attention",
)  # fmt: skip
_BEYOND_MIXTRAL = (
    "moe_shared_expert_intermediate_size", "moe_router_pre_softmax", "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_apply_probs_on_input",
)  # fmt: skip


def arguments(value: Any) -> dict[str, Any]:
    """The arguments of the command that saved `value`; empty where they are not there."""
    args = value.get("args") if isinstance(value, dict) else None
    return dict(args.fields) if isinstance(args, Record) and args.kind == "argparse.Namespace" else {}


def recorded_norm(value: Any, names: Iterable[str]) -> StoredNorm | None:
    """What Megatron's arguments tell of the final norm; None where the saved `value` is not Megatron's."""
    told = arguments(value)
    family = _FAMILIES.get(str(told.get("normalization", "LayerNorm")))
    if family is None or not all(type(told.get(key)) is int for key in ("num_layers", "hidden_size")):
        return None
    scales = [name.removesuffix(".weight") for name in names if name.endswith(tuple(f"{f}.weight" for f in _FINAL))]
    outside = [name for name in scales if ".layers." not in name]
    eps = told.get("norm_epsilon", told.get("layernorm_epsilon"))
    return StoredNorm(
        name=outside[0] if len(outside) == 1 else None,
        family=family,
        eps=eps if isinstance(eps, float) else None,
        hidden_size=told["hidden_size"],
        num_blocks=told["num_layers"],
        adds_one=told.get("apply_layernorm_1p") is True,
    )


def recorded_config(value: Any, norm: StoredNorm) -> tuple[dict[str, Any], str | None]:
    """The config.json of the same model, as much as the arguments say, and why no forward pass can be had of it.

    GPT-2, Llama and Mixtral are the architectures of transformers that Megatron's GPT can be.
    """
    told = arguments(value)
    least = {"model_type": "megatron", "hidden_size": norm.hidden_size, "num_hidden_layers": norm.num_blocks}
    ranks = told.get("tensor_model_parallel_size", 1), told.get("pipeline_model_parallel_size", 1)
    unfit = None
    if isinstance(version := value.get("checkpoint_version", 0), int | float) and version < _FIRST_FORM:
        unfit = f"a checkpoint of Megatron's version {version:g}; queries, keys and values lie otherwise since 2"
    elif ranks != (1, 1):
        unfit = f"one file of {ranks[0]} tensor-parallel times {ranks[1]} pipeline ranks; give the folder of all"
    found = _gpt2(told) or _llama(told)
    return (least if found is None or norm.adds_one or norm.eps is None else found), unfit


def _numbers(told: Mapping[str, Any], *names: str) -> bool:
    return all(type(told.get(name)) is int for name in names)


def _gpt2(told: Mapping[str, Any]) -> dict[str, Any] | None:
    plain = told.get("position_embedding_type") == "learned_absolute" and told.get("add_bias_linear", True) is True
    plain = plain and told.get("normalization", "LayerNorm") == "LayerNorm" and not told.get("group_query_attention")
    gated = any(told.get(name) for name in ("swiglu", "squared_relu", "num_experts", "quick_geglu", "onnx_safe"))
    if not plain or gated or not _numbers(told, "num_attention_heads", "padded_vocab_size", "max_position_embeddings"):
        return None
    act = "gelu_new" if told.get("openai_gelu") else "gelu_fast" if told.get("bias_gelu_fusion") else "gelu"
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": told["num_layers"],
        "n_head": told["num_attention_heads"],
        "n_embd": told["hidden_size"],
        "n_inner": told.get("ffn_hidden_size"),
        "n_positions": told["max_position_embeddings"],
        "vocab_size": told["padded_vocab_size"],
        "activation_function": act,
        "layer_norm_epsilon": told.get("norm_epsilon", told.get("layernorm_epsilon", 1e-5)),
        "tie_word_embeddings": not told.get("untie_embeddings_and_output_weights", False),
    }


def _llama(told: Mapping[str, Any]) -> dict[str, Any] | None:
    plain = told.get("position_embedding_type") == "rope" and told.get("normalization") == "RMSNorm"
    plain = plain and told.get("swiglu") is True and told.get("add_bias_linear") is False
    further = any(
        told.get(name)
        for name in _BEYOND_LLAMA
    )  # fmt: skip
    named = ("num_attention_heads", "ffn_hidden_size", "padded_vocab_size", "max_position_embeddings")
    if not plain or further or told.get("rotary_percent", 1.0) != 1.0 or not _numbers(told, *named):
        return None
    if told.get("rotary_seq_len_interpolation_factor") not in (None, 1):
        return None
    groups = told.get("num_query_groups") if told.get("group_query_attention") else None
    found = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": told["hidden_size"],
        "num_hidden_layers": told["num_layers"],
        "num_attention_heads": told["num_attention_heads"],
        "num_key_value_heads": groups or told["num_attention_heads"],
        "head_dim": told.get("kv_channels") or told["hidden_size"] // max(told["num_attention_heads"], 1),
        "intermediate_size": told["ffn_hidden_size"],
        "max_position_embeddings": told["max_position_embeddings"],
        "vocab_size": told["padded_vocab_size"],
        "rms_norm_eps": told.get("norm_epsilon", told.get("layernorm_epsilon")),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(told.get("rotary_base") or 10000)},
        "tie_word_embeddings": not told.get("untie_embeddings_and_output_weights", False),
    }
    return _mixtral(told, found) if told.get("num_experts") else found


def _mixtral(told: Mapping[str, Any], llama: dict[str, Any]) -> dict[str, Any] | None:
    """A Llama with experts in every block, of which a softmax over those that are taken weighs each."""
    plain = told.get("moe_layer_freq", 1) == 1 and told.get("moe_router_score_function", "softmax") == "softmax"
    if not plain or any(told.get(name) for name in _BEYOND_MIXTRAL) or not _numbers(told, "num_experts"):
        return None
    return llama | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": told.get("moe_ffn_hidden_size") or told["ffn_hidden_size"],
        "num_local_experts": told["num_experts"],
        "num_experts_per_tok": told.get("moe_router_topk", 2),
    }
