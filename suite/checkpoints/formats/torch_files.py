"""What torch.save wrote: a zip archive of a pickle and storages, or before torch 1.6 pickles and storages in a row.

The pickle alone is read, by a reader of our own; it says which views of which storages the tensors are.
"""

import functools
from collections.abc import Callable
from typing import Any

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.formats.pickled_names import CutOffError
from deadbench.suite.checkpoints.formats.pickles import MAX_PICKLE_BYTES, read_pickle
from deadbench.suite.checkpoints.formats.state_dicts import contents_of
from deadbench.suite.checkpoints.formats.torch_objects import TORCH_NAMES, Storage, StoredTensor, read_storage
from deadbench.suite.checkpoints.formats.zips import ZipEntry, find_entry, read_directory, read_entry
from deadbench.suite.checkpoints.no_weights import not_torch
from deadbench.suite.checkpoints.strict_json import shown
from deadbench.suite.checkpoints.tensors import Contents, Piece, shifted
from deadbench.suite.errors import CheckpointError

_ZIP, _OLD = b"PK\3\4", b"\x80\2\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the latter: a pickle of a number
TORCH_MAGIC = (_ZIP, _OLD)
_OLD_PICKLES = 5  # that number, a version, what the machine was, the value, and the keys of its storages
_FIRST_WINDOW = 2**20
_COUNT_BYTES = 8  # before each storage: how many items it has


def read_torch_file(files: Files, name: str) -> Contents:
    """The tensors of the state dict that a file of torch.save holds.

    Raises:
        CheckpointError: no such file, or one that holds what is no tensor and no plain value; one line.
    """
    value, place, remark = load_torch_file(files, name)
    return contents_of(value, name, place, remark)


def load_torch_file(files: Files, name: str) -> tuple[Any, Callable[[StoredTensor], Piece], str | None]:
    """What a file of torch.save holds, where its tensors lie, and what is to be said of how it was read.

    Raises:
        CheckpointError: as `read_torch_file` does.
    """
    first = files.read(name, 0, len(_OLD))
    if first.startswith(_ZIP):
        value, storages = open_archive(files, name)
        return value, lambda tensor: tensor.piece(name, locate=storages(tensor.storage)), None
    if first == _OLD:
        return _load_old(files, name)
    raise not_torch(files, name)


def open_archive(
    files: Files, name: str, start: int = 0, end: int | None = None
) -> tuple[Any, Callable[[Storage], Callable[[Files, Piece], Piece]]]:
    """What the pickle of an archive holds, and what locates pieces of each of its storages.

    Raises:
        CheckpointError: as `read_torch_file` does.
    """
    entries = read_directory(files, name, start, end)
    pickled = [each for each in entries if each == "data.pkl" or (each.endswith("/data.pkl") and each.count("/") == 1)]
    if len(pickled) != 1:
        raise CheckpointError(f"{name}: a zip archive, but not torch.save's (no data.pkl); give the checkpoint itself")
    prefix = pickled[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise CheckpointError(f"{name}: a program of TorchScript, not weights; save its state_dict() and give that")
    order = entries.get(f"{prefix}byteorder")
    if order and read_entry(files, name, order, 16) != b"little":
        raise CheckpointError(f"{name}: written on a big-endian machine; load and save it on a little-endian one")

    def find(storage: Storage) -> Callable[[Files, Piece], Piece]:
        entry: ZipEntry | None = entries.get(f"{prefix}data/{storage.key}")
        if entry is None:
            raise CheckpointError(f"{name}: the storage {shown(storage.key)} is missing; download the file again")
        if entry.size < storage.num_bytes:
            raise CheckpointError(
                f"{name}: the storage {shown(storage.key)} has {entry.size:,} bytes, not {storage.num_bytes:,}; "
                "download the file again"
            )
        return functools.partial(_in_entry, entry=entry)

    raw = read_entry(files, name, entries[pickled[0]], MAX_PICKLE_BYTES)
    value, _ = read_pickle(raw, name, TORCH_NAMES, read_storage)
    return value, find


def _load_old(files: Files, name: str) -> tuple[Any, Callable[[StoredTensor], Piece], str]:
    size = files.size(name)
    window = _FIRST_WINDOW
    while True:
        raw = files.read(name, 0, min(window, size))
        try:
            values, end, met = _old_pickles(raw, name)
            break
        except CutOffError:
            if window >= min(size, MAX_PICKLE_BYTES):
                raise
            window *= 8
    _, version, machine, value, keys = values
    if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(f"{name}: torch.save of version {shown(version)}, {shown(machine)}; save it again")
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(met):
        raise CheckpointError(f"{name}: its storages are not those of its tensors; download the file again")
    starts: dict[str, int] = {}
    for key in keys:
        starts[key] = end + _COUNT_BYTES
        end = starts[key] + met[key].num_bytes
    if end != size:
        raise CheckpointError(f"{name}: {size:,} bytes, but its storages end at {end:,}; download the file again")

    def piece(tensor: StoredTensor) -> Piece:
        return shifted(tensor.piece(name), starts[tensor.storage.key])

    remark = f"{name} is of the form before torch 1.6: its first {len(raw):,} bytes were read in order"
    return value, piece, remark


def _old_pickles(raw: bytes, name: str) -> tuple[list[Any], int, dict[str, Storage]]:
    """The pickles at the beginning of an old file, where they end, and the storages that they name."""
    met: dict[str, Storage] = {}

    def storage(told: Any) -> Storage:
        found = read_storage(told)
        known = met.setdefault(found.key, found)
        if (known.dtype, known.count) != (found.dtype, found.count):
            raise CheckpointError(
                f"{name}: the storage {shown(found.key)} is told in two ways; download the file again"
            )
        return known

    values, end = [], 0
    for _ in range(_OLD_PICKLES):
        value, end = read_pickle(raw, name, TORCH_NAMES, storage, end)
        values.append(value)
    return values, end, met


def _in_entry(files: Files, piece: Piece, entry: ZipEntry) -> Piece:
    return shifted(piece, find_entry(files, piece.file, entry))
