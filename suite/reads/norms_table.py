"""The table `norms`: every norm of a published architecture, with its role and its dead parameters."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deadbench.suite.architectures.norms import EffectiveNorm, FinalNorm, NormBehaviour, effective_norm
from deadbench.suite.architectures.stored_names import naming
from deadbench.suite.architectures.stored_tensors import StoredTensors
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.tensors import read_vector
from deadbench.suite.errors import ArchitectureError
from deadbench.suite.reads.parameters import ParametersRead
from deadbench.suite.schema import Row
from deadbench.suite.spectra.directions import harmonic_scale, inverse_scale_direction, zero_scales

if TYPE_CHECKING:
    from torch import nn


def list_norms(checkpoint: Checkpoint, read: ParametersRead, empty: "nn.Module | None" = None) -> list[Row]:
    """One row of `norms` for every norm that the published architecture has and the checkpoint stores, with its role.

    Norms without parameters are there too where the wiring tells of them. `dead_parameters` is null where the wiring is
    not known; paths are those in the bare model (`AutoModel`). `empty` is the published model on the meta device.
    """
    return [row for row, _ in norms_of(checkpoint, read, empty)]


def norms_of(
    checkpoint: Checkpoint, read: ParametersRead, empty: "nn.Module | None" = None
) -> list[tuple[Row, EffectiveNorm]]:
    """The rows of `list_norms`, each with the norm itself."""
    from deadbench.suite.architectures.build import build_config
    from deadbench.suite.architectures.kernel_test import own_vectors, probe
    from deadbench.suite.architectures.parts import block_list
    from deadbench.suite.reads.dead_parameters import count_dead_parameters, trace_published

    try:
        model, wiring = trace_published(build_config(checkpoint.config()), empty)
    except ArchitectureError:
        return []
    bare = getattr(model, "base_model", model)
    modules = dict(model.named_modules())
    if read.final.path in modules and read.final.path not in dict(bare.named_modules()):
        bare = model  # AutoModel gives the published class itself
    prefix = next((f"{path}." for path, module in modules.items() if module is bare and path), "")
    blocks_path, _ = block_list(bare, read.final.path)
    base = naming(model)
    base = base.further(rule for rule in read.final.naming.rules if rule not in base.rules)
    of_bare, of_heads = StoredTensors(read.entries, base), StoredTensors(read.entries, replace(base, base=""))
    called = wiring.norms if wiring else {}
    norms: dict[str, EffectiveNorm] = {}
    probed: dict[tuple[type, int, tuple[str, ...]], NormBehaviour] = {}  # a model has many norms of few kinds
    if (final := modules.get(f"{prefix}{read.final.path}")) is not None and (vectors := own_vectors(final)):
        # The others of its kind are like it; `probe` tries rows, and would not know norms of maps.
        probed[type(final), len(next(iter(vectors.values()))), tuple(vectors)] = read.final.behaviour
    for path, module in modules.items():
        vectors = own_vectors(module)
        parted = any(True for _ in module.children()) and type(module) is not type(final)
        if parted or any(p.dim() > 1 for p in module.parameters()):
            continue
        if not vectors and path not in called:
            continue
        width = len(next(iter(vectors.values()))) if vectors else called[path][1]
        kind = (type(module), width, tuple(vectors))
        if kind not in probed:
            probed[kind] = called[path][0] if path in called else probe(module, width)
        behaviour = probed[kind]
        if not behaviour.known:
            continue
        names = (behaviour.scale_parameter, behaviour.shift_parameter)
        stored = of_bare if path.startswith(prefix) else of_heads
        found = [stored.find(path.removeprefix(prefix), name) for name in names]
        if any(name and len(entries) != 1 for name, entries in zip(names, found, strict=True)):
            continue
        scale_D, shift_D = (read_vector(checkpoint, entries[0]) if entries else None for entries in found)
        norms[path] = effective_norm(behaviour, scale_D, shift_D, width)
    counts = count_dead_parameters(model, wiring, norms) if wiring else {}
    rows = []
    for path, norm in norms.items():
        magnitude_D, name = np.abs(norm.scale_D), path.removeprefix(prefix)
        zeros, role = zero_scales(norm.scale_D), _role(name, len(magnitude_D), read.final, blocks_path)
        row = {
            "norm": name,
            "family": norm.family,
            "role": role,
            "scale_min": float(magnitude_D.min()),
            "scale_median": float(np.median(magnitude_D)),
            "scale_max": float(magnitude_D.max()),
            "scale_harmonic": harmonic_scale(norm.scale_D),
            "num_zero_scales": len(zeros),
            "zero_coordinates": zeros.tolist(),
            "zero_scales": norm.scale_D[zeros].tolist(),
            "scale_mean_square": float(np.mean(magnitude_D**2)),
            "direction": inverse_scale_direction(norm.scale_D).tolist() if role == "final" else None,
            "dead_parameters": sum(counts[path]) if path in counts else None,
            "dead_parameters_written": counts[path][1] if path in counts else None,
        }
        rows.append((row, norm))
    return rows


def _role(path: str, width: int, final: FinalNorm, blocks_path: str | None) -> str:
    if path == final.path:
        return "final"
    if width != final.hidden_size:
        return "qk" if re.search(r"(^|[._])[qk](uery|ey)?_?(layer)?_?norm", path, re.IGNORECASE) else "other"
    if blocks_path is not None and path.startswith(f"{blocks_path}."):
        return "block"
    return "embedding" if "embed" in path.lower() else "other"
