"""torch.distributed.checkpoint: `.metadata` says which pieces of which tensors lie where in the files of all ranks.

A piece is a small archive of torch.save inside a rank's file; it is opened when it is asked for.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.megatron_dist import of_megatron
from deadbench.suite.checkpoints.formats.pickled_names import Constructor, Record, record
from deadbench.suite.checkpoints.formats.pickles import MAX_PICKLE_BYTES, read_pickle, uncollected
from deadbench.suite.checkpoints.formats.state_dicts import STEP_KEYS, Named, is_step, model_part, named_tensors
from deadbench.suite.checkpoints.formats.torch_files import open_archive
from deadbench.suite.checkpoints.formats.torch_objects import TORCH_NAMES, DType, Size, StoredTensor
from deadbench.suite.checkpoints.strict_json import inside, shown
from deadbench.suite.checkpoints.tensors import (
    ITEM_BYTES,
    MAX_DIMENSIONS,
    MAX_EXTENT,
    Contents,
    Piece,
    TensorEntry,
    check_name,
)
from deadbench.suite.errors import CheckpointError

_ROOM = "torch.distributed.checkpoint"
_NAMES: Mapping[str, Any] = dict(TORCH_NAMES) | {
    each.name: each
    for each in (
        *(
            record(f"{_ROOM}.{name}")
            for name in (
                "metadata.Metadata", "metadata.TensorStorageMetadata", "metadata.TensorProperties",
                "metadata.ChunkStorageMetadata", "metadata.BytesStorageMetadata", "metadata.MetadataIndex",
                "metadata.StorageMeta", "metadata._MEM_FORMAT_ENCODING", "filesystem._StorageInfo",
                "filesystem._StoragePrefix", "planner.SavePlan", "planner.WriteItem", "planner.WriteItemType",
                "planner.TensorWriteData", "planner.BytesIOWriteData",  # Megatron's core keeps each rank's plan
            )
        ),
        # As torch before 2.3 called two of them, and Megatron its own subclass of the first.
        record("torch.distributed._shard.sharded_tensor.metadata.TensorProperties"),
        record("torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING"),
        record("megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata"),
        Constructor("torch.serialization._get_layout", str),
    )
}  # fmt: skip
_HELD_BYTES = 2**17  # pieces up to this size are read at once, with the archive around them


@uncollected()
def read_dcp(files: Files, name: str) -> Contents:
    """The tensors of the model that a folder of torch.distributed.checkpoint holds.

    Raises:
        CheckpointError: metadata that name what is not known, or pieces that do not make up their tensors; one line.
    """
    if files.size(name) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{name}: {files.size(name):,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
    try:
        told, _ = read_pickle(files.read(name), name, _NAMES)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{name}: ")
        raise CheckpointError(
            f"{name}: by its name the metadata of torch.distributed.checkpoint, but damaged or another program's: "
            f"{reason}; save the checkpoint again, or take the file out of the folder"
        ) from error
    facts = told.fields if isinstance(told, Record) else {}
    tensors, stored, paths = (facts.get(key) for key in ("state_dict_metadata", "storage_data", "planner_data"))
    if not isinstance(tensors, dict) or not isinstance(stored, dict):
        raise CheckpointError(f"{name}: no metadata of torch.distributed.checkpoint; save the checkpoint again")
    try:
        folder = name.removesuffix(".metadata")
        places = {
            (index["fqn"], index.get("offset")): value.fields
            for key, value in stored.items()
            for index in (key.fields,)
        }
        nested: dict[Any, Any] = {}
        step = None
        for fqn, held in tensors.items():
            path = paths.get(fqn, (fqn,)) if isinstance(paths, dict) else (fqn,)
            if held.kind.endswith(".TensorStorageMetadata"):
                _put(nested, path, Named(fqn))
            elif path[-1] in STEP_KEYS and step is None:
                step = _step(files, folder, places.get((fqn, None)))
        entries = []
        for called, each in named_tensors(model_part(nested), name):
            check_name(name, called)
            entries.append(replace(_entry(folder, each.name, tensors[each.name].fields, places), name=called))
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{name}: corrupt metadata ({type(error).__name__}); save the checkpoint again"
        ) from error
    if not entries:
        raise CheckpointError(f"{name}: no tensors; give the folder of the model's checkpoint")
    return of_megatron(files, folder, Contents(entries, step))


def _put(nested: dict[Any, Any], path: tuple[Any, ...], entry: Named) -> None:
    """Put a tensor where it was in the saved value."""
    for part in path[:-1]:
        nested = nested.setdefault(part, {})
    nested[path[-1]] = entry


def _entry(folder: str, fqn: str, held: dict[str, Any], places: Mapping[Any, dict[str, Any]]) -> TensorEntry:
    dtype, shape = _dtype(held["properties"]), held["size"]
    if not isinstance(fqn, str) or not isinstance(dtype, DType) or not _sizes(shape):
        raise ValueError
    pieces: list[Piece] = []
    covered, item, axes = 0, ITEM_BYTES[dtype.name], len(shape)
    for chunk in held["chunks"]:
        place, part = chunk.fields["offsets"], chunk.fields["sizes"]
        if not _whole(place) or not _whole(part) or not len(place) == len(part) == axes:
            raise ValueError
        count = 1
        for at, long, most in zip(place, part, shape, strict=True):
            if at < 0 or long < 0:
                raise ValueError
            if at + long > most:
                raise CheckpointError(
                    f"{folder}.metadata: a piece of {shown(fqn)} leaves the tensor; save the checkpoint again"
                )
            count *= long
        where = places.get((fqn, place))
        if where is None:
            where = places[fqn, None]
        covered += count
        if count or not pieces:
            wrapped = _where(folder, where)
            pieces.append(Piece(wrapped.file, 0, count * item, place, part, None, wrapped))  # type: ignore[arg-type]
    if covered != math.prod(shape) or len({piece.place for piece in pieces}) != len(pieces):
        raise CheckpointError(
            f"{folder}.metadata: the pieces of {shown(fqn)} do not make it up; is a rank's file missing?"
        )
    return TensorEntry(fqn, pieces[0].file, dtype.name, shape, 0, 0, tuple(pieces))


def _dtype(properties: Record) -> Any:
    state = properties.fields.get("state")
    return state[0] if isinstance(state, tuple) else properties.fields["dtype"]


def _whole(values: Any) -> bool:
    """Whether they are whole numbers; those of a torch.Size are."""
    return type(values) is Size or (type(values) is tuple and {*map(type, values)} <= {int})


def _sizes(values: Any) -> bool:
    return _whole(values) and len(values) <= MAX_DIMENSIONS and all(0 <= each < MAX_EXTENT for each in values)


class _Wrapped(NamedTuple):
    """Where the archive around a piece lies; called, it finds the piece in it."""

    file: str
    start: int
    end: int

    def __call__(self, files: Files, piece: Piece) -> Piece:
        """The piece as it lies in its file."""
        held = _held(files, self)
        value, find = open_archive(held, self.file, self.start, self.end)
        count = piece.end - piece.start
        if (
            not isinstance(value, StoredTensor)
            or value.shape != piece.shape
            or math.prod(value.shape) * ITEM_BYTES[value.dtype] != count
        ):
            raise CheckpointError(
                f"{self.file}: another tensor than .metadata says; the files are of several checkpoints"
            )
        own = value.piece(self.file, locate=find(value.storage))
        assert own.locate is not None
        return own.locate(held, own)._replace(place=piece.place)


def _where(folder: str, told: Mapping[str, Any]) -> _Wrapped:
    file, start, length = told["relative_path"], told["offset"], told["length"]
    if told.get("transform_descriptors"):
        raise CheckpointError(
            f"{folder}.metadata: written with {shown(told['transform_descriptors'])}; save it without"
        )
    if type(start) is not int or type(length) is not int or not (0 <= start < 2**60 and 0 <= length < 2**60):
        raise ValueError
    return _Wrapped(_below(folder, file), start, start + length)


@functools.lru_cache(4096)  # of the few files of all pieces
def _below(folder: str, file: Any) -> str:
    """A file that lies in a folder."""
    if not isinstance(file, str) or not inside(file):
        raise CheckpointError(f"{folder}.metadata: names the file {shown(file)} outside the checkpoint folder")
    return folder + file


def _step(files: Files, folder: str, told: Mapping[str, Any] | None) -> int | None:
    """A number that was saved beside the model; None where it cannot be read."""
    try:
        where = _where(folder, told or {})
        value, _ = open_archive(_held(files, where), where.file, where.start, where.end)
    except (CheckpointError, KeyError, ValueError, OSError):
        return None
    return int(value) if is_step(value) else None


@dataclass(frozen=True)
class _Held:
    """Files of which a part is held in memory."""

    files: Files
    file: str
    start: int
    raw: bytes

    def names(self) -> list[str]:
        return self.files.names()

    def has(self, name: str) -> bool:
        return self.files.has(name)

    def size(self, name: str) -> int:
        return self.files.size(name)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        if name == self.file and end is not None and self.start <= start and end <= self.start + len(self.raw):
            return self.raw[start - self.start : end - self.start]
        return self.files.read(name, start, end)


def _held(files: Files, wrapped: _Wrapped) -> Files:
    """`files`, with a small archive read at once."""
    if wrapped.end - wrapped.start > _HELD_BYTES:
        return files
    return _Held(files, wrapped.file, wrapped.start, files.read(wrapped.file, wrapped.start, wrapped.end))
