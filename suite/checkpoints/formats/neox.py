"""GPT-NeoX's checkpoints: a file a layer, with the names that the layer's module has; as transformers' GPT-NeoX.

Layer 0 is the embedding, blocks begin with 2, after them come the final norm and the output map.
"""

import re
from dataclasses import replace

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.torch_files import read_torch_file
from deadbench.suite.checkpoints.tensors import Contents

FIRST_LAYER = "layer_00-model_00-model_states.pt"
_NUMBER = re.compile(r"layer_(\d{2,4})-model_00-model_states\.pt$")
_FIRST_BLOCK, _MOST_LAYERS, _GAP = 2, 1000, 3
_NAMES = {
    "word_embeddings.weight": "gpt_neox.embed_in.weight",
    "norm.weight": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "norm.scale": "gpt_neox.final_layer_norm.weight",
    "final_linear.weight": "embed_out.weight",
}


def layer_files(files: Files, folder: str) -> tuple[str, ...]:
    """The files of all layers, of the first of the ranks that share each."""
    found, missing = [], 0
    for number in range(_MOST_LAYERS):
        name = f"{folder}layer_{number:02d}-model_00-model_states.pt"
        there = files.has(name)
        missing = 0 if there else missing + 1
        found += [name] if there else []
        if missing > _GAP:  # numbers of layers without parameters are left out
            break
    return tuple(found)


def read_layer(files: Files, name: str) -> Contents:
    """The tensors of one layer, as transformers calls them."""
    number = _NUMBER.search(name)
    block = int(number[1]) - _FIRST_BLOCK if number else 0
    contents = read_torch_file(files, name)
    entries = [
        replace(entry, name=_NAMES.get(entry.name, f"gpt_neox.layers.{block}.{entry.name}"))
        for entry in contents.entries
    ]
    return replace(contents, entries=entries)
