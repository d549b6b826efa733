"""What an architecture is to the parameters read: plain facts, kept from one read to the next, without torch.

Of a series of checkpoints, or of a run in training, the configuration and the tensors' names stay as they are: what
was once established about them stands, for these versions and this code.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.architectures.norms import EffectiveNorm, NormBehaviour
from deadbench.suite.architectures.stored_names import Naming, Renaming
from deadbench.suite.checkpoints.download_cache import cache_folder
from deadbench.suite.checkpoints.tensors import TensorEntry

_DECISIVE = ("architectures", "tracing", "reads")  # the rooms whose code establishes it
_VERSIONS = ("torch", "transformers")


@dataclass(frozen=True)
class MapRead:
    """A linear map that only `norm` feeds."""

    path: str
    norm: str
    outputs: int
    has_bias: bool


@dataclass(frozen=True)
class MapWrite:
    """What writes to a stream that `norm` reads first: its shifts along 1, of a linear map one a column."""

    path: str
    norm: str
    shifts: int
    is_linear: bool


@dataclass(frozen=True)
class DeadMaps:
    """The maps and writers that norms make dead directions of, in the order of `called` norms."""

    called: tuple[str, ...]
    reads: tuple[MapRead, ...]
    writes: tuple[MapWrite, ...]

    def count(self, norms: Mapping[str, EffectiveNorm]) -> dict[str, tuple[int, int]]:
        """Dead parameter directions by norm, (read side, write side), for the norms' real parameters."""
        counts = {path: (0, 0) for path in self.called if path in norms}
        compensated: dict[str, int] = {}
        for each in self.reads:
            if each.norm in counts:
                compensated[each.path] = _kernel_dim(norms[each.norm], has_bias=each.has_bias)
                read, write = counts[each.norm]
                counts[each.norm] = read + each.outputs * compensated[each.path], write
        for writer in self.writes:
            if writer.norm in counts:
                read, write = counts[writer.norm]
                # `1 w^T` with w in the kernel was counted on the read side already.
                twice = compensated.get(writer.path, 0) if writer.is_linear else 0
                counts[writer.norm] = read, write + writer.shifts - twice
        return counts


@dataclass(frozen=True)
class Anatomy:
    """A published architecture as the parameters read needs it.

    Attributes:
        num_parameters: unique parameters.
        prefix: of the paths in the bare model; "" or with its dot.
        blocks_path: where the blocks are in the bare model.
        norms: path, behaviour and width of each, in the order of the modules.
        maps: what they make dead; None where that is not known.
        naming: how stored names lead to it.
    """

    num_parameters: int
    prefix: str
    blocks_path: str | None
    norms: tuple[tuple[str, NormBehaviour, int], ...]
    maps: DeadMaps | None
    naming: Naming = field(default_factory=Naming)


def _kernel_dim(norm: EffectiveNorm, *, has_bias: bool) -> int:
    """Dimension of the kernel that a map with or without a bias can be moved along."""
    zeros = np.flatnonzero(norm.scale_D == 0)
    dim = len(zeros) or int(norm.family == "layernorm")
    shift_D: NDArray[np.float64] | None = norm.shift_D
    if has_bias or shift_D is None or dim == 0:
        return dim
    seen_D = shift_D[zeros] if len(zeros) else shift_D
    return dim - bool(np.any(seen_D != 0))


def kept_anatomy(config: str, entries: Mapping[str, TensorEntry]) -> Anatomy | None:
    """What was established about this configuration and these tensors before; None where nothing was."""
    with contextlib.suppress(Exception):  # a file that another version wrote, or that is torn, says nothing
        return _from_plain(json.loads(_place(config, entries).read_text(encoding="utf-8")))
    return None


def keep_anatomy(config: str, entries: Mapping[str, TensorEntry], anatomy: Anatomy) -> None:
    """Keep what was established, where the disk allows it."""
    place = _place(config, entries)
    aside = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside.write_text(json.dumps(asdict(anatomy)), encoding="utf-8")
        os.replace(aside, place)


def _place(config: str, entries: Mapping[str, TensorEntry]) -> Path:
    digest = hashlib.sha256(config.encode())
    for name in sorted(entries):
        digest.update(f"\n{name} {entries[name].dtype} {entries[name].shape}".encode())
    for package in _VERSIONS:
        digest.update(f"\n{package} {metadata.version(package)}".encode())
    suite = Path(__file__).resolve().parents[1]
    for path in sorted(path for room in _DECISIVE for path in (suite / room).glob("*.py")):
        stat = path.stat()
        digest.update(f"\n{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    return cache_folder() / "anatomies" / f"{digest.hexdigest()[:32]}.json"


def _from_plain(plain: dict[str, Any]) -> Anatomy:
    maps, naming = plain["maps"], plain["naming"]
    return Anatomy(
        plain["num_parameters"],
        plain["prefix"],
        plain["blocks_path"],
        tuple((path, NormBehaviour(**told | {"evidence": ()}), width) for path, told, width in plain["norms"]),
        None
        if maps is None
        else DeadMaps(
            tuple(maps["called"]),
            tuple(MapRead(**each) for each in maps["reads"]),
            tuple(MapWrite(**each) for each in maps["writes"]),
        ),
        Naming(tuple(Renaming(**rule) for rule in naming["rules"]), naming["base"]),
    )
