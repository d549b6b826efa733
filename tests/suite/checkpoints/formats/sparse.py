"""Files as large as those of real models, of which little is there: the values of a few tensors, and holes."""

import collections
import io
import math
import pickle
import zipfile

import numpy as np
import torch


class _Storage:
    def __init__(self, key, count):
        self.told = ("storage", torch.FloatStorage, key, "cpu", count)


class _Tensor:
    def __init__(self, key, shape):
        self.storage, self.shape = _Storage(key, math.prod(shape)), shape

    def __reduce__(self):
        strides = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        arguments = (self.storage, 0, self.shape, strides, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.told if isinstance(value, _Storage) else None


def sparse_torch_file(path, shapes, values):
    """What torch.save makes of float32 tensors of these shapes; all but `values` are holes."""
    pickled = io.BytesIO()
    _Pickler(pickled, 2).dump({name: _Tensor(str(key), shape) for key, (name, shape) in enumerate(shapes.items())})
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as made:
        made.writestr("archive/data.pkl", pickled.getvalue())
        for key, (name, shape) in enumerate(shapes.items()):
            with made.open(zipfile.ZipInfo(f"archive/data/{key}"), "w", force_zip64=True) as out:
                if name in values:
                    out.write(np.asarray(values[name], "<f4").tobytes())
                else:  # counted as written
                    out._file_size = out._compress_size = 4 * math.prod(shape)
                    made.fp.seek(4 * math.prod(shape), 1)
        made.writestr("archive/version", "3\n")
    return path
