"""The parameters-only read: family, final norm, direction and predicted depth, from the configuration and one norm.

No forward pass of the checkpoint, no eigensolve: the architecture is looked up in the atlas, or built empty and its
final norm found and tested by itself; then only the headers and that norm's tensors are opened.
"""

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from suite.atlas import lookup
from suite.directions import dead_subspace, harmonic_scale, inverse_scale_direction, predicted_depth, zero_scales
from suite.renaming import Renaming, renamed, renamings
from suite.resolution import (
    ArchitectureError,
    EffectiveNorm,
    FinalNorm,
    NormBehaviour,
    RemoteCodeError,
    effective_norm,
)
from suite.schema import Row
from suite.sources import Checkpoint
from suite.tensors import DTYPE_NAMES, CheckpointError, TensorEntry, read_headers, read_vector

_BUILDING = threading.Lock()  # transformers sets torch's default dtype while it builds
_LEGACY_NAMES = {"weight": "gamma", "bias": "beta"}  # tensor names of checkpoints from before 2019


@dataclass
class ParametersRead:
    """What the parameters alone say. `norm` and `direction_D` are None where there is no final norm to read."""

    final: FinalNorm
    norm: EffectiveNorm | None
    final_norm_tensor: str | None
    direction_D: NDArray[np.float64] | None
    reason: str | None
    evidence: list[str] = field(default_factory=list)
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    needs_remote_code: bool = False

    @property
    def stored_dtype(self) -> str | None:
        """dtype that the final norm's scale is stored in."""
        return DTYPE_NAMES[self.entries[self.final_norm_tensor].dtype] if self.final_norm_tensor else None

    def columns(self) -> Row:
        """The architecture and scale columns of a row of `reads`."""
        return (
            architecture_columns(self.final)
            | scale_columns(self.norm, self.stored_dtype)
            | {"final_norm_tensor": self.final_norm_tensor}
        )


def architecture_columns(final: FinalNorm) -> Row:
    """Columns that the architecture alone decides; null where there is no final norm."""
    found = final.path is not None
    behaviour = final.behaviour
    return {
        "family": final.family,
        "final_norm": final.path,
        "placement": final.placement,
        "scale": behaviour.scale,
        "has_bias": behaviour.shift_parameter is not None if found else None,
        "eps": behaviour.eps,
        "hidden_size": final.hidden_size,
        "num_blocks": final.num_blocks,
    }


def scale_columns(norm: EffectiveNorm | None, dtype: str | None = None) -> Row:
    """Columns that the effective scale and shift decide, for a model that runs in `dtype`; null without a norm."""
    if norm is None:
        return {"num_zero_scales": None, "scale_harmonic": None, "predicted_dim": None, "depth_predicted": None}
    executed = None if dtype is None else predicted_depth(norm.scale_D, norm.shift_D, norm.family, dtype)
    return {
        "num_zero_scales": len(zero_scales(norm.scale_D)),
        "scale_harmonic": harmonic_scale(norm.scale_D),
        "predicted_dim": dead_subspace(norm.scale_D, norm.family).shape[1],
        "depth_predicted": predicted_depth(norm.scale_D, norm.shift_D, norm.family),
        "depth_predicted_as_executed": executed,
    }


