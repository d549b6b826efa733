"""The table `norms`: every norm of a published architecture, with its role and its dead parameters."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.architectures.norms import EffectiveNorm, FinalNorm, NormBehaviour, effective_norm
from deadbench.suite.architectures.stored_names import naming
from deadbench.suite.architectures.stored_tensors import StoredTensors
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.tensors import read_vector
from deadbench.suite.errors import ArchitectureError
from deadbench.suite.reads.anatomy import Anatomy
from deadbench.suite.reads.parameters import ParametersRead
from deadbench.suite.schema import Row
from deadbench.suite.spectra.directions import harmonic_scale, inverse_scale_direction, zero_scales

if TYPE_CHECKING:
    from torch import nn

    from deadbench.suite.architectures.wiring import Wiring

Vectors = tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]  # scale and shift, as a module stores them


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
    try:
        anatomy = published_anatomy(checkpoint.config(), read, empty)
    except ArchitectureError:
        return []
    return norms_stored(anatomy, checkpoint, read)


def norms_stored(anatomy: Anatomy, checkpoint: Checkpoint, read: ParametersRead) -> list[tuple[Row, EffectiveNorm]]:
    """The same of an architecture that is known."""
    prefix, naming = anatomy.prefix, anatomy.naming
    naming = naming.further(rule for rule in read.final.naming.rules if rule not in naming.rules)
    of_bare, of_heads = StoredTensors(read.entries, naming), StoredTensors(read.entries, replace(naming, base=""))

    def stored_vectors(path: str, behaviour: NormBehaviour) -> Vectors | None:
        names = (behaviour.scale_parameter, behaviour.shift_parameter)
        stored = of_bare if path.startswith(prefix) else of_heads
        found = [stored.find(path.removeprefix(prefix), name) for name in names]
        if any(name and len(entries) != 1 for name, entries in zip(names, found, strict=True)):
            return None
        scale_D, shift_D = (read_vector(checkpoint, entries[0]) if entries else None for entries in found)
        return scale_D, shift_D

    return norms_in(anatomy, read.final, stored_vectors)


def published_anatomy(raw_config: Mapping[str, Any], read: ParametersRead, empty: "nn.Module | None" = None) -> Anatomy:
    """What the parameters read needs of a published architecture; `empty` is it, on the meta device.

    Raises:
        ArchitectureError: transformers cannot build it.
    """
    from deadbench.suite.architectures.build import build_config
    from deadbench.suite.architectures.parts import block_list
    from deadbench.suite.reads.dead_parameters import trace_published

    model, wiring = trace_published(build_config(raw_config), empty)
    bare = getattr(model, "base_model", model)
    modules = dict(model.named_modules())
    if read.final.path in modules and read.final.path not in dict(bare.named_modules()):
        bare = model  # AutoModel gives the published class itself
    prefix = next((f"{path}." for path, module in modules.items() if module is bare and path), "")
    blocks_path, _ = block_list(bare, read.final.path)
    return replace(dissected(model, wiring, read.final, prefix, blocks_path), naming=naming(model))


def dissected(
    model: "nn.Module", wiring: "Wiring | None", final: FinalNorm, prefix: str, blocks_path: str | None
) -> Anatomy:
    """What the parameters read needs of `model`, of anyone's, in the order of its modules.

    Args:
        model: the values of its parameters are not looked at.
        wiring: what feeds what in it; None where that is not known.
        final: its final norm, by its path below `prefix`.
        prefix: of the paths in the part that is read, which `blocks_path` is one of; "" or with its dot.
        blocks_path: where the blocks are.
    """
    from deadbench.suite.architectures.build import count_parameters
    from deadbench.suite.architectures.kernel_test import own_vectors, probe
    from deadbench.suite.reads.dead_parameters import dead_maps

    modules = dict(model.named_modules())
    called = wiring.norms if wiring else {}
    norms: list[tuple[str, NormBehaviour, int]] = []
    probed: dict[tuple[type, int, tuple[str, ...]], NormBehaviour] = {}  # a model has many norms of few kinds
    if (last := modules.get(f"{prefix}{final.path}")) is not None and (vectors := own_vectors(last)):
        # The others of its kind are like it; `probe` tries rows, and would not know norms of maps.
        probed[type(last), len(next(iter(vectors.values()))), tuple(vectors)] = final.behaviour
    for path, module in modules.items():
        vectors = own_vectors(module)
        parted = any(True for _ in module.children()) and type(module) is not type(last)
        if parted or any(p.dim() > 1 for p in module.parameters()):
            continue
        if not vectors and path not in called:
            continue
        width = len(next(iter(vectors.values()))) if vectors else called[path][1]
        kind = (type(module), width, tuple(vectors))
        if kind not in probed:
            probed[kind] = called[path][0] if path in called else probe(module, width)
        if probed[kind].known:
            norms.append((path, probed[kind], width))
    maps = dead_maps(model, wiring) if wiring else None
    return Anatomy(count_parameters(model), prefix, blocks_path, tuple(norms), maps)


def norms_in(
    anatomy: Anatomy, final: FinalNorm, vectors_of: Callable[[str, NormBehaviour], Vectors | None]
) -> list[tuple[Row, EffectiveNorm]]:
    """Every norm of an architecture that is there, with its role and its dead parameters.

    Args:
        anatomy: of the architecture.
        final: its final norm.
        vectors_of: scale and shift as stored of the norm at a path; None for one that is not there.
    """
    found = ((path, behaviour, width, vectors_of(path, behaviour)) for path, behaviour, width in anatomy.norms)
    norms = {path: effective_norm(behaviour, *own, width) for path, behaviour, width, own in found if own is not None}
    counts = anatomy.maps.count(norms) if anatomy.maps else {}
    prefix, blocks_path = anatomy.prefix, anatomy.blocks_path
    rows = []
    for path, norm in norms.items():
        magnitude_D, name = np.abs(norm.scale_D), path.removeprefix(prefix)
        zeros, role = zero_scales(norm.scale_D), _role(name, len(magnitude_D), final, blocks_path)
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
