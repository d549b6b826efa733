"""The atlas: what behaviour once established about an architecture, kept: neither torch nor transformers is imported.

`python -m deadbench.suite.atlas` writes `data/atlas.json` from the installed transformers: for each model type the
final norm, which keys give its width, its depth and its eps, and which change the answer. A configuration that the
atlas does not cover, key by key, is answered by behaviour (`suite/architectures/locate.py`).
"""

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from deadbench.suite.architectures.norms import FinalNorm, NormBehaviour
from deadbench.suite.architectures.stored_names import Naming, Renaming
from deadbench.suite.atlas.config_keys import flatten, harmless

LAST = "{last}"  # in a path: the index of the last block


def lookup(raw_config: Mapping[str, Any]) -> FinalNorm | None:
    """The final norm of the configuration, from the atlas alone; None where the atlas cannot answer for it.

    `hidden_size` is None where the length of the norm's tensor says it.
    """
    flat = flatten(raw_config)
    for entry in _entries().get(str(raw_config.get("model_type")), ()):
        given = {entry["aliases"].get(key, key): value for key, value in flat.items()}
        numbers = (entry["hidden"], entry["blocks"], entry["eps"])
        if any(_left_open(key, given) for key in numbers):
            return None
        if all(key in given for key in entry["derived"]) and _all_covered(given, entry):
            return _answer(given, entry)
    return None


def _left_open(key: Any, given: Mapping[str, Any]) -> bool:
    """Whether a nested configuration is given without this key: its own default may differ from its parent's for it."""
    parent = key.rpartition(".")[0] if isinstance(key, str) else ""
    return bool(parent) and key not in given and any(other.startswith(f"{parent}.") for other in given)


def _answer(given: Mapping[str, Any], entry: Mapping[str, Any]) -> FinalNorm | None:
    def number(key: Any) -> Any:
        return given.get(key, entry["defaults"].get(key)) if isinstance(key, str) else key

    blocks, width, eps = number(entry["blocks"]), number(entry["hidden"]), number(entry["eps"])
    if type(blocks) not in (int, type(None)) or (blocks is None) != (entry["blocks"] is None):
        return None
    path, told = entry["path"], f"atlas of transformers {_atlas()['transformers']}"
    if path is None:
        reason = str(entry["reason"]).replace(LAST, str((blocks or 1) - 1))
        behaviour = NormBehaviour(entry["family"])
        width = given.get("hidden_size")
        width = width if type(width) is int else None
        return FinalNorm(None, behaviour, None, width, blocks, reason=reason, evidence=(f"{told}: {reason}",))
    if type(width) is not int and not (width is None and entry["hidden"] is None):
        return None
    if not isinstance(eps, int | float) or isinstance(eps, bool):
        return None
    path = path if blocks is None else path.replace(LAST, str(blocks - 1))
    keys = [
        f"{key} = {number(key)}" for key in (entry["hidden"], entry["blocks"], entry["eps"]) if isinstance(key, str)
    ]
    behaviour = NormBehaviour(
        entry["family"],
        entry["scale"],
        entry["scale_parameter"],
        entry["shift_parameter"],
        float(eps),
        (f"config: {', '.join(keys)}",) if keys else (),
        entry.get("axes_after", 0),
    )
    evidence = (
        f"{told}: {path} ({entry['class']}) makes the last hidden state and behaves as {entry['family']}, effective "
        f"scale {entry['scale']}",
        *behaviour.evidence,
    )
    naming = Naming(tuple(Renaming(*rule) for rule in entry["renamings"]), entry["base"])
    return FinalNorm(path, behaviour, entry["placement"], width, blocks, evidence=evidence, naming=naming)


def _all_covered(given: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether the entry's answer is known to hold for the configuration, with what it leaves at its defaults."""
    towers = tuple(entry["towers"])
    return all(key.startswith(towers) or _covered(key, value, entry) for key, value in given.items())


def _covered(key: str, value: Any, entry: Mapping[str, Any]) -> bool:
    """Whether the entry's answer is known to hold with this value of this key."""
    default = entry["defaults"].get(key)
    if key in entry["indifferent"]:
        return not isinstance(default, list) or _same_kind(value, default)
    if key in (entry["blocks"], entry["hidden"], entry["eps"]) or harmless(key):
        return True
    if key in entry["defaults"] and default == value and isinstance(default, bool) == isinstance(value, bool):
        return True
    measured = isinstance(value, int | float) and not isinstance(value, bool)
    return measured and key not in entry["decisive"] and default is None


def _same_kind(value: Any, default: list[Any]) -> bool:
    """Whether a list of numbers is as long as the default one: a list of another length may be of other stages."""
    return isinstance(value, list) and len(value) == len(default) and all(type(v) in (int, float) for v in value)


@functools.cache
def _atlas() -> Any:
    return json.loads(resources.files("deadbench.suite").joinpath("data/atlas.json").read_text())


def _entries() -> dict[str, Any]:
    return _atlas()["model_types"]  # type: ignore[no-any-return]
