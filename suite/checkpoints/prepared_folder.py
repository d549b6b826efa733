"""A checkpoint's folder as programs that open it by themselves expect it: one set of weights, by the usual names."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deadbench.suite.checkpoints.formats.table import WEIGHT_ENDINGS
from deadbench.suite.checkpoints.no_weights import ADAPTER_FILE
from deadbench.suite.checkpoints.weight_files import INDEX_FILE, NAMED_BY, SAFETENSORS, WeightFiles
from deadbench.suite.scratch import Scratch

_WEIGHTS = (*WEIGHT_ENDINGS, ".index.json")


@contextlib.contextmanager
def as_transformers_expects(
    folder: Path, weights: WeightFiles, config: Mapping[str, Any], files: Sequence[str] = (), *, complete: bool = True
) -> Iterator[Path]:
    """`folder`, or where other programs could take other weights in it, a folder of links in which they cannot.

    vLLM opens all safetensors that an index does not exclude, whether or not transformers opens the index, and neither
    it nor accelerate's offloading follows shards into subfolders. transformers puts an adapter that lies beside the
    weights on them, where PEFT is installed. What goes wrong meanwhile is told of `folder`.

    Args:
        folder: where the files are.
        weights: those that count.
        config: the contents of config.json, which where not `complete` is not the folder's own.
        files: all that hold weights, where the weights' own names are not all.
        complete: whether the folder has the configuration.
    """
    of = weights.format
    there = sorted(p.name for p in folder.iterdir() if p.name.endswith(SAFETENSORS.suffixes))
    indexed = (folder / INDEX_FILE).exists()
    usual = weights.index == of.index if weights.index else weights.shards == (of.file,)
    if of is SAFETENSORS:
        usual = usual and (weights.index is not None or not indexed) and there == sorted(weights.shards)
    complete = complete and weights.loadable and not (folder / ADAPTER_FILE).exists()
    if complete and usual and (of is SAFETENSORS or not (there or indexed)):
        yield folder
        return
    with Scratch() as view:
        for path in folder.iterdir():
            told_anew = ("config.json", ADAPTER_FILE)
            if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in told_anew:
                os.symlink(path.absolute(), view / path.name)
        flat = {shard: shard.replace("/", "--") for shard in weights.shards}
        if of is not SAFETENSORS:  # which readers of our own open, by the names that they know
            inside = of.scattered  # files that name each other by their paths keep them
            flat = {
                name: name.removeprefix(weights.folder) if inside else Path(name).name
                for name in (*weights.shards, *files)
            }
        if weights.index:
            weight_map = {tensor: flat[shard] for tensor, shard in weights.weight_map.items()}
            listed = json.dumps({"metadata": {}, "weight_map": weight_map})
            (view / str(of.index)).write_text(listed, encoding="utf-8")
        elif of is SAFETENSORS:
            flat = dict.fromkeys(weights.shards, str(of.file))
        for shard, name in flat.items():
            if not (view / name).exists():
                (view / name).parent.mkdir(parents=True, exist_ok=True)
                os.symlink((folder / shard).absolute(), view / name)
        told = {key: value for key, value in config.items() if key != NAMED_BY}
        (view / "config.json").write_text(json.dumps(told), encoding="utf-8")
        try:
            yield view
        except ValueError as error:
            if str(view) not in str(error):
                raise
            raise type(error)(str(error).replace(str(view), str(folder))) from error
