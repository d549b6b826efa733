"""Directions on disk: one safetensors file, a float64 vector for every source, facts in the metadata."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def save_directions(path: Path, read: list[tuple[dict[str, Any], NDArray[np.float64] | None]]) -> None:
    """Write the inverse-scale direction of every source that has one, named by its source, whole or not at all.

    Raises:
        ValueError: no source has a direction.
    """
    from safetensors.numpy import save

    directions = {result["source"]: direction_D for result, direction_D in read if direction_D is not None}
    if not directions:
        raise ValueError(f"--save-direction {path}: no source has a final norm with a direction; nothing written")
    metadata = {
        f"{result['source']}.{name}": str(result[name])
        for result, direction_D in read
        if direction_D is not None
        for name in ("family", "final_norm", "final_norm_tensor", "revision")
    }
    data = save(directions, metadata)
    descriptor, aside = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
