"""Files of a checkpoint that lie in memory, with a count of what is read of them."""

import io

import torch

from deadbench.suite.errors import CheckpointError


class MemoryFiles:
    """The files of a folder, by name."""

    def __init__(self, **files):
        self.files = {name.replace("__", "."): raw for name, raw in files.items()}
        self.bytes_read = 0

    def names(self):
        return sorted(self.files)

    def has(self, name):
        return name in self.files

    def size(self, name):
        return len(self.files[name])

    def read(self, name, start=0, end=None):
        if name not in self.files:
            raise CheckpointError(f"{name}: no such file")
        raw = self.files[name][start:end]
        self.bytes_read += len(raw)
        return raw


def saved(value, **options):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def as_torch(raw, entry):
    """Values that were read, as the tensor that was saved."""
    dtypes = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
        "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    }  # fmt: skip
    dtype = dtypes[entry.dtype]
    flat = torch.frombuffer(bytearray(raw.tobytes()), dtype=dtype) if raw.size else torch.empty(0, dtype=dtype)
    return flat.reshape(entry.shape)
