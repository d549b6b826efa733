"""Temporary folders of this process alone (mode 0700, no guessable name); what killed processes left is swept."""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "deadbench-"
_LOCK = "in-use"  # held by the process as long as it lives
_OLD_SECONDS = 86_400.0  # of single files, which nobody holds a lock on


class Scratch:
    """A folder that is gone when it is closed, when nothing refers to it, or by `sweep` when its process was killed.

    Attributes:
        path: of the folder.
    """

    def __init__(self, base: str | Path | None = None):
        """Make one, in the system's temporary folder unless told otherwise."""
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        # Locked before it has its name, so that no sweep finds it free.
        unnamed = self.path.parent / f"{_PREFIX}{uuid.uuid4().hex}"
        descriptor = os.open(unnamed, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.rename(unnamed, self.path / _LOCK)
        self._remove = weakref.finalize(self, _end, self.path, descriptor)

    def close(self) -> None:
        """Remove it with all that is in it."""
        self._remove()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exception: object) -> None:
        self.close()


def is_scratch(folder: Path) -> bool:
    """Whether a folder is one of these, of this user and in the hands of a process that lives; no download can be."""
    with contextlib.suppress(OSError), _in_use(folder) as held:
        return held and folder.name.startswith(_PREFIX) and folder.lstat().st_uid == os.getuid()
    return False


def sweep(base: str | Path | None = None) -> int:
    """Remove what killed processes of this user left in the temporary folder; how many things those were."""
    removed = 0
    for path in Path(base or tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            facts = path.lstat()
            if facts.st_uid != os.getuid():
                continue
            if stat.S_ISDIR(facts.st_mode):
                removed += _remove_if_free(path)
            elif stat.S_ISREG(facts.st_mode) and time.time() - facts.st_mtime > _OLD_SECONDS:
                path.unlink()
                removed += 1
    return removed


def _remove_if_free(folder: Path) -> bool:
    """Whether nobody held it, and it is gone; a folder without a lock is another's."""
    with _in_use(folder) as held:
        if not held:
            shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


@contextlib.contextmanager
def _in_use(folder: Path) -> Iterator[bool]:
    """Whether a living process holds the folder; where none does, this one holds it meanwhile.

    Raises:
        OSError: it has no lock.
    """
    descriptor = os.open(folder / _LOCK, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield True
        else:
            yield False
    finally:
        os.close(descriptor)


def _end(folder: Path, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
