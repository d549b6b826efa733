"""The configuration files of other libraries as the config.json of the same model in transformers."""

from typing import Any

from deadbench.suite.checkpoints.dialects import litgpt, open_clip
from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.no_weights import is_pointer, pointer
from deadbench.suite.checkpoints.strict_json import MAX_JSON_BYTES, parse_object
from deadbench.suite.errors import CheckpointError
from deadbench.suite.yaml_file import YamlError, parse_yaml

_MAX_YAML_BYTES = 1_000_000
_NOT_CLIP = (
    "one of its towers is not open_clip's own, or has convolutions or layer scales, which transformers' CLIP does not; "
    "give that tower by the library that has it, or --config CONFIG"
)


def other_config(files: Files, source: str) -> dict[str, Any] | None:
    """What litGPT's or open_clip's own file says; None where there is none.

    Raises:
        CheckpointError: a file that is none, or of an architecture that transformers does not have.
    """
    if files.has(litgpt.CONFIG_FILE):
        return _litgpt(files, f"{source}: {litgpt.CONFIG_FILE}")
    if files.has(open_clip.CONFIG_FILE):
        found = open_clip.config_of(read_object(files, source, open_clip.CONFIG_FILE))
        if found is None:
            raise CheckpointError(f"{source}: {open_clip.CONFIG_FILE}: {_NOT_CLIP}")
        return found
    return None


def read_object(files: Files, source: str, name: str) -> dict[str, Any]:
    """The contents of a JSON file of the checkpoint `source`.

    Raises:
        CheckpointError: too large, no JSON, or no object.
    """
    if files.size(name) > MAX_JSON_BYTES:
        raise CheckpointError(f"{source}: {name} is larger than {MAX_JSON_BYTES} bytes")
    raw = files.read(name)
    if is_pointer(raw):
        raise pointer(files, name)
    return parse_object(raw, f"{source}: {name}")


def _litgpt(files: Files, called: str) -> dict[str, Any]:
    if files.size(litgpt.CONFIG_FILE) > _MAX_YAML_BYTES:
        raise CheckpointError(f"{called}: larger than {_MAX_YAML_BYTES} bytes; no settings of a model")
    try:
        found = litgpt.config_of(parse_yaml(files.read(litgpt.CONFIG_FILE), called))
    except YamlError as error:
        raise CheckpointError(str(error)) from error
    if found is None:
        raise CheckpointError(f"{called}: its fields are those of no architecture known here; give --config CONFIG")
    return found
