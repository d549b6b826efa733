"""The parameters-only read: family, final norm, direction and predicted depth, from the configuration and one norm.

No forward pass of the checkpoint, no eigensolve: the architecture is looked up in the atlas, or built empty and its
final norm found and tested by itself; then only the headers and that norm's tensors are opened.
"""

import re
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.architectures.final_names import by_other_names
from deadbench.suite.architectures.norms import EffectiveNorm, FinalNorm, NormBehaviour, effective_norm
from deadbench.suite.architectures.stored_names import Naming, Renaming
from deadbench.suite.architectures.stored_tensors import StoredTensors
from deadbench.suite.atlas.lookup import lookup
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.dialects import timm
from deadbench.suite.checkpoints.dialects.transformer_lens import TRANSFORMER_LENS
from deadbench.suite.checkpoints.quantised import described
from deadbench.suite.checkpoints.tensors import DTYPE_NAMES, StoredNorm, TensorEntry, read_vector
from deadbench.suite.errors import ArchitectureError, CheckpointError, RemoteCodeError
from deadbench.suite.reads.centred_stream import CENTRED, CENTRED_WRITERS, writes_centred
from deadbench.suite.reads.columns import architecture_columns, scale_columns
from deadbench.suite.schema import Row
from deadbench.suite.spectra.directions import inverse_scale_direction

_BUILDING = threading.Lock()  # transformers sets torch's default dtype while it builds


@dataclass
class ParametersRead:
    """What the parameters alone say. `norm` and `direction_D` are None where there is no final norm to read.

    `scale` is the tensor of the final norm's scale.
    """

    final: FinalNorm
    norm: EffectiveNorm | None
    scale: TensorEntry | None
    direction_D: NDArray[np.float64] | None
    reason: str | None
    evidence: list[str] = field(default_factory=list)
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    needs_remote_code: bool = False
    stream_centred: bool | None = None  # by rows of what writes to it; None where they do not tell, or nobody asks

    @property
    def final_norm_tensor(self) -> str | None:
        """What the checkpoint calls the tensor of the final norm's scale."""
        return self.scale.stored_name if self.scale else None

    @property
    def stored_dtype(self) -> str | None:
        """dtype that the final norm's scale is stored in."""
        stored = self.scale.parts[0] if self.scale and self.scale.parts else self.scale
        return DTYPE_NAMES[stored.dtype] if stored else None

    def columns(self) -> Row:
        """The architecture and scale columns of a row of `reads`."""
        return (
            architecture_columns(self.final)
            | scale_columns(self.norm, self.stored_dtype)
            | {"final_norm_tensor": self.final_norm_tensor, "stream_centred": self.stream_centred}
        )


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
    entries = checkpoint.headers()
    told = checkpoint.contents().norm
    if told is None and raw_config.get("model_type") == timm.MODEL_TYPE:
        told = timm.stored_norm(raw_config, entries.values())
    refused = False
    try:
        final = _resolve(raw_config, verify)
        if told and told.module and final.path is None and (known := _as_told(told, entries)):
            return _read_final(checkpoint, known, entries)  # of what is pooled, which transformers' wrapper leaves out
        if final.pooled is not None:
            return _read_final(checkpoint, replace(final.pooled, reason=None), entries)
        if told and told.name and final.path and not told.module:
            names = (Renaming(f"^{re.escape(told.name)}\\.", f"{final.path}."),)
            final = replace(final, naming=final.naming.further(names))
            if told.family and told.family != final.family:
                raise CheckpointError(
                    f"{checkpoint.source}: its metadata say {told.family}, its architecture is of {final.family}; "
                    "give --config"
                )
    except ArchitectureError as error:
        if told and (known := _as_told(told, entries)):
            return _read_final(checkpoint, known, entries)
        refused = isinstance(error, RemoteCodeError)
        final = FinalNorm(None, NormBehaviour("undetermined"), None, _hidden_size(raw_config), None, reason=str(error))
    if final.path is None:
        seen = [
            final.reason or "",
            *_several(checkpoint.candidates),
            *(_candidates(entries, final.hidden_size) if final.family == "undetermined" else []),
        ]
        return ParametersRead(final, None, None, None, final.reason, seen, entries, refused)
    return _read_final(checkpoint, final, entries)