def read_parameters(checkpoint: Checkpoint, verify: bool = False) -> ParametersRead:
    """Read the final norm of `checkpoint` from its parameters alone.

    Args:
        checkpoint: what to read.
        verify: resolve the architecture by behaviour although the atlas has it; behaviour then overrules it.

    Raises:
        CheckpointError: the files cannot be read. A configuration that transformers cannot build raises nothing: the
            read is then undetermined, with the reason.
    """
    raw_config = checkpoint.config()
    entries = read_headers(checkpoint)
    refused = False
    try:
        final = _resolve(raw_config, verify)
    except ArchitectureError as error:
        refused = isinstance(error, RemoteCodeError)
        final = FinalNorm(None, NormBehaviour("undetermined"), None, _hidden_size(raw_config), None, reason=str(error))
    if final.path is None:
        seen = [
            final.reason or "",
            *(_candidates(entries, final.hidden_size) if final.family == "undetermined" else []),
        ]
        return ParametersRead(final, None, None, None, final.reason, seen, entries, refused)

    behaviour = final.behaviour
    scale_entry, shift_entry = (
        stored_tensor(entries, final.path, parameter, final.renamings)
        for parameter in (behaviour.scale_parameter, behaviour.shift_parameter)
    )
    wanted = [(behaviour.scale_parameter, scale_entry), (behaviour.shift_parameter, shift_entry)]
    missing = [f"{final.path}.{name}" for name, entry in wanted if name and entry is None]
    known = (behaviour.scale_parameter, behaviour.shift_parameter)
    beside = scale_entry.name.removesuffix(str(behaviour.scale_parameter)) if scale_entry else f"{final.path}."
    unexplained = [
        f"{beside}{name}" for name in ("weight", "bias") if name not in known and f"{beside}{name}" in entries
    ]
    further = _in_a_further_block(scale_entry.name, final) if scale_entry else None
    if further in entries:
        unexplained.append(str(further))
    if missing or unexplained:
        reason = (
            f"the checkpoint has no tensor for {', '.join(missing)}"
            if missing
            else f"the checkpoint stores {', '.join(unexplained)}, which the architecture does not have"
        )
        undetermined = FinalNorm(
            None, NormBehaviour("undetermined"), None, final.hidden_size, final.num_blocks, reason=reason
        )
        return ParametersRead(undetermined, None, None, None, reason, [*final.evidence, reason], entries)

    weight_D, shift_D = (read_vector(checkpoint, e) if e else None for e in (scale_entry, shift_entry))
    if final.hidden_size is None and weight_D is not None:  # no key of the configuration says it
        final = replace(final, hidden_size=len(weight_D))
    assert final.hidden_size is not None
    for vector, entry in ((weight_D, scale_entry), (shift_D, shift_entry)):
        if vector is not None and entry is not None and len(vector) != final.hidden_size:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} has {len(vector)} values; "
                f"the configuration says {final.hidden_size}"
            )
    norm = effective_norm(behaviour, weight_D, shift_D, final.hidden_size)
    evidence = [*final.evidence, *(f"tensor {e.name} of shape {list(e.shape)}, {e.dtype}" for _, e in wanted if e)]
    return ParametersRead(
        final,
        norm,
        scale_entry.name if scale_entry else None,
        inverse_scale_direction(norm.scale_D),
        None,
        evidence,
        entries,
    )


def _in_a_further_block(tensor: str, final: FinalNorm) -> str | None:
    """The name that the final norm's tensor, if it is part of the last block, would have in one more block."""
    if final.placement != "post" or not final.num_blocks:
        return None
    before, number, after = tensor.rpartition(f".{final.num_blocks - 1}.")
    return f"{before}.{final.num_blocks}.{after}" if number else None


def _resolve(raw_config: dict[str, Any], verify: bool) -> FinalNorm:
    """By the atlas where it covers the configuration; by behaviour, which imports torch and transformers, elsewhere."""
    known = lookup(raw_config)
    if known is not None and not verify:
        return known
    from suite.architecture import build_config, locate_final_norm

    with _BUILDING:
        live = locate_final_norm(build_config(raw_config))
    if known is None:
        return live
    agrees = (known.path, known.behaviour, known.placement) == (
        live.path,
        replace(live.behaviour, evidence=known.behaviour.evidence),
        live.placement,
    )
    verdict = "the atlas agrees" if agrees else f"the atlas says {known.path}, {known.family}, and is overruled"
    return replace(live, evidence=(*live.evidence, verdict))


def _candidates(entries: dict[str, TensorEntry], hidden_size: int | None) -> list[str]:
    """What the tensors alone say where the architecture is unknown: vectors of the hidden size outside any block."""
    found = [
        f"tensor {e.name} of shape {list(e.shape)} could be a final norm's"
        for e in entries.values()
        if e.shape == (hidden_size,) and re.search(r"norm|ln_f|layernorm", e.name, re.IGNORECASE)
        and not re.search(r"\.\d+\.", e.name)
    ]  # fmt: skip
    return found[:8]


def list_norms(checkpoint: Checkpoint, read: ParametersRead) -> list[Row]:
    """One row of `norms` for every norm that the published architecture has and the checkpoint stores, with its role.

    Norms without parameters are there too where the wiring tells of them. `dead_parameters` is null where the wiring is
    not known; paths are those in the bare model (`AutoModel`).
    """
    return [row for row, _ in norms_of(checkpoint, read)]


