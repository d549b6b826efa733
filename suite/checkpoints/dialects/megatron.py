"""Megatron-LM's GPT as transformers' GPT-2, Llama or Mixtral, by the names of its core and by those from before.

Forms: github.com/NVIDIA/Megatron-LM; a head's, or a group's, queries, keys and values lie together since its version 2.
"""

from collections.abc import Mapping
from typing import Any

from deadbench.suite.checkpoints.dialects.tensors import Tensors, Values, heads_of, need, of_groups, rows

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_OLD = "language_model."
_BLOCKS = ("decoder.layers.", f"{_OLD}encoder.layers.", f"{_OLD}transformer.layers.")
# In a block: what each part is called here, in the core (alone or fused with the map after it), and before.
_NORMS = {
    "first": ("input_layernorm.{}", "self_attention.linear_qkv.layer_norm_{}", "input_norm.{}"),
    "second": (
        "pre_mlp_layernorm.{}", "mlp.linear_fc1.layer_norm_{}", "post_attention_layernorm.{}", "post_attention_norm.{}",
    ),
}  # fmt: skip
_MAPS = {
    "qkv": ("self_attention.linear_qkv.{}", "self_attention.query_key_value.{}", "attention.query_key_value.{}"),
    "out": ("self_attention.linear_proj.{}", "self_attention.dense.{}", "attention.dense.{}"),
    "up": ("mlp.linear_fc1.{}", "mlp.dense_h_to_4h.{}"),
    "down": ("mlp.linear_fc2.{}", "mlp.dense_4h_to_h.{}"),
}
_GPT2 = {"first": "ln_1", "second": "ln_2", "qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc",
         "down": "mlp.c_proj"}  # fmt: skip
_LLAMA = {"first": "input_layernorm", "second": "post_attention_layernorm", "out": "self_attn.o_proj",
          "down": "mlp.down_proj"}  # fmt: skip


def is_megatron(tensors: Tensors) -> bool:
    """Whether the first block has Megatron's parts."""
    parts = (
        "self_attention.linear_qkv", "self_attention.query_key_value", "attention.query_key_value",
        "self_attention.linear_kv_down_proj",
    )  # fmt: skip
    return any(f"{begin}0.{part}.weight" in tensors for begin in _BLOCKS for part in parts)


def as_gpt2(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' GPT-2 has them."""
    heads, _, size = heads_of(config, "n_head", "n_embd")
    _outside(tensors, "transformer.wte.weight", "transformer.ln_f")
    for begin in ("", _OLD):
        tensors.rename({f"{begin}embedding.position_embeddings.weight": "transformer.wpe.weight"})
    for begin, block in _blocks(tensors):
        for part, which, stored in _parts(tensors, begin):
            name = f"transformer.h.{block}.{_GPT2[part]}.{which}"
            if part == "qkv":
                behind = tensors[stored].shape[1:]
                need(tensors[stored], (3 * heads * size, *behind))

                def apart(values: Values) -> Values:
                    one_after_another = values.reshape(heads, 3, size, *values.shape[1:]).swapaxes(0, 1)
                    return one_after_another.reshape(-1, *values.shape[1:]).T

                tensors.make(name, (stored,), tensors[stored].shape[::-1], apart)
            elif part in ("out", "up", "down") and which == "weight":
                tensors.turn({stored: name})
            else:
                tensors.rename({stored: name})


def as_llama(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' Llama has them."""
    heads, groups, size = heads_of(config)
    counts = (heads * size, groups * size, groups * size)
    _outside(tensors, "model.embed_tokens.weight", "model.norm")
    for begin, block in _blocks(tensors):
        for part, which, stored in _parts(tensors, begin):
            entry, name = tensors[stored], f"model.layers.{block}."
            if part == "qkv":
                need(entry, (sum(counts), *entry.shape[1:]))
                for number, kind in enumerate("qkv"):
                    target, shape = f"{name}self_attn.{kind}_proj.{which}", (counts[number], *entry.shape[1:])
                    tensors.make(target, (stored,), shape, of_groups(number, heads, groups, size))
            elif part == "up":
                half = int(config.get("intermediate_size") or 0)
                need(entry, (2 * half, *entry.shape[1:]))
                for number, kind in enumerate(("gate", "up")):
                    take = rows(number * half, (number + 1) * half)
                    tensors.make(f"{name}mlp.{kind}_proj.{which}", (stored,), (half, *entry.shape[1:]), take)
            else:
                tensors.rename({stored: f"{name}{_LLAMA[part]}.{which}"})


def as_mixtral(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' Mixtral has them: of a block, all experts' maps are one tensor in both."""
    names = {
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.experts.experts.linear_fc1.weight": "mlp.experts.gate_up_proj",
        "mlp.experts.experts.linear_fc2.weight": "mlp.experts.down_proj",
    }
    count, half, width = (config.get(key) for key in ("num_local_experts", "intermediate_size", "hidden_size"))
    for begin, block in _blocks(tensors):
        own = {begin + stored: f"model.layers.{block}.{name}" for stored, name in names.items()}
        if (maps := f"{begin}mlp.experts.experts.linear_fc1.weight") in tensors:
            need(tensors[maps], (int(count or 0), 2 * int(half or 0), int(width or 0)))
        tensors.rename(own)
    as_llama(tensors, config)


def _outside(tensors: Tensors, embedding: str, norm: str) -> None:
    """What no block has."""
    tensors.leave_out(r"_extra_state|rotary_pos_emb|inv_freq$")
    for begin in ("", _OLD):
        tensors.rename({f"{begin}{_EMBEDDING}": embedding, f"{begin}{_HEAD}": "lm_head.weight"})
    for begin in ("decoder.", f"{_OLD}encoder.", f"{_OLD}transformer."):
        for called in ("final_layernorm", "final_norm"):
            tensors.rename({f"{begin}{called}.{which}": f"{norm}.{which}" for which in ("weight", "bias")})


def _blocks(tensors: Tensors) -> list[tuple[str, int]]:
    return [(f"{begin}{block}.", block) for begin in _BLOCKS for block in tensors.blocks(begin)]


def _parts(tensors: Tensors, begin: str) -> list[tuple[str, str, str]]:
    """(part, weight or bias, stored name) of what is there of a block."""
    return [
        (part, which, stored)
        for part, forms in (_NORMS | _MAPS).items()
        for which in ("weight", "bias")
        for form in forms
        if (stored := begin + form.format(which)) in tensors
    ]
