"""Which files of a checkpoint folder hold its weights: those that transformers' `from_pretrained` would open.

Folders collect files: a single file beside the index of an earlier save, half-precision variants, other formats. In
this order one of them counts: what config.json names as `transformers_weights`; of each format of the table what it
calls its file, then its index; where a training framework keeps them; else the only file that has a format's ending.
"""

import concurrent.futures
from dataclasses import dataclass, field

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.table import FORMATS, FRAMEWORKS, Format
from deadbench.suite.checkpoints.formats.trainers import trainers_files
from deadbench.suite.checkpoints.no_weights import is_pointer, no_weights, pointer
from deadbench.suite.checkpoints.shard_names import shard_of
from deadbench.suite.checkpoints.strict_json import MAX_JSON_BYTES, inside, parse_object, shown
from deadbench.suite.errors import CheckpointError

SAFETENSORS = FORMATS[0]
SINGLE_FILE, INDEX_FILE = str(SAFETENSORS.file), str(SAFETENSORS.index)
_NO_WEIGHTS = (  # beside them, with their endings
    "adapter_", "training_args", "optimizer", "scheduler", "rng_state", "random_states", "scaler", "sampler",
    "dl_state_dict",
)  # fmt: skip
_ENDINGS = tuple(suffix for each in FORMATS for suffix in each.suffixes)
NAMED_BY = "transformers_weights"  # the key of config.json that names another file, or another index
_CONCURRENT = 8


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights.

    Attributes:
        shards: paths below the folder, in the order in which transformers loads them.
        index: the index that lists them, None where there is one file.
        weight_map: the index's shard of every tensor.
        format: what they are.
        folder: which folder below is the checkpoint itself, "" for none, else with a slash.
        loadable: transformers opens the index as it is, which it does not without `metadata` in it.
    """

    shards: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] = field(default_factory=dict)
    format: Format = SAFETENSORS
    folder: str = ""
    loadable: bool = True


def weight_files(files: Files, named: object = None) -> WeightFiles:
    """The weights of a checkpoint folder; `named` is what its config.json says under `transformers_weights`.

    Raises:
        CheckpointError: no weights, a missing shard, an index that leaves the folder.
    """
    if named is not None:
        return _named(files, named)
    for each in FORMATS:
        if each.file and each.is_there(files):
            return WeightFiles((each.file,), format=each)
        if each.index and files.has(each.index):
            return _sharded(files, each.index, each)
    if told := trainers_files(files):
        kind = next(e for e in (*FORMATS, *FRAMEWORKS) if e.name == told[0])
        return WeightFiles(told[1], format=kind, folder=told[2])
    names = files.names()
    for each in FORMATS:
        found = sorted(n for n in names if n.endswith(each.suffixes) and not n.startswith(_NO_WEIGHTS))
        if (len(found) == 1 and not _is_part(found[0])) or (found and _is_one_split(found)):
            return WeightFiles((found[0],), format=each)
        if found:
            raise no_weights(files, found)
    raise no_weights(files, ())


def has_weights(files: Files) -> bool:
    """Whether a folder has weights of its own, by the names of its files; an adapter's are none."""
    found = any(may_be_weights(name) or name.endswith(".index.json") for name in files.names())
    return found or any(each.is_there(files) for each in FORMATS)


def may_be_weights(name: str) -> bool:
    """Whether a file may hold a model's weights, by its name."""
    return name.endswith(_ENDINGS) and not name.startswith(_NO_WEIGHTS)


def _is_part(name: str) -> bool:
    """Whether a file says that it is one of several; those of llama.cpp are told of by their first one."""
    shard = shard_of(name)
    return shard is not None and shard.of > 1 and shard.ending != ".gguf"


def _is_one_split(names: list[str]) -> bool:
    """Whether files are all the parts of one, by their names, as llama.cpp splits them."""
    first = shard_of(names[0])
    return (
        first is not None
        and first.ending == ".gguf"
        and names == [first.name(number) for number in range(1, first.of + 1)]
    )


def weights_file(files: Files, name: str) -> WeightFiles:
    """The one file `name` as all of the weights, of the format that its first bytes tell, else its ending."""
    first = files.read(name, 0, 16)
    told = next((each for each in FORMATS if each.magic and first.startswith(each.magic)), None)
    if is_pointer(first):
        raise pointer(files, name)
    return WeightFiles((name,), format=told or next((f for f in FORMATS if name.endswith(f.suffixes)), SAFETENSORS))


def _named(files: Files, named: object) -> WeightFiles:
    if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"config.json: {NAMED_BY} is {shown(named)}, which is neither safetensors nor their index"
        )
    _check_inside("config.json", named)
    if not files.has(named):
        raise CheckpointError(f"config.json: {NAMED_BY} names {named}, which is missing; download the checkpoint again")
    return _sharded(files, named, SAFETENSORS) if named.endswith(".json") else WeightFiles((named,))


def _sharded(files: Files, index: str, of: Format) -> WeightFiles:
    """What an index lists; each shard is a file that is there."""
    if files.size(index) > MAX_JSON_BYTES:
        raise CheckpointError(f"{index}: larger than {MAX_JSON_BYTES} bytes; no index of a checkpoint")
    raw = files.read(index)
    if is_pointer(raw):
        raise pointer(files, index)
    told = parse_object(raw, f"{index}: the index")
    weight_map = told.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: not a safetensors index (weight_map is no object)")
    weight_map = {n: shard.removeprefix("./") if isinstance(shard, str) else shard for n, shard in weight_map.items()}
    shards = sorted({shard if isinstance(shard, str) else f"../{shown(shard)}" for shard in weight_map.values()})
    if not shards:
        raise CheckpointError(f"{index}: its weight_map is empty; download the checkpoint again")
    for shard in shards:
        _check_inside(index, shard)
        if not shard.endswith(of.suffixes):
            raise CheckpointError(f"{index}: names {shown(shard)}, which is no {of.suffixes[0]} file")
    with concurrent.futures.ThreadPoolExecutor(_CONCURRENT) as pool:
        for start in range(0, len(shards), _CONCURRENT):  # an index may name a million that are not there
            asked = shards[start : start + _CONCURRENT]
            for shard, there in zip(asked, pool.map(files.has, asked), strict=True):
                if not there:
                    raise CheckpointError(f"{index}: names {shard}, which is missing; download the checkpoint again")
    return WeightFiles(tuple(shards), index, weight_map, of, loadable="metadata" in told)


def _check_inside(where: str, name: str) -> None:
    """Refuse a path that is not one of a file in the folder or below it."""
    if not inside(name):
        raise CheckpointError(f"{where}: names the file {shown(name)} outside the checkpoint folder")
