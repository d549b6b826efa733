"""GGUF's tensors under llama.cpp's names, with what its converter turns: queries and keys of Llama, GPT-2's maps.

Names and forms: github.com/ggml-org/llama.cpp, `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py`.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np

from deadbench.suite.checkpoints.dialects.tensors import Tensors, Values, heads_of, need
from deadbench.suite.checkpoints.tensors import ITEM_BYTES
from deadbench.suite.errors import CheckpointError

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA = {
    f"blk.{{}}.{stored}.{which}": f"model.layers.{{}}.{name}.{which}"
    for stored, name in {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }.items()
    for which in ("weight", "bias")
}  # fmt: skip
_GPT2_OUTSIDE = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output.weight": "lm_head.weight",
}
_GPT2_MAPS = {
    "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_GPT2 = {
    f"blk.{{}}.{stored}": f"transformer.h.{{}}.{name}"
    for stored, name in {
        "attn_norm.weight": "ln_1.weight", "attn_norm.bias": "ln_1.bias", "ffn_norm.weight": "ln_2.weight",
        "ffn_norm.bias": "ln_2.bias", **{f"{ours}.bias": f"{theirs}.bias" for ours, theirs in _GPT2_MAPS.items()},
    }.items()
}  # fmt: skip
_GPT2_TURNED = {f"blk.{{}}.{ours}.weight": f"transformer.h.{{}}.{theirs}.weight" for ours, theirs in _GPT2_MAPS.items()}
_NEOX_OUTSIDE = {
    "token_embd.weight": "gpt_neox.embed_in.weight",
    "output_norm.weight": "gpt_neox.final_layer_norm.weight",
    "output_norm.bias": "gpt_neox.final_layer_norm.bias",
    "output.weight": "embed_out.weight",
}
_NEOX = {
    f"blk.{{}}.{stored}.{which}": f"gpt_neox.layers.{{}}.{name}.{which}"
    for stored, name in {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "attention.dense",
        "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
    }.items()
    for which in ("weight", "bias")
}  # fmt: skip


def is_llama_cpp(tensors: Tensors) -> bool:
    """Whether the embedding is called as llama.cpp calls it."""
    return "token_embd.weight" in tensors


def as_llama(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' Llama has them: of each head's queries and keys the halves were laced together."""
    _readable(tensors)
    if "rope_freqs.weight" in tensors:
        raise CheckpointError("rope_freqs.weight scales its angles, by what its metadata do not say; give --config")
    heads, groups, size = heads_of(config)
    for block in tensors.blocks("blk."):
        for kind, count in (("q", heads), ("k", groups)):
            for which in ("weight", "bias"):
                stored = f"blk.{block}.attn_{kind}.{which}"
                if stored in tensors:
                    need(tensors[stored], (count * size, *tensors[stored].shape[1:]))
                    tensors.make(
                        f"model.layers.{block}.self_attn.{kind}_proj.{which}", (stored,), None, _unlaced(count, size)
                    )
    as_qwen(tensors, config)


def as_qwen(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' Qwen2, Qwen3 and the first Gemma have them."""
    _readable(tensors)
    tensors.rename(_OUTSIDE)
    for block in tensors.blocks("blk."):
        tensors.rename(_LLAMA, block)


def as_gpt2(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' GPT-2 has them."""
    _readable(tensors)
    tensors.rename(_GPT2_OUTSIDE)
    for block in tensors.blocks("blk."):
        tensors.rename(_GPT2, block)
        tensors.turn(_GPT2_TURNED, block)


def as_neox(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' GPT-NeoX has them, where a head's queries, keys and values lie together."""
    _readable(tensors)
    heads, _, size = heads_of(config)
    tensors.rename(_NEOX_OUTSIDE)
    for block in tensors.blocks("blk."):
        tensors.rename(_NEOX, block)
        for which in ("weight", "bias"):
            stored = f"blk.{block}.attn_qkv.{which}"
            if stored in tensors:
                need(tensors[stored], (3 * heads * size, *tensors[stored].shape[1:]))

                def woven(values: Values) -> Values:
                    return values.reshape(3, heads, size, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)

                tensors.make(f"gpt_neox.layers.{block}.attention.query_key_value.{which}", (stored,), None, woven)


def _readable(tensors: Tensors) -> None:
    """Refuse types of which the values are not known here."""
    for name in tensors:
        if tensors[name].dtype not in ITEM_BYTES:
            install = "" if find_spec("gguf") else "pip install 'deadbench[gguf]', or "
            raise CheckpointError(
                f"{name} is {tensors[name].dtype}, whose values are not unpacked here; {install}give a file of F32, "
                "F16, BF16 or Q8_0 (llama-quantize --allow-requantize … Q8_0)"
            )


def _unlaced(count: int, size: int) -> Callable[[Values], Values]:
    def unlaced(values: Values) -> Values:
        behind = values.shape[1:]
        return np.swapaxes(values.reshape(count, size // 2, 2, *behind), 1, 2).reshape(values.shape)

    return unlaced
