"""Directions on disk: safetensors files of float64 vectors, with facts in the metadata."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.storage import write_whole


def save_directions(path: Path, read: list[tuple[dict[str, Any], NDArray[np.float64] | None]]) -> None:
    """Write the inverse-scale direction of every source that has one, named by its source, whole or not at all.

    Raises:
        ValueError: no source has a direction.
    """
    directions = {result["source"]: direction_D for result, direction_D in read if direction_D is not None}
    if not directions:
        raise ValueError(f"--save-direction {path}: no source has a final norm with a direction; nothing written")
    metadata = {
        f"{result['source']}.{name}": str(result[name])
        for result, direction_D in read
        if direction_D is not None
        for name in ("family", "final_norm", "final_norm_tensor", "revision")
    }
    _write(path, directions, metadata)


def export_directions(
    source: str, path: Path, config: dict[str, Any] | None = None, model_type: str | None = None
) -> int:
    """Write the directions of all norms of a checkpoint, from its parameters alone.

    Tensors, float64, by module path in the bare model: `NORM.direction` (D, unit) is the inverse-scale direction;
    `NORM.dead_subspace` (D x m, orthonormal columns) the predicted dead subspace of its outputs' covariance, left out
    where m = 0; `NORM.shift` (D) its shift, where it has one, for the compensation of a bias. Metadata: the source,
    revision and fingerprint, the final norm's path and family, and each norm's family and role.

    Returns:
        The number of norms.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ValueError: it has no norm.
    """
    from deadbench.suite.checkpoints.adapters import open_checkpoint
    from deadbench.suite.reads.norms_table import norms_of
    from deadbench.suite.reads.parameters import read_parameters
    from deadbench.suite.spectra.directions import dead_subspace, inverse_scale_direction

    checkpoint = open_checkpoint(source, config=config, model_type=model_type)
    read = read_parameters(checkpoint)
    norms = norms_of(checkpoint, read)
    if not norms:
        raise ValueError(f"{checkpoint.source}: no norm with stored parameters; nothing written ({read.reason})")
    tensors: dict[str, NDArray[np.float64]] = {}
    metadata = {
        "source": checkpoint.source,
        "revision": checkpoint.revision or "",
        "fingerprint": checkpoint.fingerprint(),
        "final_norm": read.final.path or "",
        "final_norm_tensor": read.final_norm_tensor or "",
    }
    for row, norm in norms:
        name = row["norm"]
        tensors[f"{name}.direction"] = inverse_scale_direction(norm.scale_D)
        subspace_Dm = dead_subspace(norm.scale_D, norm.family)
        if subspace_Dm.shape[1]:
            tensors[f"{name}.dead_subspace"] = np.ascontiguousarray(subspace_Dm)
        if norm.shift_D is not None:
            tensors[f"{name}.shift"] = norm.shift_D
        metadata |= {f"{name}.family": norm.family, f"{name}.role": row["role"]}
    _write(path, tensors, metadata)
    return len(norms)


def _write(path: Path, tensors: dict[str, NDArray[np.float64]], metadata: dict[str, str]) -> None:
    """One safetensors file, whole or not at all."""
    from safetensors.numpy import save

    write_whole(path, save(tensors, metadata))