def _read_final(checkpoint: Checkpoint, final: FinalNorm, entries: dict[str, TensorEntry]) -> ParametersRead:
    """The final norm that is known, read from its tensors."""
    path = final.path
    assert path is not None
    translation = checkpoint.translation()
    if translation.folded:
        plain = replace(final.behaviour, scale="implicit-one", scale_parameter=None, shift_parameter=None)
        final = replace(final, behaviour=plain)
    if translation.remark:
        final = replace(final, evidence=(*final.evidence, translation.remark))
    if rules := by_other_names(final, entries):
        final = replace(final, naming=final.naming.further(rules))
    behaviour = final.behaviour
    stored = StoredTensors(entries, final.naming)
    parameters = (behaviour.scale_parameter, behaviour.shift_parameter)
    found = [stored.find(path, parameter) for parameter in parameters]
    scale_entry, shift_entry = (each[0] if len(each) == 1 else None for each in found)
    wanted = list(zip(parameters, (scale_entry, shift_entry), strict=True))
    missing = [f"{final.path}.{name}" for name, entry in wanted if name and entry is None]
    copies = next((each for each in found if len(each) > 1), [])
    beside = scale_entry.name.removesuffix(str(behaviour.scale_parameter)) if scale_entry else f"{final.path}."
    unexplained = [
        f"{beside}{name}" for name in ("weight", "bias") if name not in parameters and f"{beside}{name}" in entries
    ]
    further = _in_a_further_block(scale_entry.name, final) if scale_entry else None
    if further in entries:
        unexplained.append(str(further))
    if missing or unexplained:
        reason = (
            f"the checkpoint holds the norm more than once: {' and '.join(entry.name for entry in copies)} could each "
            f"be {missing[0]}; keep the tensors of one model, under the names that transformers saves"
            if copies
            else f"the checkpoint has no tensor for {', '.join(missing)}"
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
    lens, rms = (translation.dialect or "").startswith(TRANSFORMER_LENS), final.family == "rmsnorm"
    centred = writes_centred(checkpoint, entries, final.hidden_size) if lens or rms else None
    evidence = [
        *final.evidence,
        *(f"tensor {e.stored_name} of shape {list(e.shape)}, {e.dtype}" for _, e in wanted if e),
    ]
    if centred:
        evidence.append(CENTRED if rms else CENTRED_WRITERS)
    if packed := described(checkpoint.config()):
        evidence.append(f"weights quantised ({packed}); the norm is read as it is stored")
    return ParametersRead(
        final,
        norm,
        scale_entry,
        inverse_scale_direction(norm.scale_D),
        None,
        evidence,
        entries,
        stream_centred=centred if rms else None,
    )


def _as_told(told: StoredNorm, entries: dict[str, TensorEntry]) -> FinalNorm | None:
    """The final norm by what the format itself says, of an architecture that transformers does not have."""
    if told.name is None or told.family is None or told.eps is None:
        return None
    shift = "bias" if f"{told.name}.bias" in entries else None
    by = "tables of timm's architectures" if told.module else "the metadata of the file, by the key of its epsilon"
    said = (f"{told.family}: {by}", f"eps = {told.eps}")
    scale = "1+weight" if told.adds_one else "weight"
    behaviour = NormBehaviour(told.family, scale, "weight", shift, told.eps, said)
    placement = "post" if re.search(r"\.\d+\.", told.name) else "pre"
    path = told.module or told.name
    named = Naming((Renaming(f"^{re.escape(told.name)}\\.", f"{path}."),)) if path != told.name else Naming()
    return FinalNorm(path, behaviour, placement, told.hidden_size, told.num_blocks, evidence=said, naming=named)


def _several(candidates: list[str] | None) -> list[str]:
    """What the tensors' names say of the architecture where they do not decide it."""
    if not candidates or len(candidates) == 1:
        return []
    return [f"by their names the tensors could be of {', '.join(candidates[:12])}: --model-type says which"]


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
    from deadbench.suite.architectures.build import build_config
    from deadbench.suite.architectures.locate import locate_final_norm

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


def _hidden_size(raw_config: dict[str, Any]) -> int | None:
    hidden = raw_config.get("hidden_size")
    return hidden if isinstance(hidden, int) else None
