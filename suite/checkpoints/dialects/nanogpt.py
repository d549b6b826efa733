"""nanoGPT is transformers' GPT-2 with its maps stored the other way round; where it has no shifts, GPT-2's are zero."""

import re
from collections.abc import Mapping
from typing import Any

from deadbench.suite.checkpoints.dialects.tensors import Tensors

_MAPS = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
_SHIFTED = re.compile(r"(^|\.)(ln_1|ln_2|ln_f|c_attn|c_proj|c_fc)\.weight$")


def is_nanogpt(tensors: Tensors) -> bool:
    """Whether GPT-2's map to queries, keys and values has its outputs first, which GPT-2's own has last."""
    shapes = [tensors[name].shape for name in tensors if name.endswith("h.0.attn.c_attn.weight")]
    return bool(shapes) and all(len(shape) == 2 and shape[0] == 3 * shape[1] for shape in shapes)


def as_gpt2(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' GPT-2 has them, under the same names."""
    for name in list(tensors):
        entry = tensors[name]
        if _MAPS.search(name) and len(entry.shape) == 2:
            tensors.turn({name: name})
        else:
            tensors.rename({name: name})
        shift = f"{name.removesuffix('weight')}bias"
        if _SHIFTED.search(name) and shift not in tensors and entry.shape:
            tensors.fill(shift, name, entry.shape[0], 0.0)
