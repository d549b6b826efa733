"""TransformerLens: maps by head, inputs first; norms that may be folded into the maps after them.

Names and forms: github.com/TransformerLensOrg/TransformerLens, `transformer_lens/pretrained/weight_conversions`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deadbench.suite.checkpoints.dialects.tensors import Tensors, Values

TRANSFORMER_LENS = "TransformerLens"  # the dialect
_BUFFERS = r"\.attn\.(mask|IGNORE|rotary_sin|rotary_cos)$"
_GPT2 = {
    "blocks.{}.mlp.W_in": "transformer.h.{}.mlp.c_fc.weight",
    "blocks.{}.mlp.b_in": "transformer.h.{}.mlp.c_fc.bias",
    "blocks.{}.mlp.W_out": "transformer.h.{}.mlp.c_proj.weight",
    "blocks.{}.mlp.b_out": "transformer.h.{}.mlp.c_proj.bias",
    "blocks.{}.attn.b_O": "transformer.h.{}.attn.c_proj.bias",
}
_NEOX = {
    "blocks.{}.mlp.b_in": "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias",
    "blocks.{}.mlp.b_out": "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias",
    "blocks.{}.attn.b_O": "gpt_neox.layers.{}.attention.dense.bias",
}
_NEOX_TURNED = {
    "blocks.{}.mlp.W_in": "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
    "blocks.{}.mlp.W_out": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
}
_LLAMA_TURNED = {
    "blocks.{}.mlp.W_gate": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.mlp.W_in": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.mlp.W_out": "model.layers.{}.mlp.down_proj.weight",
}
# Of each architecture what its two norms of a block and its last are called.
_NORMS_OF = {
    "gpt2": ("transformer.h.{}.ln_1", "transformer.h.{}.ln_2", "transformer.ln_f"),
    "gpt_neox": (
        "gpt_neox.layers.{}.input_layernorm", "gpt_neox.layers.{}.post_attention_layernorm",
        "gpt_neox.final_layer_norm",
    ),
    "llama": ("model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm", "model.norm"),
}  # fmt: skip


def is_transformer_lens(tensors: Tensors) -> bool:
    """Whether the maps are called as TransformerLens calls them."""
    return any(name in tensors for name in ("embed.W_E", "unembed.W_U", "blocks.0.attn.W_Q", "ln_final.w"))


def is_folded(tensors: Tensors) -> bool:
    """Whether no norm has a scale: folded into what comes after it (`LayerNormPre`, `RMSNormPre`)."""
    maps = any(name.endswith(".attn.W_Q") for name in tensors)
    return maps and not any(name.endswith((".w", "ln_final.w")) for name in tensors)


def as_gpt2(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' GPT-2 has them."""
    tensors.rename({"embed.W_E": "transformer.wte.weight", "pos_embed.W_pos": "transformer.wpe.weight"})
    tensors.turn({"unembed.W_U": "lm_head.weight"})
    _norms(tensors, "gpt2")
    for block in tensors.blocks("blocks."):
        tensors.rename(_GPT2, block)
        maps, heads, width, size = _attention(tensors, block)
        name = f"transformer.h.{block}.attn"
        if maps:
            shape = (width, 3 * heads * size)
            tensors.make(f"{name}.c_attn.weight", maps, shape, _side_by_side)
            tensors.make(f"{name}.c_proj.weight", (f"blocks.{block}.attn.W_O",), (heads * size, width), _flat(2))
            tensors.make(f"{name}.c_attn.bias", _shifts(block), (3 * heads * size,), _behind)


