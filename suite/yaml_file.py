"""YAML that people write: a key given twice is refused, numbers are read as in YAML 1.2."""

import re
from pathlib import Path
from typing import Any

import yaml

from deadbench.suite.errors import first_line
from deadbench.suite.storage import read_file, refusal

_MOST_BYTES = 16_000_000  # of what a person writes


class YamlError(ValueError):
    """A file that is not there, or no YAML; one line that names it."""


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping of distinct keys."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# As in YAML 1.2 and JSON, from which configurations are pasted; YAML 1.1 takes 1e-12 for text.
UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,3}$"), list("-+0123456789")
)


def load_yaml(path: Path) -> Any:
    """What is written in a YAML file.

    Raises:
        YamlError: it cannot be opened, is not UTF-8, not YAML, or gives a key twice.
    """
    try:
        return yaml.load(read_file(path, _MOST_BYTES).decode("utf-8"), Loader=UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise YamlError(f"{path}: cannot be read ({refusal(error)})") from error
    except RecursionError as error:
        raise YamlError(f"{path}: not YAML (nested too deeply)") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that is none raises the latter
        problem, mark = getattr(error, "problem", None) or first_line(error), getattr(error, "problem_mark", None)
        raise YamlError(f"{path}: not YAML ({f'line {mark.line + 1}: ' if mark else ''}{problem})") from error
