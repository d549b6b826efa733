"""GPT-NeoX's checkpoints: a file a layer and rank, with the names that the layer's module has.

Layer 0 is the embedding, blocks begin with 2, after them come the final norm and the output map. What ranks share is
put together as github.com/EleutherAI/gpt-neox does it, `tools/ckpts/convert_neox_to_hf.py`.
"""

import itertools
import re
from dataclasses import replace

from deadbench.suite.checkpoints.dialects.tensors import combined, joined
from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.torch_files import read_torch_file
from deadbench.suite.checkpoints.tensors import Contents, TensorEntry
from deadbench.suite.errors import CheckpointError

FIRST_LAYER = "layer_00-model_00-model_states.pt"
_NUMBER = re.compile(r"layer_(\d{2,4})-model_00-model_states\.pt$")
_FIRST_BLOCK, _MOST_LAYERS, _GAP, _RANKS = 2, 1000, 3, 1000
_NAMES = {
    "word_embeddings.weight": "gpt_neox.embed_in.weight",
    "norm.weight": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "norm.scale": "gpt_neox.final_layer_norm.weight",
    "final_linear.weight": "embed_out.weight",
}
# As since version 2 of GPT-NeoX, and as before.
_LATER = {"mlp.linear1": "mlp.dense_h_to_4h", "mlp.linear2": "mlp.dense_4h_to_h"}
_ROWS = re.compile(r"(word_embeddings|final_linear)\.weight$|(query_key_value|dense_h_to_4h|linear1)\.(weight|bias)$")
_COLUMNS = re.compile(r"(attention\.dense|dense_4h_to_h|linear2)\.weight$")
_SUMMED = re.compile(r"(attention\.dense|dense_4h_to_h|linear2)\.bias$")
_ALIKE = re.compile(r"norm\.(weight|bias|scale)$")


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
    """The tensors of one layer, as transformers calls them, of all ranks that share it.

    Raises:
        CheckpointError: a file that cannot be read, or ranks that do not fit together.
    """
    number = _NUMBER.search(name)
    block = int(number[1]) - _FIRST_BLOCK if number else 0
    others = (name.replace("-model_00-", f"-model_{rank:02d}-") for rank in range(1, _RANKS))
    ranks = [read_torch_file(files, each) for each in (name, *itertools.takewhile(files.has, others))]
    held = [{entry.name: entry for entry in each.entries} for each in ranks]
    entries = []
    for entry in ranks[0].entries:
        missing = next((each for each, of in zip(held, ranks, strict=True) if entry.name not in each), None)
        if missing is not None:
            raise CheckpointError(
                f"{name}: another rank of this layer has no {entry.name}; copy the files of all ranks"
            )
        called = entry.name
        for later, own in _LATER.items():
            called = called.replace(later, own)
        called = _NAMES.get(called, f"gpt_neox.layers.{block}.{called}")
        entries.append(_of_ranks(called, [each[entry.name] for each in held]))
    return replace(ranks[0], entries=entries)


def _of_ranks(called: str, parts: list[TensorEntry]) -> TensorEntry:
    """One tensor of those that the ranks have: cut, summed, or by and by no longer quite the same."""
    own = parts[0].name
    if len(parts) == 1 or not any(form.search(own) for form in (_ROWS, _COLUMNS, _SUMMED, _ALIKE)):
        return replace(parts[0], name=called, called=parts[0].stored_name)
    if _ALIKE.search(own):
        return combined(called, parts, lambda values: values.mean(0))
    if _SUMMED.search(own):
        return combined(called, parts, lambda values: values.sum(0))
    return joined(called, parts, 1 if _COLUMNS.search(own) else 0)
