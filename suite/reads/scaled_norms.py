"""A checkpoint beside its quantised form: has each norm's scale moved into what it feeds, and into all of that?

AWQ and SmoothQuant divide a norm's scale (and shift) by s, coordinate by coordinate, and multiply the columns of the
maps that it feeds by s: the function stays, and the direction turns from gamma^-1 to gamma^-1 s. Here s is had twice,
from the two scales, and from the columns of each map; a map whose columns are as they were was left unscaled, and the
function is another. Everything is from parameters, of each map some outputs. Shapes: D hidden size, O outputs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.architectures.norms import EffectiveNorm
from deadbench.suite.architectures.stored_names import renamed, unwrapped
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.quantised import is_part, quantisation
from deadbench.suite.errors import CheckpointError
from deadbench.suite.reads.dequantised import map_values
from deadbench.suite.reads.norms_table import norms_of
from deadbench.suite.reads.parameters import ParametersRead, read_parameters
from deadbench.suite.spectra.directions import inverse_scale_direction

if TYPE_CHECKING:
    from torch import nn

Float64 = NDArray[np.float64]
_OUTPUTS = 128  # of each map; a column's ratio is then known to a part in eleven of a number's own error
_SAME = 2e-3  # a relative change below this is none
_ROUNDED = {"bfloat16": 2**-8}  # nor is a rounding to what either side is stored in, where that is larger
_SURE = 4  # errors of a column's ratio that a turn must exceed, so that scaled and unscaled can be told apart
_NEAR = 0.25  # of the change: a column that is so near to what would be expected, is it


@dataclass
class ScaledNorm:
    """What a pair of checkpoints shows of one norm.

    Attributes:
        norm: path in the bare model.
        family: layernorm or rmsnorm.
        role: final, block, embedding, qk or other.
        angle: degrees between the directions of the two.
        predicted_angle: degrees between the second's and gamma^-1 s with s of the columns; None where none tell.
        scaled: maps of which the columns were multiplied by s.
        unscaled: those, and the norm's own shift, that were left as they were.
        unknown: those of which it cannot be told.
    """

    norm: str
    family: str
    role: str
    angle: float
    predicted_angle: float | None = None
    scaled: list[str] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    turned: bool = False

    @property
    def verdict(self) -> str:
        """`same`, `turned` with all that it feeds, `broken` where something was left unscaled, else `cannot tell`."""
        if not self.turned:
            return "broken" if self.unscaled else "same"
        if self.unscaled:
            return "broken"
        return "turned" if self.scaled and not self.unknown else "cannot tell"

    def row(self) -> dict[str, Any]:
        """As a table has it."""
        return {
            "norm": self.norm,
            "family": self.family,
            "role": self.role,
            "verdict": self.verdict,
            "angle": self.angle,
            "predicted_angle": self.predicted_angle,
            "scaled": len(self.scaled),
            "unscaled": ", ".join(self.unscaled) or None,
            "unknown": ", ".join(self.unknown) or None,
        }


def scaled_norms(base: Checkpoint, candidate: Checkpoint) -> list[ScaledNorm]:
    """Every norm that both have, in the order of the model.

    Raises:
        CheckpointError: one cannot be read, they are of two architectures, or the wiring of theirs is not known.
    """
    from deadbench.suite.architectures.build import build_config
    from deadbench.suite.reads.dead_parameters import trace_published

    model, wiring = trace_published(build_config(base.config()))
    if wiring is None:
        raise CheckpointError(f"{base.source}: which maps its norms feed cannot be told, so no pair can be checked")
    sides = [_Side.of(each, model) for each in (base, candidate)]
    same = max(_SAME, *(1.01 * _ROUNDED.get(each.read.stored_dtype or "", 0) for each in sides))
    prefix = f"{model.base_model_prefix}."
    readers: dict[str, list[str]] = {}
    for path, norm in wiring.reads.items():
        readers.setdefault(norm.removeprefix(prefix), []).append(path)
    found = []
    for name, (row, before) in sides[0].norms.items():
        if name not in sides[1].norms:
            continue
        after = sides[1].norms[name][1]
        if before.scale_D.shape != after.scale_D.shape:
            raise CheckpointError(
                f"{candidate.source}: {name} is of width {len(after.scale_D)}, in {base.source} of "
                f"{len(before.scale_D)}; give two checkpoints of one model"
            )
        one = ScaledNorm(name, before.family, str(row["role"]), _degrees(before.scale_D, after.scale_D))
        _judge(one, before, after, _columns(sides, readers.get(name, ()), model), same)
        found.append(one)
    if not found:
        raise CheckpointError(f"{candidate.source}: has no norm of {base.source}; give two checkpoints of one model")
    return found


@dataclass(frozen=True)
class _Side:
    """One of the two, as it is read."""

    checkpoint: Checkpoint
    read: ParametersRead
    norms: Mapping[str, tuple[dict[str, Any], EffectiveNorm]]
    stored: Mapping[str, str]
    settings: dict[str, Any] | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: "nn.Module") -> "_Side":
        read = read_parameters(checkpoint)
        norms = {str(row["norm"]): (row, norm) for row, norm in norms_of(checkpoint, read, model)}
        stored = {}
        for name in read.entries:
            path, _, last = name.rpartition(".")
            if last == "weight" or is_part(name):
                stored[renamed(unwrapped(path), read.final.naming.rules)] = path
        return cls(checkpoint, read, norms, stored, quantisation(checkpoint.config()))

    def values(self, path: str, prefix: str, *, turned: bool) -> Float64 | None:
        """The map at `path` of the published model, O x I."""
        paths = (path, path.removeprefix(prefix), prefix + path)
        stored = next((self.stored[each] for each in paths if each in self.stored), None)
        if stored is None:
            return None
        most = 2**31 if turned else _OUTPUTS
        values = map_values(self.checkpoint, self.read.entries, stored, self.settings, most)
        return values.T[:_OUTPUTS] if values is not None and turned else values


def _columns(
    sides: list[_Side], paths: "list[str] | tuple[()]", model: Any
) -> Iterator[tuple[str, Float64 | None, Float64 | None]]:
    """Each map's name, its columns' ratios between the two checkpoints, and their standard errors."""
    prefix, modules = f"{model.base_model_prefix}.", dict(model.named_modules())
    for path in paths:
        turned = type(modules[path]).__name__ == "Conv1D"  # GPT-2's maps are stored the other way round
        before, after = (each.values(path, prefix, turned=turned) for each in sides)
        if before is None or after is None or before.shape != after.shape:
            yield path, None, None
            continue
        square_D = np.maximum((before**2).sum(0), np.finfo(float).tiny)
        ratio_D = (before * after).sum(0) / square_D
        rest_D = np.sqrt(((after - ratio_D * before) ** 2).sum(0) / square_D / len(before))
        yield path, ratio_D, rest_D


def _judge(
    one: ScaledNorm,
    before: EffectiveNorm,
    after: EffectiveNorm,
    columns: Iterator[tuple[str, Float64 | None, Float64 | None]],
    same: float,
) -> None:
    """Fill in what the norm's maps tell; a relative change up to `same` is none."""
    usable = (before.scale_D != 0) & (after.scale_D != 0)
    s_D = np.where(usable, before.scale_D, 1) / np.where(usable, after.scale_D, 1)
    moved = usable & (np.abs(s_D - 1) > same)
    one.turned = bool(moved.any())
    ratios = []
    for path, ratio_D, error_D in columns:
        if ratio_D is None or error_D is None:
            if one.turned:
                one.unknown.append(path)
            continue
        ratios.append(ratio_D)
        if one.turned:
            lists = {"scaled": one.scaled, "unscaled": one.unscaled, "unknown": one.unknown}
            lists[_told(s_D, ratio_D, error_D, moved)].append(path)
        elif np.median(np.abs(ratio_D - 1)) > max(same, _SURE * float(np.median(error_D))):
            one.unscaled.append(path)  # scaled where the norm was not
    if one.turned and before.shift_D is not None and after.shift_D is not None and (before.shift_D[moved] != 0).any():
        shifted = before.shift_D != 0
        ratio_D = np.where(shifted, after.shift_D, 1) / np.where(shifted, before.shift_D, 1)
        if _told(1 / s_D, ratio_D, np.zeros_like(s_D), moved & shifted) == "unscaled":
            one.unscaled.append(f"{one.norm}.bias")
    if ratios and (told := usable & (np.median(ratios, axis=0) != 0)).any():
        predicted_D = before.scale_D[told] / np.median(ratios, axis=0)[told]
        one.predicted_angle = _degrees(predicted_D, after.scale_D[told])


def _told(s_D: Float64, ratio_D: Float64, error_D: Float64, moved: NDArray[np.bool_]) -> str:
    """Whether columns were multiplied by s, not at all, or which cannot be told: over the coordinates that moved."""
    change = float(np.median(np.abs(s_D - 1)[moved]))
    if change <= _SURE * float(np.median(error_D[moved])):
        return "unknown"
    if np.median(np.abs(ratio_D - s_D)[moved]) <= _NEAR * change:
        return "scaled"
    return "unscaled" if np.median(np.abs(ratio_D - 1)[moved]) <= _NEAR * change else "unknown"


def _degrees(one_D: Float64, other_D: Float64) -> float:
    """Between the inverse-scale directions of two scales; exact for small angles too."""
    u_D, v_D = inverse_scale_direction(one_D), inverse_scale_direction(other_D)
    return float(np.degrees(2 * np.arcsin(min(1.0, float(np.linalg.norm(u_D - v_D)) / 2))))
