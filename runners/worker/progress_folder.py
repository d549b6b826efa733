"""Where running reads save what they have, in the result set: what the driver must know of it, without torch."""

import contextlib
import hashlib
import json
from pathlib import Path

from deadbench.runners.jobs.job import ReadJob
from deadbench.suite.storage import is_url, open_place

FOLDER = "_progress"


def name_of(read: ReadJob) -> str:
    """How the files of a read begin."""
    return hashlib.sha256(json.dumps(read.identity()).encode()).hexdigest()[:24]


def absolute(location: str) -> str:
    """A result set's place as every process of this machine understands it."""
    return location.rstrip("/") if is_url(location) else str(Path(location).absolute())


def remove_checkpoints(location: str, *reads: ReadJob) -> None:
    """Take away what is left of `reads` in the result set at `location`."""
    folder, names = f"{absolute(location)}/{FOLDER}", tuple(map(name_of, reads))
    with contextlib.suppress(Exception):  # whatever the place's library comes up with: the read itself is stored
        fs, _ = open_place(folder)
        for path in fs.ls(folder, detail=False) if fs.exists(folder) else ():
            if path.rsplit("/", 1)[-1].startswith(names):
                fs.rm_file(path)