def norms_of(checkpoint: Checkpoint, read: ParametersRead) -> list[tuple[Row, EffectiveNorm]]:
    """The rows of `list_norms`, each with the norm itself."""
    from suite.architecture import block_list, build_config
    from suite.norms import own_vectors, probe
    from suite.nullity import count_dead_parameters, trace_published

    try:
        model, wiring = trace_published(build_config(checkpoint.config()))
    except ArchitectureError:
        return []
    bare = getattr(model, "base_model", model)
    prefix = next((f"{path}." for path, module in model.named_modules() if module is bare and path), "")
    blocks_path, _ = block_list(bare, read.final.path)
    rules = renamings(bare)
    called = wiring.norms if wiring else {}
    norms: dict[str, EffectiveNorm] = {}
    probed: dict[tuple[type, int, tuple[str, ...]], NormBehaviour] = {}  # a model has many norms of few kinds
    modules = dict(model.named_modules())
    if (final := modules.get(f"{prefix}{read.final.path}")) is not None and (vectors := own_vectors(final)):
        # The others of its kind are like it; `probe` tries rows, and would not know norms of maps.
        probed[type(final), len(next(iter(vectors.values()))), tuple(vectors)] = read.final.behaviour
    for path, module in modules.items():
        vectors = own_vectors(module)
        if any(True for _ in module.children()) or any(p.dim() > 1 for p in module.parameters()):
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
        stored = [stored_tensor(read.entries, path.removeprefix(prefix), name, rules) for name in names]
        if any(name and entry is None for name, entry in zip(names, stored, strict=True)):
            continue
        scale_D, shift_D = (read_vector(checkpoint, entry) if entry else None for entry in stored)
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


def classify(source: str, verify: bool = False) -> tuple[dict[str, Any], NDArray[np.float64] | None]:
    """The object that `deadbench classify --json` prints for one source, and its inverse-scale direction.

    Never raises for a bad checkpoint: `error` then holds the one line and the fields are null.
    """
    started = time.perf_counter()
    result: dict[str, Any] = dict.fromkeys(CLASSIFY_FIELDS)
    result |= {"source": source, "evidence": []}
    direction_D = None
    checkpoint = None
    try:
        checkpoint = Checkpoint(source)
        read = read_parameters(checkpoint, verify)
        columns = read.columns()
        result |= {name: columns[name] for name in CLASSIFY_FIELDS if name in columns}
        result |= {"revision": checkpoint.revision, "evidence": read.evidence, "bytes_total": checkpoint.bytes_total()}
        result["error"] = f"{source}: {read.reason}" if read.needs_remote_code else None
        direction_D = read.direction_D
    except CheckpointError as error:
        result |= {"error": str(error)}
    result["bytes_read"] = checkpoint.bytes_read if checkpoint else 0
    result["seconds"] = time.perf_counter() - started
    return result, direction_D


CLASSIFY_FIELDS = (
    "source", "revision", "family", "final_norm", "final_norm_tensor", "placement", "scale", "has_bias", "eps",
    "hidden_size", "num_zero_scales", "scale_harmonic", "predicted_dim", "depth_predicted", "evidence", "bytes_read",
    "bytes_total", "seconds", "error",
)  # fmt: skip


def stored_tensor(
    entries: dict[str, TensorEntry], path: str, parameter: str | None, rules: Sequence[Renaming] = ()
) -> TensorEntry | None:
    """The tensor of a module's parameter: as transformers names it, or the only one that adds a prefix to it."""
    if parameter is None:
        return None
    for name in (parameter, _LEGACY_NAMES.get(parameter, parameter)):
        wanted = f"{path}.{name}"
        own = {stored: renamed(stored, rules) for stored, e in entries.items() if len(e.shape) < 2 or stored == wanted}
        for fits in (str.__eq__, lambda called, ending: called.endswith(f".{ending}")):
            found = [entries[stored] for stored, called in own.items() if fits(called, wanted)]
            if len(found) == 1 or (found and fits is str.__eq__):
                return found[0]
    return None


def _role(path: str, width: int, final: FinalNorm, blocks_path: str | None) -> str:
    if path == final.path:
        return "final"
    if width != final.hidden_size:
        return "qk" if re.search(r"(^|[._])[qk](uery|ey)?_?(layer)?_?norm", path, re.IGNORECASE) else "other"
    if blocks_path is not None and path.startswith(f"{blocks_path}."):
        return "block"
    return "embedding" if "embed" in path.lower() else "other"


def _hidden_size(raw_config: dict[str, Any]) -> int | None:
    hidden = raw_config.get("hidden_size")
    return hidden if isinstance(hidden, int) else None
