"""Writes what the tensors of each model type are called, from the installed transformers.

python -m deadbench.suite.atlas.tensor_names

A line for all model types whose tensors have the same names; `suite/checkpoints/tensor_kinds.py` reads them.
"""

import json
import sys
import warnings
from importlib import resources
from pathlib import Path

import transformers

from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.atlas.config_keys import DEPTH_KEYS, PER_LAYER, flatten, last, nest
from deadbench.suite.checkpoints.tensor_kinds import FILE, kinds_of
from deadbench.suite.errors import ArchitectureError, reason_of
from deadbench.suite.storage import write_whole

_BLOCKS = 3  # architectures with two kinds of blocks have both


def names_of(model_type: str) -> tuple[str, tuple[str, ...]]:
    """The prefix that a published class puts before the bare model's tensors, and what those are called.

    Raises:
        ArchitectureError: transformers cannot build it.
    """
    defaults = flatten(transformers.CONFIG_MAPPING[model_type]().to_dict())
    few = {key: _BLOCKS for key, value in defaults.items() if last(key) in DEPTH_KEYS and type(value) is int}
    shallow = {key: value for key, value in (defaults | few).items() if last(key) not in PER_LAYER}
    for flat in (shallow, {}):
        try:
            model = build_model(build_config(nest(flat) | {"model_type": model_type}), "meta")
            return str(getattr(model, "base_model_prefix", "")), tuple(sorted(kinds_of(model.state_dict())))
        except ArchitectureError:
            if not flat:
                raise
    raise AssertionError


def main() -> None:
    """Write the file for all model types that the atlas has."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    folder = Path(str(resources.files("deadbench.suite").joinpath("data")))
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for model_type in json.loads((folder / "atlas.json").read_text())["model_types"]:
        try:
            found.setdefault(names_of(model_type), []).append(model_type)
        except Exception as error:
            print(f"{model_type}: {reason_of(error)[:160]}", file=sys.stderr, flush=True)
    rows = sorted([types, base, list(kinds)] for (base, kinds), types in found.items())
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_whole(folder / FILE, f'{{"transformers": "{transformers.__version__}", "names": [\n{lines}\n]}}\n'.encode())


if __name__ == "__main__":
    main()
