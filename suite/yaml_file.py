"""YAML that people write: a key given twice is refused, numbers are read as in YAML 1.2."""

import re
from pathlib import Path
from typing import Any

import yaml

try:
    from yaml import CSafeLoader as _SafeLoader
except ImportError:  # PyYAML built without libyaml: ten times slower, and the same
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

from deadbench.suite.errors import first_line
from deadbench.suite.plain_text import plain
from deadbench.suite.storage import read_file, refusal

_MOST_BYTES = 16_000_000  # of what a person writes


class YamlError(ValueError):
    """A file that is not there, or no YAML; one line that names it."""


# What YAML 1.1 has beside JSON's types: neither JSON nor Arrow holds it, and a date is text to YAML 1.2.
_NOT_JSON = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "binary", "set", "omap", "pairs")}
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_MAX_DEPTH, _MAX_BITS = 40, 1024
_MAX_VALUES = 200_000  # as written, and with aliases of aliases, which make many of few; the parser needs 2 kB for each
_TOO_MANY = f"more than {_MAX_VALUES:,} values"


class UniqueKeyLoader(_SafeLoader):
    """YAML of JSON's types that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping of distinct keys."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                problem = "a list or mapping as a key"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {plain(repr(key))} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """A value as it is written; of millions of digits, or of as many sixties, a number would be hours in making."""
        if node.tag in _NUMBERS and len(node.value) > _MAX_BITS:
            raise yaml.MarkedYAMLError(
                problem=f"a number of more than {_MAX_BITS} digits", problem_mark=node.start_mark
            )
        return super().construct_scalar(node)


UniqueKeyLoader.yaml_constructors = {
    tag: constructor for tag, constructor in _SafeLoader.yaml_constructors.items() if tag not in _NOT_JSON
}
UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in _NOT_JSON]
    for first, resolvers in _SafeLoader.yaml_implicit_resolvers.items()
}
# As in YAML 1.2 and JSON, from which configurations are pasted; YAML 1.1 takes 1e-12 for text.
UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,3}$"), list("-+0123456789")
)


def parse_yaml(raw: bytes, called: str) -> Any:
    """What is written in the YAML that messages call `called`.

    Raises:
        YamlError: it is not UTF-8, not YAML, or gives a key twice.
    """
    try:
        text = raw.decode("utf-8")
        _check_events(text)
        found = yaml.load(text, Loader=UniqueKeyLoader)
        _check_size(found)
        return found
    except RecursionError as error:
        raise YamlError(f"{called}: not YAML (nested too deeply)") from error
    except Exception as error:  # whatever values that are none of their tag's make the constructors raise
        problem, mark = getattr(error, "problem", None) or first_line(error), getattr(error, "problem_mark", None)
        raise YamlError(f"{called}: not YAML ({f'line {mark.line + 1}: ' if mark else ''}{plain(problem)})") from error


def load_yaml(path: Path) -> Any:
    """What is written in a YAML file.

    Raises:
        YamlError: it cannot be opened, is not UTF-8, not YAML, or gives a key twice.
    """
    try:
        raw = read_file(path, _MOST_BYTES)
        raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise YamlError(f"{path}: cannot be read ({refusal(error)})") from error
    return parse_yaml(raw, str(path))


def _check_events(text: str) -> None:
    """Raise for what is written too deep or too long to be composed.

    libyaml composes what is nested by calling itself, and would end the process where its stack ends.
    """
    depth = num_values = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        num_values += isinstance(event, yaml.NodeEvent)
        if depth > _MAX_DEPTH:
            raise RecursionError
        if num_values > _MAX_VALUES:
            raise ValueError(_TOO_MANY)


def _check_size(found: Any) -> None:
    """Raise RecursionError for what is nested without end, in itself or by aliases of aliases."""
    level: list[Any] = [[found]]
    count = 0
    for _ in range(_MAX_DEPTH):
        inner = [each for held in level for each in (held.values() if isinstance(held, dict) else held)]
        level = [each for each in inner if _holds(each)]
        count += len(inner)
        if any(isinstance(each, int) and each.bit_length() > _MAX_BITS for each in inner):
            raise ValueError(f"a number of more than {_MAX_BITS} bits")
        if not level:
            return
        if count > _MAX_VALUES:
            raise ValueError(_TOO_MANY)
    raise RecursionError


def _holds(value: Any) -> bool:
    return isinstance(value, (dict, list))