def as_neox(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' GPT-NeoX has them, where a head's queries, keys and values lie together."""
    tensors.rename({"embed.W_E": "gpt_neox.embed_in.weight"})
    tensors.turn({"unembed.W_U": "embed_out.weight"})
    _norms(tensors, "gpt_neox")
    for block in tensors.blocks("blocks."):
        tensors.rename(_NEOX, block)
        tensors.turn(_NEOX_TURNED, block)
        maps, heads, width, size = _attention(tensors, block)
        name = f"gpt_neox.layers.{block}.attention"
        if maps:
            shape = (3 * heads * size, width)
            tensors.make(f"{name}.query_key_value.weight", maps, shape, _woven)
            tensors.make(f"{name}.dense.weight", (f"blocks.{block}.attn.W_O",), (width, heads * size), _outputs)
            tensors.make(f"{name}.query_key_value.bias", _shifts(block), (3 * heads * size,), _woven_shifts)


def as_llama(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' Llama, Mistral and Qwen2 have them."""
    tensors.rename({"embed.W_E": "model.embed_tokens.weight"})
    tensors.turn({"unembed.W_U": "lm_head.weight"})
    _norms(tensors, "llama")
    shifted = bool(config.get("attention_bias")) or config.get("model_type") == "qwen2"
    for block in tensors.blocks("blocks."):
        tensors.turn(_LLAMA_TURNED, block)
        for which, grouped in (("Q", ""), ("K", "_"), ("V", "_")):
            for mark in dict.fromkeys((grouped, "")):  # keys and values that heads share are kept once
                stored = f"blocks.{block}.attn.{mark}W_{which}"
                if stored in tensors and len(tensors[stored].shape) == 3:
                    heads, width, size = tensors[stored].shape
                    name = f"model.layers.{block}.self_attn.{which.lower()}_proj"
                    tensors.make(f"{name}.weight", (stored,), (heads * size, width), _inputs)
                    if shifted:
                        shift = f"blocks.{block}.attn.{mark}b_{which}"
                        tensors.make(f"{name}.bias", (shift,), (heads * size,), _flat(1))
                    break
        stored = f"blocks.{block}.attn.W_O"
        if stored in tensors and len(tensors[stored].shape) == 3:
            heads, size, width = tensors[stored].shape
            tensors.make(f"model.layers.{block}.self_attn.o_proj.weight", (stored,), (width, heads * size), _outputs)
        kinds = ("b_O",) if shifted else ("b_Q", "b_K", "b_V", "_b_K", "_b_V", "b_O")
        tensors.leave_out_zeros(
            [*(f"blocks.{block}.attn.{kind}" for kind in kinds), *(f"blocks.{block}.mlp.b_{k}" for k in ("in", "out"))]
        )


def _norms(tensors: Tensors, of: str) -> None:
    """The norms; where they are folded, scales of one and shifts of zero."""
    tensors.leave_out(_BUFFERS)
    first, second, last = _NORMS_OF[of]
    folded = is_folded(tensors)
    if folded and of != "llama":
        # The shift of the last norm became one of logits, for which the published class has no place.
        tensors.rename({"unembed.b_U": "embed_out.bias" if of == "gpt_neox" else "lm_head.bias"})
    tensors.leave_out_zeros(["unembed.b_U"])
    places: list[tuple[str, str, int | None]] = [("ln_final", last, None)]
    for block in tensors.blocks("blocks."):
        places += [("blocks.{}.ln1", first, block), ("blocks.{}.ln2", second, block)]
    like = next((name for name in ("embed.W_E", "blocks.0.attn.W_Q") if name in tensors), None)
    for stored, name, number in places:
        tensors.rename({f"{stored}.w": f"{name}.weight", f"{stored}.b": f"{name}.bias"}, number)
        if folded and like and len(tensors[like].shape) > 1:
            called, width = name.replace("{}", str(number)), tensors[like].shape[1]
            tensors.fill(f"{called}.weight", like, width, 1.0)
            if of != "llama":
                tensors.fill(f"{called}.bias", like, width, 0.0)


def _attention(tensors: Tensors, block: int) -> tuple[tuple[str, ...], int, int, int]:
    """The maps to queries, keys and values, heads, width and the width of a head; no maps where they are not there."""
    names = tuple(f"blocks.{block}.attn.W_{which}" for which in "QKV")
    shape = tensors[names[0]].shape if names[0] in tensors else ()
    if len(shape) != 3 or any(name not in tensors or tensors[name].shape != shape for name in names):
        return (), 0, 0, 0
    return names, shape[0], shape[1], shape[2]


def _shifts(block: int) -> tuple[str, ...]:
    return tuple(f"blocks.{block}.attn.b_{which}" for which in "QKV")


def _inputs(values: Values) -> Values:
    """(heads, width, size) as (heads size, width)."""
    return values.swapaxes(1, 2).reshape(-1, values.shape[1])


def _outputs(values: Values) -> Values:
    """(heads, size, width) as (width, heads size)."""
    return values.reshape(-1, values.shape[2]).T


def _flat(axes: int) -> Callable[[Values], Values]:
    """The first two axes as one."""
    return lambda values: values.reshape(-1, *values.shape[2:][: axes - 1])


def _side_by_side(*maps: Values) -> Values:
    """Three of (heads, width, size) as (width, 3 heads size)."""
    return np.concatenate([_inputs(each) for each in maps]).T


def _woven(*maps: Values) -> Values:
    """Three of (heads, width, size) as (heads 3 size, width)."""
    return np.stack([each.swapaxes(1, 2) for each in maps], 1).reshape(-1, maps[0].shape[1])


def _behind(*shifts: Values) -> Values:
    return np.concatenate([each.reshape(-1) for each in shifts])


def _woven_shifts(*shifts: Values) -> Values:
    return np.stack(shifts, 1).reshape(-1)
