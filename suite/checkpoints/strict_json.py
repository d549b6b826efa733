"""JSON of strangers: bounded in size and number of objects, no key twice, always one line of error."""

import json
import reprlib
from typing import Any

from deadbench.suite.errors import CheckpointError

MAX_JSON_BYTES = 64_000_000  # index and configuration files of the largest checkpoints are a few megabytes
MAX_OBJECTS = 3_000_000  # objects and lists of one header: a million tensors, each with its shape and offsets

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHOWN_LETTERS = 200


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object of unknown origin, in bounded time and memory.

    Raises:
        CheckpointError: not JSON, not an object, a key given twice, or more lists than any checkpoint has.
    """
    if raw.count(b"{") + raw.count(b"[") > MAX_OBJECTS:
        raise CheckpointError(f"{what} holds more than {MAX_OBJECTS:,} lists; corrupt or hostile")
    try:
        found = json.loads(raw, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise CheckpointError(f"{what} is not JSON (nested too deeply); corrupt or hostile") from error
    except ValueError as error:
        raise CheckpointError(f"{what} is not JSON ({str(error)[:150]}); corrupt, or another format") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return found


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused where a key is given twice: which value holds would depend on the reader."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} is given twice")
            seen.add(key)
    return found


def inside(name: str) -> bool:
    """Whether a name that a file gives is that of a file in its folder or below it."""
    return (
        "\\" not in name and name.isprintable() and all(part and not part.startswith(".") for part in name.split("/"))
    )


def shown(value: object) -> str:
    """A value of unknown size and depth, in a few words."""
    return _SHORT.repr(value)[:_SHOWN_LETTERS]
