"""The tensors of a PEFT adapter: those that it has whole, in the place of its base's, and its changes of other maps."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deadbench.suite.checkpoints.no_weights import ADAPTER_FILE
from deadbench.suite.checkpoints.tensors import TensorEntry
from deadbench.suite.errors import CheckpointError

_HOLDER = re.compile(r"^(?:base_model\.model\.|base_model\.)")
# PEFT's copies of a module that is trained as a whole, below the module's own path.
_COPY = re.compile(r"\.(?:modules_to_save(?:\.default)?|ln_tuning_layers(?:\.default)?|base_layer)(?=\.[^.]+$)")
# How the parts of a path begin that a kind of adapter puts below the map that it changes.
PARTS = {
    "LORA": "lora_", "IA3": "ia3_", "LOHA": "hada_", "LOKR": "lokr_", "OFT": "oft_", "HRA": "hra_", "BOFT": "boft_",
    "VERA": "vera_", "FOURIERFT": "fourierft_", "RANDLORA": "randlora_", "TRAINABLE_TOKENS": "trainable_tokens_",
    "ADALORA": "lora_", "C3A": "c3a_", "ROAD": "road_", "DELORA": "delora_", "MISS": "miss_", "SHIRA": "shira_",
    "VBLORA": "vblora_", "WAVEFT": "waveft_", "POLY": "poly_", "XLORA": "xlora_",
}  # fmt: skip
_LEGACY = {"weight": "gamma", "bias": "beta"}
_NORM = re.compile(r"norm|(^|[._])ln(_|\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Change:
    """What an adapter does to one map of its base.

    Attributes:
        path: of the module, as the adapter calls it.
        weight: the stored tensor of the base that is the module's weight.
        bias: that of its bias, None where it has none.
        tensors: the adapter's own, by their names below the path.
    """

    path: str
    weight: str
    bias: str | None
    tensors: Mapping[str, TensorEntry]


def whole_and_changes(
    held: Iterable[TensorEntry], stored: Mapping[str, TensorEntry], kind: str, adapter: str, base: str
) -> tuple[dict[str, TensorEntry], list[Change]]:
    """The tensors that an adapter has whole, by the names that its base has for them, and its changes of maps.

    Args:
        held: the adapter's tensors.
        stored: those of the base.
        kind: as PEFT calls it: LORA, IA3, …
        adapter: what the adapter is called.
        base: what the base is called.

    Raises:
        CheckpointError: tensors of another kind, or for norms and maps that the base does not have.
    """
    begins = PARTS.get(kind)
    tensors: dict[str, dict[str, TensorEntry]] = {}
    whole: dict[str, TensorEntry] = {}
    for entry in held:
        path, part = _divided(_HOLDER.sub("", entry.name), begins)
        if part:
            tensors.setdefault(path, {})[part] = entry
        elif any(_divided(path, each)[1] for each in PARTS.values()):
            raise CheckpointError(f"{adapter}: {entry.name} is none of a {kind} adapter; corrupt or hostile")
        else:
            whole[_COPY.sub("", path)] = entry
    lead = _Lead(stored, [*whole, *(f"{path}.weight" for path in tensors)])
    remedy = f"name the base that it was trained on in base_model_name_or_path of {ADAPTER_FILE}"
    replaced = {}
    for name, entry in whole.items():
        found = lead.stored(name)
        if found is None and len(entry.shape) == 1 and _NORM.search(name):
            raise CheckpointError(f"{adapter}: it trains {name}, which its base {base} does not have; {remedy}")
        if found is not None:  # others are heads of the adapter's own
            replaced[found] = entry
    changes = []
    for path, parts in tensors.items():
        weight = lead.stored(f"{path}.weight")
        if weight is None:
            raise CheckpointError(f"{adapter}: it changes {path}, of which its base {base} stores no weight; {remedy}")
        changes.append(Change(path, weight, lead.stored(f"{path}.bias"), parts))
    return replaced, changes


class _Lead:
    """How the names of an adapter's modules lead to those that its base stores: with parts before them, or without."""

    def __init__(self, stored: Mapping[str, TensorEntry], called: list[str]):
        self._stored = stored
        before = {".".join(name.split(".")[:n]) for name in stored for n in (1, 2)}
        added = ["", *(f"{each}." for each in sorted(before) if not re.search(r"\d", each))]
        ways = [(cut, more) for cut in (0, 1, 2) for more in (added if cut == 0 else [""])]
        self._way = max(ways, key=lambda way: (sum(self._of(name, way) is not None for name in called), -way[0]))

    def stored(self, name: str) -> str | None:
        """What the base calls the adapter's `name`; None where it has none."""
        return self._of(name, self._way)

    def _of(self, name: str, way: tuple[int, str]) -> str | None:
        own = way[1] + name.split(".", way[0])[-1]
        path, _, last = own.rpartition(".")
        names = (own, f"{path}.{_LEGACY.get(last, last)}")
        return next((each for each in names if each in self._stored), None)


def _divided(name: str, begins: str | None) -> tuple[str, str]:
    """The path of the changed module, and the rest, which begins with `begins`; an empty rest where there is none."""
    parts = name.split(".")
    at = next((n for n, part in enumerate(parts) if begins and part.startswith(begins)), None)
    return (name, "") if not at else (".".join(parts[:at]), ".".join(parts[at:]))
