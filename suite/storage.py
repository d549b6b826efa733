"""Places that are read from or written to: any that fsspec opens."""

import os
from pathlib import Path
from typing import Any

import fsspec

from deadbench.suite.errors import message

# The extra that brings the library for a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "abfs": "azure", "abfss": "azure", "az": "azure"}


def open_place(location: str) -> tuple[Any, str]:
    """The file system of a path or URI, and the path on it.

    Raises:
        ImportError, ValueError: no such protocol, or its library is not installed; one line that says what to install.
    """
    try:
        fs, root = fsspec.core.url_to_fs(location)
    except ImportError as error:
        protocol = location.partition("://")[0]
        if protocol not in _EXTRAS:
            raise
        raise ImportError(f"{protocol}:// needs a library: pip install 'deadbench[{_EXTRAS[protocol]}]'") from error
    return fs, root.rstrip("/") or "/"


def is_local(fs: Any) -> bool:
    """Whether a file system is this machine's own."""
    return "file" in (fs.protocol, *fs.protocol)


def refusal(error: BaseException) -> str:
    """What a file system says, in a few words and without secrets."""
    known = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else ""
    return known or message(error)


def write_local(final: Path, aside: Path, data: bytes) -> None:
    """Write `data` to `final` whole or not at all, by way of `aside` on the same file system."""
    for folder in (final.parent, aside.parent):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(final)
    finally:
        aside.unlink(missing_ok=True)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name itself
    finally:
        os.close(descriptor)
