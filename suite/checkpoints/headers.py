"""All tensors of a checkpoint by name, from the headers of the files that hold its weights."""

import concurrent.futures
from dataclasses import replace

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.tensors import Contents, StoredNorm, TensorEntry
from deadbench.suite.checkpoints.weight_files import WeightFiles, weight_files
from deadbench.suite.errors import CheckpointError

_CONCURRENT_HEADERS = 8  # shards of a remote checkpoint are opened together


def read_headers(files: Files, weights: WeightFiles | None = None) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint by name, from its headers alone; `weights` are its files, where they are known.

    Raises:
        CheckpointError: no weights, a missing shard, an index that leaves the folder, a malformed header.
    """
    return {entry.name: entry for entry in read_contents(files, weights or weight_files(files)).entries}


def _norm(told: list[StoredNorm]) -> StoredNorm | None:
    """Of several files the first tells what the norms are, and one of them has the final one."""
    if not told:
        return None
    name = next((each.name for each in told if each.name), None)
    return replace(max(told, key=lambda each: each.family is not None), name=name)


def read_contents(files: Files, weights: WeightFiles) -> Contents:
    """What all files of the weights tell together; raises as `read_headers` does."""
    shards = weights.shards
    if len(shards) == 1:
        contents = [weights.format.read(files, shards[0])]
    else:
        with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_HEADERS) as pool:
            contents = list(pool.map(lambda shard: weights.format.read(files, shard), shards))
    held = {shard: {e.name: e for e in each.entries} for shard, each in zip(shards, contents, strict=True)}
    loaded = {name: entry for shard in shards for name, entry in held[shard].items()}  # the last one counts
    entries: dict[str, TensorEntry] = {}
    for tensor, shard in weights.weight_map.items():
        if tensor not in held[shard]:
            raise CheckpointError(
                f"{weights.index}: says that {shard} holds {tensor!r}, which it does not; download the checkpoint again"
            )
        entries[tensor] = loaded[tensor]
    entries |= {name: entry for name, entry in loaded.items() if name not in entries}
    return Contents(
        list(entries.values()),
        next((each.step for each in contents if each.step is not None), None),
        next((each.config for each in contents if each.config is not None), None),
        "; ".join(each.remark for each in contents if each.remark) or None,
        _norm([each.norm for each in contents if each.norm]),
        next((each.dialect for each in contents if each.dialect), None),
        next((each.unfit for each in contents if each.unfit), None),
    )
