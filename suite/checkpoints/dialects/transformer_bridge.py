"""TransformerLens since version 4: one set of names for all architectures, over transformers' own forms but for heads.

Names and forms: github.com/TransformerLensOrg/TransformerLens, `transformer_lens/model_bridge`; queries, keys and
values are three maps, outputs first.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from deadbench.suite.checkpoints.dialects.tensors import Tensors, Values, heads_of, need

_BOTH = ("weight", "bias")
# Of each architecture what it calls the parts of a block, and what lies outside.
_PARTS = {
    "transformer.h.{}": {"ln1": "ln_1", "ln2": "ln_2", "attn.o": "attn.c_proj", "mlp.in": "mlp.c_fc",
                         "mlp.out": "mlp.c_proj"},
    "gpt_neox.layers.{}": {"ln1": "input_layernorm", "ln2": "post_attention_layernorm", "attn.o": "attention.dense",
                           "mlp.in": "mlp.dense_h_to_4h", "mlp.out": "mlp.dense_4h_to_h"},
    "model.layers.{}": {"ln1": "input_layernorm", "ln2": "post_attention_layernorm", "attn.q": "self_attn.q_proj",
                        "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj",
                        "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
                        "mlp.gate": "mlp.gate_proj", "mlp.in": "mlp.up_proj", "mlp.out": "mlp.down_proj"},
}  # fmt: skip


def is_transformer_bridge(tensors: Tensors) -> bool:
    """Whether embedding and first block are called as a TransformerBridge calls them."""
    return "embed.weight" in tensors and "blocks.0.attn.q.weight" in tensors


def as_gpt2(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' GPT-2 has them, with one map to queries, keys and values, inputs first."""
    outside = {"embed": "transformer.wte", "pos_embed": "transformer.wpe", "ln_final": "transformer.ln_f"}
    _rename(tensors, outside | {"unembed": "lm_head"}, "transformer.h.{}")
    for block in tensors.blocks("blocks."):
        for which in _BOTH:
            three = tuple(f"blocks.{block}.attn.{kind}.{which}" for kind in "qkv")
            if all(each in tensors for each in three):
                behind = tensors[three[0]].shape[1:]
                shape = (*behind, sum(tensors[each].shape[0] for each in three))
                tensors.make(f"transformer.h.{block}.attn.c_attn.{which}", three, shape, _side_by_side)


def as_neox(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' GPT-NeoX has them, where a head's queries, keys and values lie together."""
    outside = {"embed": "gpt_neox.embed_in", "ln_final": "gpt_neox.final_layer_norm", "unembed": "embed_out"}
    _rename(tensors, outside, "gpt_neox.layers.{}")
    heads, _, size = heads_of(config)
    for block in tensors.blocks("blocks."):
        for which in _BOTH:
            three = tuple(f"blocks.{block}.attn.{kind}.{which}" for kind in "qkv")
            if all(each in tensors for each in three):
                behind = tensors[three[0]].shape[1:]
                for each in three:
                    need(tensors[each], (heads * size, *behind))

                def woven(*maps: Values, behind: tuple[int, ...] = behind) -> Values:
                    return np.stack([each.reshape(heads, size, *behind) for each in maps], 1).reshape(-1, *behind)

                name = f"gpt_neox.layers.{block}.attention.query_key_value.{which}"
                tensors.make(name, three, (3 * heads * size, *behind), woven)


def as_llama(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' Llama, Mistral, Qwen2 and Qwen3 have them."""
    outside = {"embed": "model.embed_tokens", "ln_final": "model.norm", "unembed": "lm_head"}
    _rename(tensors, outside, "model.layers.{}")


def _rename(tensors: Tensors, outside: Mapping[str, str], layers: str) -> None:
    """Give transformers' names to what is the same there."""
    names = {f"{stored}.{which}": f"{name}.{which}" for stored, name in outside.items() for which in _BOTH}
    if layers == "model.layers.{}":  # an RMSNorm has no shift that would become one of logits
        del names["unembed.bias"]
        tensors.leave_out_zeros(["unembed.bias"])
    tensors.rename(names)
    parts = {
        f"blocks.{{}}.{stored}.{which}": f"{layers}.{name}.{which}"
        for stored, name in _PARTS[layers].items()
        for which in _BOTH
    }
    for block in tensors.blocks("blocks."):
        tensors.rename(parts, block)


def _side_by_side(*maps: Values) -> Values:
    return np.concatenate(maps).T
