"""fairseq's decoders, metaseq's OPT among them, as transformers' OPT, which calls the final norm otherwise.

Forms: github.com/facebookresearch/metaseq, and what transformers converts its checkpoints of OPT by.
"""

import re
from collections.abc import Mapping
from typing import Any

from deadbench.suite.checkpoints.dialects.tensors import Tensors, rows

_NORM, _FIRST_BLOCK = "decoder.layer_norm.weight", "decoder.layers.0.fc1.weight"
_OUTSIDE = {
    "decoder.layer_norm.weight": "model.decoder.final_layer_norm.weight",
    "decoder.layer_norm.bias": "model.decoder.final_layer_norm.bias",
    "decoder.project_in_dim.weight": "model.decoder.project_in.weight",
    "decoder.project_out_dim.weight": "model.decoder.project_out.weight",
    "decoder.output_projection.weight": "lm_head.weight",
}
_VERSION = r"^decoder\.version$"  # of fairseq's form of its positions
_QKV = "self_attn.qkv_proj"


def is_fairseq(tensors: Tensors) -> bool:
    """Whether the final norm and the first block have fairseq's names."""
    return _NORM in tensors and _FIRST_BLOCK in tensors


def as_opt(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' OPT has them."""
    tensors.leave_out(_VERSION)
    for name in tensors:
        if re.search(_VERSION, name):
            continue
        module, _, which = name.rpartition(".")
        if not module.endswith(_QKV):
            tensors.rename({name: _OUTSIDE.get(name, f"model.{name}")})
            continue
        entry = tensors[name]  # keys, values and queries one after another
        size = entry.shape[0] // 3
        for number, kind in enumerate("kvq"):
            target = f"model.{module.replace(_QKV, f'self_attn.{kind}_proj')}.{which}"
            take = rows(number * size, (number + 1) * size)
            tensors.make(target, (name,), (size, *entry.shape[1:]), take)
