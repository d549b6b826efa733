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
        weight: the stored tensor of the base that is the module's weight; None where none has the module's name.
        bias: that of its bias; None where it has none.
        tensors: the adapter's own, by their names below the path.
    """

    path: str
    weight: str | None
    bias: str | None
    tensors: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class AdapterTensors:
    """What an adapter holds, beside its base.

    Attributes:
        whole: tensors that take the place of the base's, by the names that it stores them under.
        others: those that are whole too, and have no such name there: heads of its own, or modules that the installed
            transformers calls otherwise than the base's files do.
        changes: what it does to maps.
    """

    whole: Mapping[str, TensorEntry]
    others: Mapping[str, TensorEntry]
    changes: tuple[Change, ...]


def adapter_tensors(
    held: Iterable[TensorEntry], stored: Mapping[str, TensorEntry], kind: str, adapter: str, base: str
) -> AdapterTensors:
    """The tensors of an adapter by what they are to its base.

    Args:
        held: the adapter's tensors.
        stored: those of the base.
        kind: as PEFT calls it: LORA, IA3, …
        adapter: what the adapter is called.
        base: what the base is called.

    Raises:
        CheckpointError: tensors of another kind, or a norm that the base does not have.
    """
    begins = PARTS.get(kind)
    parts: dict[str, dict[str, TensorEntry]] = {}
    whole: dict[str, TensorEntry] = {}
    for entry in held:
        path, part = _divided(_HOLDER.sub("", entry.name), begins)
        if part:
            parts.setdefault(path, {})[part] = entry
        elif any(_divided(path, each)[1] for each in PARTS.values()):
            raise CheckpointError(f"{adapter}: {entry.name} is none of a {kind} adapter; corrupt or hostile")
        else:
            whole[_COPY.sub("", path)] = entry
    lead = _Lead(stored, [*whole, *(f"{path}.weight" for path in parts)])
    places = {name: lead.stored(name) for name in whole}
    for name, place in places.items():
        if place is None and len(whole[name].shape) == 1 and _NORM.search(name):
            raise CheckpointError(
                f"{adapter}: it trains {name}, which its base {base} does not store; name the base that it was trained "
                f"on in base_model_name_or_path of {ADAPTER_FILE}"
            )
    return AdapterTensors(
        {place: whole[name] for name, place in places.items() if place is not None},
        {name: whole[name] for name, place in places.items() if place is None},
        tuple(
            Change(path, lead.stored(f"{path}.weight"), lead.stored(f"{path}.bias"), held_parts)
            for path, held_parts in parts.items()
        ),
    )


def is_whole_map(entry: TensorEntry) -> bool:
    """Whether a tensor of an adapter is a map that it has whole, and no part of what it does to one."""
    return len(entry.shape) == 2 and not any(_divided(entry.name, each)[1] for each in PARTS.values())


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
