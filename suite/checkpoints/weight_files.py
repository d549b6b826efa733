"""Which files of a checkpoint folder hold its weights: those that transformers' `from_pretrained` would open.

Folders collect files: a single file beside the index of an earlier save, half-precision variants, pickles. In this
order one of them counts: what config.json names as `transformers_weights`, `model.safetensors`, its index; else the
only safetensors file there is, unless transformers would then open a pickle.
"""

import concurrent.futures
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from deadbench.suite.checkpoints.no_weights import PICKLED_SUFFIXES, no_weights
from deadbench.suite.checkpoints.strict_json import MAX_JSON_BYTES, parse_object, shown
from deadbench.suite.errors import CheckpointError
from deadbench.suite.scratch import Scratch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NAMED_BY = "transformers_weights"  # the key of config.json that names another file, or another index
_PICKLED_DEFAULTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # what transformers falls back to
_CONCURRENT = 8


class Files(Protocol):
    """Where a checkpoint's files are; implemented by `suite/checkpoints/checkpoint.py:Checkpoint`."""

    def names(self) -> list[str]:
        """File names in the checkpoint folder."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` of a file."""


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights.

    Attributes:
        shards: paths below the folder, in the order in which transformers loads them.
        index: the index that lists them, None where there is one file.
        weight_map: the index's shard of every tensor.
    """

    shards: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] = field(default_factory=dict)


def weight_files(files: Files, named: object = None) -> WeightFiles:
    """The weights of a checkpoint folder; `named` is what its config.json says under `transformers_weights`.

    Raises:
        CheckpointError: no safetensors, a missing shard, an index that leaves the folder.
    """
    if named is not None:
        return _named(files, named)
    if files.has(SINGLE_FILE):
        return WeightFiles((SINGLE_FILE,))
    if files.has(INDEX_FILE):
        return _sharded(files, INDEX_FILE)
    names = files.names()
    shards = sorted(n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_"))
    fallback = next((name for name in _PICKLED_DEFAULTS if name in names), None)
    if len(shards) == 1 and fallback:
        raise CheckpointError(
            f"{shards[0]} is not {SINGLE_FILE}, so transformers loads {fallback} beside it, which is pickled and "
            f"refused; to have {shards[0]} read, rename it to {SINGLE_FILE}"
        )
    if len(shards) != 1:
        raise no_weights(files, shards)
    return WeightFiles((shards[0],))


@contextlib.contextmanager
def as_transformers_expects(folder: Path, weights: WeightFiles) -> Iterator[Path]:
    """`folder`, or where other programs could take other weights in it, a folder of links in which they cannot.

    vLLM opens all safetensors that an index does not exclude, whether or not transformers opens the index, and neither
    it nor accelerate's offloading follows shards into subfolders. What goes wrong meanwhile is told of `folder`.
    """
    there = sorted(p.name for p in folder.iterdir() if p.name.endswith(".safetensors"))
    indexed = (folder / INDEX_FILE).exists()
    usual = weights.index == INDEX_FILE if weights.index else weights.shards == (SINGLE_FILE,) and not indexed
    if usual and there == sorted(weights.shards):
        yield folder
        return
    with Scratch() as view:
        for path in folder.iterdir():
            if not path.name.endswith((".safetensors", ".index.json", *PICKLED_SUFFIXES)):
                os.symlink(path.absolute(), view / path.name)
        flat = {shard: shard.replace("/", "--") for shard in weights.shards}
        if weights.index:
            weight_map = {tensor: flat[shard] for tensor, shard in weights.weight_map.items()}
            (view / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
        else:
            flat = dict.fromkeys(weights.shards, SINGLE_FILE)
        for shard, name in flat.items():
            os.symlink((folder / shard).absolute(), view / name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.pop(NAMED_BY, None) is not None:
            (view / "config.json").unlink()
            (view / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            yield view
        except ValueError as error:
            if str(view) not in str(error):
                raise
            raise type(error)(str(error).replace(str(view), str(folder))) from error


def _named(files: Files, named: object) -> WeightFiles:
    if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"config.json: {NAMED_BY} is {shown(named)}, which is neither safetensors nor their index"
        )
    _check_inside("config.json", named)
    if not files.has(named):
        raise CheckpointError(f"config.json: {NAMED_BY} names {named}, which is missing; download the checkpoint again")
    return _sharded(files, named) if named.endswith(".json") else WeightFiles((named,))


def _sharded(files: Files, index: str) -> WeightFiles:
    """What an index lists; each shard is a file that is there."""
    if files.size(index) > MAX_JSON_BYTES:
        raise CheckpointError(f"{index}: larger than {MAX_JSON_BYTES} bytes; no index of a checkpoint")
    weight_map = parse_object(files.read(index), f"{index}: the index").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: not a safetensors index (weight_map is no object)")
    shards = sorted({shard if isinstance(shard, str) else f"../{shown(shard)}" for shard in weight_map.values()})
    if not shards:
        raise CheckpointError(f"{index}: its weight_map is empty; download the checkpoint again")
    for shard in shards:
        _check_inside(index, shard)
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {shown(shard)}, which is no .safetensors file")
    with concurrent.futures.ThreadPoolExecutor(_CONCURRENT) as pool:
        for shard, there in zip(shards, pool.map(files.has, shards), strict=True):
            if not there:
                raise CheckpointError(f"{index}: names {shard}, which is missing; download the checkpoint again")
    return WeightFiles(tuple(shards), index, dict(weight_map))


def _check_inside(where: str, name: str) -> None:
    """Refuse a path that is not one of a file in the folder or below it."""
    if "\\" in name or not name.isprintable() or any(not part or part.startswith(".") for part in name.split("/")):
        raise CheckpointError(f"{where}: names the file {shown(name)} outside the checkpoint folder")
