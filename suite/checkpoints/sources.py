"""What a SOURCE names: a folder, a file, a repository of the Hub, a URL; settled once, the same for every process."""

import os
import re
from pathlib import Path

from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import is_url

_HUB = "hf://"
_FILES = (".safetensors", ".pt", ".pth", ".pth.tar", ".bin", ".ckpt", ".gguf")  # a SOURCE that is one file
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")


def locate(source: str, base: Path | None = None) -> str:
    """What a SOURCE is, as every process and node understands it: an absolute path, `hf://ID`, or as it is.

    `team/model` is a folder where there is one here, or below `base`, else a Hub id: who carries the answer along need
    not ask again where other folders are.
    """
    if not source.startswith(_HUB):
        try:
            for candidate in (Path(os.path.expanduser(source)), *([base / source] if base else [])):
                if candidate.is_dir() or (candidate.name.endswith(_FILES) and candidate.is_file()):
                    return str(candidate.absolute())
        except (OSError, ValueError):  # a name too long, a NUL in it
            return source
    return f"{_HUB}{source}" if is_hub_id(source) else source


def folder_and_file(place: str) -> tuple[str, str | None]:
    """The folder of a place, and which of its files is meant where that is one: here, or a URL that ends as one."""
    address, mark, query = place.partition("?") if is_url(place) else (place, "", "")
    folder, slash, name = address.rpartition("/")
    meant = name.endswith(_FILES) and (is_url(place) or (os.path.isabs(place) and not Path(place).is_dir()))
    return (f"{folder}{mark}{query}", name) if meant and slash else (place, None)


def is_file_of(place: str, name: str | None) -> bool:
    """Whether the checkpoint `name` of a series at `place` is one file; Lightning calls a folder `.ckpt` too."""
    return name is not None and name.endswith(_FILES) and not Path(place, name).is_dir()


def is_named_as_file(source: str) -> bool:
    """Whether a SOURCE is called as files of weights are."""
    return source.endswith(_FILES)


def is_hub_id(source: str) -> bool:
    """Whether a SOURCE has the form `org/name[@revision]`, be there a folder of that name or not."""
    return _HUB_ID.match(source) is not None and not is_named_as_file(source)


def is_source(name: str) -> bool:
    """Whether `name` is a folder or a file of weights here, a Hub id by its form, or a URL."""
    place = locate(name)
    return os.path.isabs(place) or place.startswith(_HUB) or is_url(place)


def identify(source: str, place: str | None = None) -> tuple[str, str | None]:
    """(model, revision) of a SOURCE, as rows name it: spellings of one checkpoint are one, and secrets are left out.

    Nothing is opened; `place` is what `locate` says of it.
    """
    hub_id = hub_id_of(place or locate(source))
    if hub_id:
        name, _, revision = hub_id.partition("@")
        return name, revision or "main"
    return shown_place(source).rstrip("/"), None


def hub_id_of(place: str) -> str | None:
    """`org/name[@revision]` of a place on the Hub."""
    hub_id = place.removeprefix(_HUB)
    return hub_id if place.startswith(_HUB) and is_hub_id(hub_id) else None
