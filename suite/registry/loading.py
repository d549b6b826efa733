"""models.yaml read: found, validated, every mistake as one line."""

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deadbench.suite.errors import one_line
from deadbench.suite.plain_text import MAX_LINE, plain
from deadbench.suite.registry.entries import (
    CheckpointPattern,
    ListedCheckpoints,
    Model,
    Protocol,
    Registry,
    RegistryError,
    Seen,
    Strict,
    Suite,
    SuiteEntry,
    choices,
)
from deadbench.suite.registry.seeds import KEY, with_seeds
from deadbench.suite.yaml_file import YamlError, load_yaml

DEFAULT_REGISTRY = "models.yaml"


def find_registry(path: Path | None = None) -> Path:
    """The registry file: as named, else ./models.yaml, else the one that came with deadbench.

    Raises:
        RegistryError: no such file.
    """
    if path is not None:
        if not path.is_file():
            raise RegistryError(f"{path}: no such registry file")
        return path
    return Path(DEFAULT_REGISTRY) if Path(DEFAULT_REGISTRY).is_file() else own_registry()


def own_registry() -> Path:
    """The registry that came with deadbench.

    Raises:
        RegistryError: no such file.
    """
    suite = Path(__file__).resolve().parents[1]
    for candidate in (suite.parent / DEFAULT_REGISTRY, suite / "data" / DEFAULT_REGISTRY):
        if candidate.is_file():
            return candidate
    raise RegistryError(f"{DEFAULT_REGISTRY}: not found here nor beside deadbench; name one with --registry FILE")


def folder_of(registry: Path) -> Path:
    """The folder from which a registry's relative sources are counted: its own; of the one in a wheel, the package."""
    suite = Path(__file__).resolve().parents[1]
    folder = registry.resolve().parent
    return suite.parent if folder == suite / "data" else folder


def load_registry(path: Path) -> Registry:
    """Read and validate a registry.

    Raises:
        RegistryError: unreadable, not YAML, or invalid; the first mistake as one line.
    """
    try:
        raw = load_yaml(path)
    except YamlError as error:
        raise RegistryError(str(error)) from error
    if not isinstance(raw, dict):
        raise RegistryError(f"{path}: expected the key models; protocols and suites may stand beside it")
    try:
        raw = with_seeds(raw)
    except ValueError as error:
        raise RegistryError(f"{path}: {error}") from error
    try:
        return Registry.model_validate(raw)
    except ValidationError as error:
        raise RegistryError(f"{path}: {plain(_first_mistake(error, raw), MAX_LINE)}") from error
    except (TypeError, ValueError, RecursionError) as error:  # of values that no entry foresees
        raise RegistryError(f"{path}: {one_line(error)}") from error


def _first_mistake(error: ValidationError, raw: dict[str, Any]) -> str:
    """`entry: key value is …; choose …` of the first error."""
    # A union reports a mistake once per member; the member that the user meant complains of more than the type.
    details = min(error.errors(), key=lambda e: e["type"] in ("string_type", "list_type", "int_parsing", "int_type"))
    location, entry = list(details["loc"]), ""
    if len(location) > 1 and location[0] == "models" and isinstance(location[1], int):
        item = raw["models"][location[1]]
        entry = f"{item['id']}: " if isinstance(item, dict) and "id" in item else f"models[{location[1]}]: "
        location = location[2:]
    elif len(location) > 1 and location[0] in ("suites", "protocols"):
        entry, location = f"{str(location[0])[:-1]} {location[1]}: ", location[2:]
    # Members of a union show up as class names and `str` between the keys; a user never wrote those.
    keys = [
        str(part) for part in location if not re.match(r"^([A-Z]\w+|str|int|list\[|function-|constrained-)", str(part))
    ]
    key, value = ".".join(keys), details.get("input")
    kind = details["type"]
    if kind == "extra_forbidden":
        return f"{entry}unknown key {key!r}; allowed: {choices(_allowed_keys(list(details['loc'])))}"
    if kind == "literal_error":
        return f"{entry}{key} {value!r} is unknown; choose {details['ctx']['expected']}"
    if kind == "missing":
        return f"{entry}{key!r} is missing"
    if kind == "value_error":
        return f"{entry}{details['ctx']['error']}"
    if key == "tokens":
        return f"{entry}tokens {value!r} is neither a positive number nor a multiple of the hidden size such as 8D"
    if key == "taps":
        return f"{entry}taps {value!r} is unknown; choose all, none or every:K, such as every:4"
    return f"{entry}{key} {value!r}: {details['msg'][0].lower()}{details['msg'][1:]}"


def _allowed_keys(location: list[Any]) -> list[str]:
    named: dict[str, type[Strict]] = {"protocols": Protocol, "models": Model, "suites": Suite}
    classes = {c.__name__: c for c in (SuiteEntry, CheckpointPattern, ListedCheckpoints, Seen)}
    for part in reversed(location):
        if part in classes:
            return sorted(classes[part].model_fields)
    owner = named.get(str(location[0])) if len(location) > 1 else None
    return sorted([*(owner or Registry).model_fields, *([KEY] if owner is Model else [])])
