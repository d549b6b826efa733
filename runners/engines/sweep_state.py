"""Where one batch's pass stands between two blocks, as Arrow, and the same pass brought there again.

A pass is a stack of Python frames, which no file holds. The model's own code comes to the same place again, when each
block's result is handed to it instead of the block being run. Of those results a pass still holds few: the last one,
and what the model keeps beside the stream, such as a bias of positions. They are saved; the others are gone, and NaN
stands for them: should anything have come of one after all, no row does.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from deadbench.suite.spectra.arrow_state import StateError, fields, struct

SWEEP_STATE = pa.schema({"run": pa.int64(), "place": pa.string(), "storages": pa.large_binary()})

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class _Seen:
    """A tensor of a block's result, without holding it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: StorageWeakRef

    @classmethod
    def of(cls, tensor: Tensor) -> "_Seen":
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), storage)


def seen(result: Any) -> Any:
    """What a block returned, its tensors by their form alone."""
    if isinstance(result, Tensor):
        return _Seen.of(result)
    if type(result) in (tuple, list):
        return type(result)(seen(each) for each in result)
    if type(result) is dict:
        return {name: seen(each) for name, each in result.items()}
    return result


class _Storages:
    """The memory that a state holds, each piece once."""

    def __init__(self) -> None:
        self.pieces: list[np.ndarray[Any, Any]] = []
        self._numbers: dict[int, int] = {}

    def plain(self, value: Any) -> Any:
        """A `seen` result as JSON holds it.

        Raises:
            StateError: it has something else than tensors and plain values.
        """
        if isinstance(value, _Seen):
            dtype = str(value.dtype).removeprefix("torch.")
            form = {"dtype": dtype, "shape": value.shape, "stride": value.stride, "offset": value.offset}
            return {"tensor": form | {"storage": self._number(value.storage)}}
        if isinstance(value, tuple | list):
            return {type(value).__name__: [self.plain(each) for each in value]}
        if isinstance(value, dict):
            return {"dict": [[name, self.plain(each)] for name, each in value.items()]}
        if not isinstance(value, _PLAIN):
            raise StateError(f"a block returns a {type(value).__name__}, which no file holds")
        return {"value": value}

    def _number(self, storage: StorageWeakRef) -> int | None:
        """The place of a piece that is still held; None where it is gone."""
        if storage.cdata not in self._numbers:
            held: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
            if held is None:
                return None
            self._numbers[storage.cdata] = len(self.pieces)
            self.pieces.append(_bytes_of(held).cpu().numpy())
        return self._numbers[storage.cdata]


def pack(run: int, results: list[Any], stream: Tensor, args: Any) -> pa.RecordBatch:
    """The state of pass `run`: it was given `results`, and its next block would be called with `args`, `stream` among
    them.

    Raises:
        StateError: a block returned what cannot be saved.
    """
    storages = _Storages()
    plain = [storages.plain(result) for result in results]
    place = {"results": plain, "stream": storages.plain(_Seen.of(stream)), "beside": _digest(args, stream)}
    place["bytes"] = [len(piece) for piece in storages.pieces]
    data = np.concatenate([*storages.pieces, np.empty(0, np.uint8)])  # the pieces themselves may go to disk meanwhile
    offsets = pa.py_buffer(np.array([0, len(data)], np.int64))
    packed = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(data)])
    return struct({"run": run, "place": json.dumps(place), "storages": packed}, SWEEP_STATE)


class Packed:
    """A state that `pack` made: the results to give to a new pass, and what its next call must then be.

    Attributes:
        run: which pass it is of.
    """

    def __init__(self, state: pa.RecordBatch, device: torch.device):
        """Raises `StateError` where it is not whole."""
        row = fields(state, SWEEP_STATE)
        self.run: int = row["run"].as_py()
        self._place, self._device = json.loads(row["place"].as_py()), device
        data = np.frombuffer(row["storages"].as_buffer(), np.uint8)
        if len(data) != sum(self._place["bytes"]):
            raise StateError("a state of another size")
        self._storages: list[torch.UntypedStorage] = []
        for piece in torch.from_numpy(data.copy()).split(self._place["bytes"]):
            storage = torch.UntypedStorage(len(piece), device=device)  # torch's own memory: kernels round as it lies
            _bytes_of(storage).copy_(piece)
            self._storages.append(storage)

    def results(self) -> Iterator[Any]:
        """One block's after the other, each made when it is asked for."""
        for plain in self._place["results"]:
            yield self._made(plain)

    def settle(self, stream: Tensor, args: Any) -> None:
        """Give the next call's `stream`, which came of the last result, its values.

        Raises:
            StateError: the pass has come to another place than it was saved at.
        """
        form = self._place["stream"]["tensor"]
        now = _Storages().plain(_Seen.of(stream))["tensor"]
        saved = self._storages[form["storage"]]
        there = stream.untyped_storage()
        if (
            json.dumps(now | _ANY) != json.dumps(form | _ANY)
            or there.nbytes() != saved.nbytes()
            or _digest(args, stream) != self._place["beside"]
        ):
            raise StateError("the model does not come to the place where it was saved")
        if there.data_ptr() != saved.data_ptr():
            _bytes_of(there).copy_(_bytes_of(saved))
        self._storages.clear()

    def _made(self, plain: dict[str, Any]) -> Any:
        ((kind, value),) = plain.items()
        if kind in ("tuple", "list"):
            return (tuple if kind == "tuple" else list)(self._made(each) for each in value)
        if kind == "dict":
            return {name: self._made(each) for name, each in value}
        if kind == "value":
            return value
        dtype = getattr(torch, value["dtype"])
        if value["storage"] is not None:
            empty = torch.empty(0, dtype=dtype, device=self._device)
            return empty.set_(self._storages[value["storage"]], value["offset"], value["shape"], value["stride"])
        gone = torch.empty_strided(value["shape"], value["stride"], dtype=dtype, device=self._device)
        return gone.fill_(torch.nan if dtype.is_floating_point else 0)


_ANY = {"storage": None}


def _digest(args: Any, stream: Tensor) -> str:
    """Of every tensor in a call's arguments beside the stream."""
    digest = hashlib.sha256()
    for tensor in tree_leaves(args):
        if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != stream.untyped_storage().data_ptr():
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
            digest.update(_bytes_of(values.clone().untyped_storage()).numpy().data)
    return digest.hexdigest()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))
