"""Checkpoints on this node's disk: each comes once, whatever number of processes want it, and a cut download goes on.

One process downloads while the others wait. What keeps them apart is a lease: a file made exclusively and refreshed by
its holder, which holds on shared file systems whose `flock` does nothing, and passes on when its holder dies.
"""

import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from deadbench.suite.errors import CheckpointError
from deadbench.suite.secrets import shown_place
from deadbench.suite.storage import refusal

LEASE_SECONDS = 30.0  # after which a holder that has gone is succeeded; all processes must agree
_POLL_SECONDS = 0.2


class Source(Protocol):
    """Where files come from; implemented by the folders of `suite/checkpoints/checkpoint.py`."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def download(self, name: str, target: Path) -> None:
        """Complete `target`, of which a part may be there, to the whole file."""


def cache_folder() -> Path:
    """Where checkpoints from URLs are kept: DEADBENCH_CACHE, else below the user's cache folder."""
    told = os.environ.get("DEADBENCH_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(told).expanduser() if told else home / "deadbench" / "checkpoints"


def fetch_once(source: Source, called: str, fingerprint: str, names: list[str]) -> Path:
    """The folder with the files `names` of `source`; downloaded unless they are there.

    Args:
        source: where the files come from.
        called: what the user called it; with `fingerprint` it names the folder.
        fingerprint: changes when the files do.
        names: of the files.

    Raises:
        CheckpointError: the disk is too small, a file is not what it was said to be, or another user has been there.
    """
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", shown_place(called))[-60:].strip("-")
    key = hashlib.sha256(f"{called}\n{fingerprint}\n{sorted(names)}".encode()).hexdigest()[:16]
    place = cache_folder() / f"{readable}-{key}"
    folder, complete = place / "checkpoint", place / "complete"
    try:
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)  # one that is there may be shared
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o775)
        _check_ours(place)
        folder.mkdir(mode=0o775, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{place}: no place for the checkpoint ({refusal(error)}); set DEADBENCH_CACHE"
        ) from error
    if not complete.exists():
        with lease(place / "lock") as check:
            if not complete.exists():
                _download(source, called, folder, names, check)
                complete.touch()
    return folder


def _check_ours(place: Path) -> None:
    """Raise CheckpointError where a checkpoint lies in a cache that all may write to and is there by another user.

    What a group shares, or a volume that is mounted for all, may have many writers; a stranger's weights, or a link to
    where they lie, are nobody's checkpoint.
    """
    if not place.parent.stat().st_mode & stat.S_IWOTH:
        return
    there = place.lstat()
    ours = there.st_uid in (os.getuid(), 0) and not there.st_mode & stat.S_IWOTH
    if not (ours and stat.S_ISDIR(there.st_mode)):
        raise CheckpointError(
            f"{place}: another user of this machine put it into a cache that all may write to; remove it, or set "
            "DEADBENCH_CACHE to a folder of your own"
        )


class _Check(Protocol):
    def __call__(self) -> None: ...


@contextlib.contextmanager
def lease(path: Path) -> Iterator[_Check]:
    """Be the only one; waits for others. Gives what raises CheckpointError if another has taken over meanwhile."""
    from filelock import SoftFileLease

    path.parent.mkdir(parents=True, exist_ok=True)
    held = SoftFileLease(path, lease_duration=LEASE_SECONDS, poll_interval=_POLL_SECONDS)

    def check() -> None:
        if held.compromise is not None:
            raise CheckpointError(f"{path}: this process stood still and another took over; run again")

    with held:
        yield check


def _download(source: Source, called: str, folder: Path, names: list[str], check: _Check) -> None:
    left = {name: source.size(name) for name in names if not (folder / name).exists()}
    parts = {name: folder / f"{name}.part" for name in left}
    missing = sum(left.values()) - sum(part.stat().st_size for part in parts.values() if part.exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise CheckpointError(
            f"{shown_place(called)}: {missing / 1e9:.1f} GB to download and {free / 1e9:.1f} GB free in "
            f"{cache_folder()}; make room, or set DEADBENCH_CACHE to another disk"
        )
    for name, part in parts.items():
        part.parent.mkdir(parents=True, exist_ok=True)
        source.download(name, part)
        check()
        if part.stat().st_size != left[name]:
            part.unlink()
            raise CheckpointError(f"{shown_place(called)}: {name} changed while it was downloaded; run again")
        part.replace(folder / name)
