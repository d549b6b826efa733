"""Weights that transformers would open with an unpickler, or not at all, as its loader takes them: by our own readers.

transformers is given names and slices, as it has them of a safetensors file; a tensor is read when it is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deadbench.runners.engines.merged_adapter import Slice, adapted_slices
from deadbench.suite.architectures.build import build_config, build_published
from deadbench.suite.checkpoints.adapters import AdaptedCheckpoint, open_prepared
from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.tensors import TensorEntry, read_raw
from deadbench.suite.checkpoints.weight_files import SAFETENSORS
from deadbench.suite.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def stored_state(folder: Path) -> Mapping[str, Slice] | None:
    """The tensors of a folder by name; None where transformers opens them itself: safetensors under its own names.

    Raises:
        CheckpointError: no weights, or what `Checkpoint.contents` refuses.
    """
    checkpoint = open_prepared(folder)
    if checkpoint.weights().format is SAFETENSORS and checkpoint.translation().dialect is None:
        return None
    entries = checkpoint.headers()
    state: dict[str, Slice] = {name: StoredSlice(checkpoint, entry) for name, entry in entries.items()}
    if isinstance(checkpoint, AdaptedCheckpoint) and (checkpoint.tensors.changes or checkpoint.tensors.others):
        architecture = build_published(build_config(checkpoint.config()), "meta")
        state |= adapted_slices(checkpoint, lambda entry: StoredSlice(checkpoint, entry), architecture)
    return state


@dataclass(frozen=True)
class StoredSlice:
    """A stored tensor as transformers' loader takes a slice of a safetensors file."""

    files: Files
    entry: TensorEntry

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.entry.shape)

    def get_dtype(self) -> str:
        """Its dtype as safetensors call it."""
        return self.entry.dtype

    def __getitem__(self, index: Any) -> Tensor:
        """The values, or a part of them.

        Raises:
            CheckpointError: cut off, or of a dtype that torch does not have.
        """
        dtype = _DTYPES.get(self.entry.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.entry.file}: tensor {self.entry.name} is {self.entry.dtype}")
        values = torch.empty(self.entry.shape, dtype=dtype)  # torch's own memory: kernels round as it is aligned
        if values.numel():
            read_raw(self.files, self.entry, values.reshape(-1).view(torch.uint8).numpy())
        return values[index]
