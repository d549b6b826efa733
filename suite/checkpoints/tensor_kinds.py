"""Of what architecture tensors are, by their names alone, where one architecture has such names.

`python -m deadbench.suite.atlas.tensor_names` writes `data/tensor_names.json` from the installed transformers.
"""

import functools
import json
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any

FILE = "tensor_names.json"
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\.")
_BESIDE = re.compile(r"pooler|position_ids|inv_freq|masked_bias|attn\.bias$|attention\.bias$|num_batches_tracked")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def kinds_of(names: Iterable[str]) -> set[str]:
    """Names without what wrappers have left in them, and with `#` for the number of a block."""
    plain = (re.sub(r"^(module\.)+", "", _WRAPPERS.sub("", name)) for name in names)
    kinds = {_NUMBER.sub("#", re.sub(r"^\d+(?=\.)", "#", name)) for name in plain}
    return {kind for kind in kinds if not _BESIDE.search(kind)}


def model_types_of(names: Iterable[str]) -> list[str]:
    """The model types whose tensors have such names: all that the bare model has, and no other in its blocks."""
    stored = kinds_of(names)
    found = []
    for types, base, kinds in _known():
        prefix = f"{base}."
        based = any(kind.startswith(prefix) for kind in stored) and not any(kind.startswith(prefix) for kind in kinds)
        own = {kind.removeprefix(prefix) for kind in stored if kind.startswith(prefix)} if based else stored
        expected = set(kinds)
        blocks = {kind.partition("#")[0] for kind in expected if "#" in kind}
        further = own - expected
        if expected and expected <= own and not any("#" in kind and kind.startswith(tuple(blocks)) for kind in further):
            found += types
    return sorted(found)


@functools.cache
def _known() -> Any:
    return json.loads(resources.files("deadbench.suite").joinpath(f"data/{FILE}").read_text())["names"]
