"""Checkpoints of torch.distributed.checkpoint as several ranks write them, made in one process by torch's classes."""

import io
import itertools
import pickle

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)


def cuts_of(size, parts):
    """Where an axis is cut, as FSDP2 cuts it: pieces of one size, the last ones smaller or empty."""
    step = -(-size // parts) if size else 1
    return [(at, min(step, size - at)) for at in range(0, size, step)]


def save_sharded(folder, state, mesh=(2,), key="model", further=(), change=lambda metadata: metadata):
    """`state` below `key`, cut along its first axes into `mesh`; `further` are values as bytes, by path."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {}

    def written(value, rank):
        raw = io.BytesIO()
        torch.save(value, raw)
        data = ranks.setdefault(rank, bytearray())
        start = len(data)
        data += raw.getvalue()
        return _StorageInfo(f"__{rank}_0.distcp", start, len(raw.getvalue()))

    tensors, stored, paths = {}, {}, {}
    for name, tensor in state.items():
        path = (key, name) if key else (name,)
        fqn = ".".join(path)
        axes = [cuts_of(size, parts) for size, parts in zip(tensor.shape, mesh, strict=False)]
        axes += [[(0, size)] for size in tensor.shape[len(axes) :]]
        chunks = []
        for rank, cuts in enumerate(itertools.product(*axes)):
            piece = tensor[tuple(slice(at, at + count) for at, count in cuts)].clone()
            place = torch.Size(at for at, _ in cuts)
            chunks.append(ChunkStorageMetadata(place, torch.Size(piece.shape)))
            stored[MetadataIndex(fqn, place, len(chunks) - 1)] = written(piece, rank)
        tensors[fqn] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
        paths[fqn] = path
    for path, value in further:
        tensors[".".join(path)], paths[".".join(path)] = BytesStorageMetadata(), path
        stored[MetadataIndex(".".join(path))] = written(value, 0)
    metadata = change(Metadata(tensors, paths, stored, StorageMeta(folder)))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for rank, data in ranks.items():
        (folder / f"__{rank}_0.distcp").write_bytes(data)
    return folder
