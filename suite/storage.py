"""Places that are read from or written to, any that fsspec opens; files are written whole or not at all.

A location is a URL if it begins with `SCHEME://`, or with the names of file systems that stand before the URL of
another, as in `simplecache::s3://bucket/run`, and no file or folder here begins so. All else is a path of this machine,
with whatever colons; and a URL is a chain only where its scheme is of a file system that lies in another place.
"""

import contextlib
import errno
import glob
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import fsspec

from deadbench.suite.errors import message
from deadbench.suite.http_session import timed_session
from deadbench.suite.s3_session import s3_options

REFERENCE = (
    "reference"  # as RESULTS: what comes with deadbench, the paper's models at their own size and real checkpoints
)
# The extra that brings the library for a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "abfs": "azure", "abfss": "azure", "az": "azure"}

_PIECE_BYTES = 2**22
_OLD_SECONDS = 86_400.0  # of a file that was on its way when its writer was killed
# File systems that lie in another place, which follows behind `::`.
_WITHIN = {"blockcache", "cached", "dir", "filecache", "libarchive", "reference", "simplecache", "tar", "zip"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # one letter is a drive
_CHAIN = re.compile(r"([a-z]+)::(?:[a-z]+::)*[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(location: str) -> bool:
    """Whether a location is a URL, else a path of this machine."""
    chain = _CHAIN.match(location)
    return _URL.match(location) is not None or (
        chain is not None and chain[1] in _WITHIN and not os.path.lexists(location.partition("/")[0])
    )


def is_hidden(path: str) -> bool:
    """Whether a file or folder is nobody's data: its name begins with a dot, as macOS's `._NAME` beside NAME does."""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return name.startswith(".") and name.strip(".") != ""


def open_place(location: str) -> tuple[Any, str]:
    """The file system of a path or URI, and the path on it.

    Raises:
        ImportError, ValueError: no such protocol, or its library is not installed; one line that says what to install.
    """
    if not is_url(location):
        return fsspec.filesystem("file"), str(Path(os.path.expanduser(location)).absolute())
    url = _URL.match(location)
    protocol = url[1] if url else location.partition("://")[0]
    inner = {part.partition("://")[0] for part in location.split("::")}
    try:
        if protocol in _WITHIN or not url:
            fs, root = fsspec.core.url_to_fs(location, **{each: own for each in inner if (own := _own_options(each))})
        else:
            there = fsspec.get_filesystem_class(protocol)
            fs = fsspec.filesystem(protocol, **there._get_kwargs_from_urls(location), **_own_options(protocol))
            root = there._strip_protocol(location)
    except ImportError as error:
        protocol = next((each for each in (protocol, *sorted(inner)) if each in _EXTRAS), "")
        if not protocol:
            raise
        raise ImportError(f"{protocol}:// needs a library: pip install 'deadbench[{_EXTRAS[protocol]}]'") from error
    return fs, root.rstrip("/") or "/"


def _own_options(protocol: str) -> dict[str, Any]:
    """What a file system of this protocol is made with, so that a server that is silent or trickles has its time."""
    if protocol in ("http", "https"):
        return {"get_client": timed_session}
    if protocol in ("s3", "s3a"):
        return s3_options()
    return {}


def is_local(fs: Any) -> bool:
    """Whether a file system is this machine's own."""
    return "file" in (fs.protocol, *fs.protocol)


def refusal(error: BaseException) -> str:
    """What a file system says, in a few words and without secrets."""
    known = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else ""
    return server_failure(error) or known or message(error)


def server_failure(error: BaseException) -> str | None:
    """What a store's server says where it limits requests or fails, of which s3fs makes EBUSY and EIO; else None."""
    answer = getattr(error.__cause__, "response", None)
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    if isinstance(status, int) and (status == 429 or status >= 500):
        return f"the server limits requests or fails (HTTP {status}); try again later"
    return None


def read_file(path: Path, most_bytes: int) -> bytes:
    """All of a file of this machine that a person names: neither waited for nor read without an end.

    Raises:
        OSError: it cannot be opened, is a folder, a pipe, a socket or a device, or has more than `most_bytes`.
    """
    return b"".join(file_pieces(path, most_bytes))


def file_pieces(path: Path, most_bytes: int, *, cut: bool = False) -> Iterator[bytes]:
    """The same in pieces, of which none need be held; what is too large is refused before the first where it says so.

    Where it is `cut`, its first `most_bytes` are all.

    Raises:
        OSError: as `read_file` does.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        told = os.fstat(file.fileno())
        if not stat.S_ISREG(told.st_mode):
            raise OSError("not a regular file")
        left = most_bytes - (told.st_size if told.st_size > most_bytes and not cut else 0)
        further = 0 if cut else 1
        while left >= 0 and (piece := file.read(min(_PIECE_BYTES, left + further))):  # some say nothing of their size
            left -= len(piece)
            if left >= 0:
                yield piece
    if left < 0:
        raise OSError(f"more than {most_bytes:,} bytes")


def renames(fs: Any) -> bool:
    """Whether a file system renames files; an object store copies them."""
    return is_local(fs) or type(fs).mv is not fsspec.AbstractFileSystem.mv


def write_whole(path: str | Path, data: bytes, fs: Any = None, aside: str | None = None) -> None:
    """Write `data` to `path` of `fs` (None: of this machine) whole or not at all: the old file stays, or there is none.

    Where files are renamed it is written to `aside` on the same file system (None: beside `path`), flushed to the disk
    and renamed into place; a link stays a link, and a device or a pipe is written into. An object store gets one write,
    published when it has all of it.

    Raises:
        OSError, or what the library of `fs` raises: no such folder, the disk is full or gone, or the store refuses. Of
            this machine's, its `filename` is `path`: what a full disk refuses has none by itself.
    """
    fs = fs or fsspec.filesystem("file")
    if not renames(fs):
        fs.pipe_file(str(path), data)
        return
    try:
        _write_where_renamed(path, data, fs, aside)
    except OSError as error:
        if error.errno is None or not is_local(fs):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_where_renamed(path: str | Path, data: bytes, fs: Any, aside: str | None) -> None:
    if is_local(fs) and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        _write_into(path, data)
        return
    final = os.path.realpath(path) if is_local(fs) else str(path)
    folder, _, name = final.rpartition("/")
    if aside is None:
        aside = f"{folder}/.{name}-{uuid.uuid4().hex[:8]}"
        if is_local(fs):
            sweep(Path(folder or "/").glob(f".{glob.escape(name)}-{'[0-9a-f]' * 8}"))
    with written_aside(aside, fs) as file:
        file.write(data)
    put_in_place(aside, final, fs)


def _write_into(path: str | Path, data: bytes) -> None:
    """Write to what is no file, such as /dev/null, in whose place a file would be everybody's harm."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # a pipe that nobody reads is refused, not waited for
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def sweep(paths: Iterable[Path]) -> None:
    """Remove those of the files that a writer who was killed left on their way; one that lives writes for seconds."""
    for path in paths:
        with contextlib.suppress(OSError):
            facts = path.lstat()
            if stat.S_ISREG(facts.st_mode) and time.time() - facts.st_mtime > _OLD_SECONDS:
                path.unlink()


def sweep_folders(paths: Iterable[Path]) -> None:
    """The same of folders, which have to be named as no person names one."""
    for path in paths:
        with contextlib.suppress(OSError):
            facts = path.lstat()
            if stat.S_ISDIR(facts.st_mode) and time.time() - facts.st_mtime > _OLD_SECONDS:
                shutil.rmtree(path)


def can_create_new(fs: Any) -> bool:
    """Whether a file system says that it can make a file exclusively; on the Hub each would be a commit."""
    if is_local(fs):
        return True
    own = getattr(type(fs), "_pipe_file", None) or type(fs).pipe_file
    known = own is not fsspec.AbstractFileSystem.pipe_file and "mode" in signature(own).parameters
    return known and "hf" not in (fs.protocol, *fs.protocol)


def create_new(path: str, data: bytes, fs: Any) -> None:
    """Make the file `path` of `fs`, of several who try it at once only one; where `can_create_new`.

    Raises:
        FileExistsError, or what the library of `fs` raises: it is there.
        OSError: it cannot be made, and is not there.
    """
    if not is_local(fs):
        fs.pipe_file(path, data, mode="create")
        return
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb", buffering=0) as file:
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        except BaseException:  # a full disk has room for a name
            _remove(path, fs)
            raise


@contextlib.contextmanager
def written_aside(aside: str, fs: Any) -> Iterator[Any]:
    """A new file `aside`, open for writing: on the disk when the block is over, gone when anything fails."""
    try:
        with fs.open(aside, "wb") as file:
            yield file
            file.flush()
            if is_local(fs):
                os.fsync(file.fileno())
    except BaseException:
        _remove(aside, fs)
        raise


def put_in_place(aside: str, final: str, fs: Any) -> None:
    """Rename a file that is whole; where that fails it is gone."""
    try:
        if not is_local(fs):
            fs.mv(aside, final)
            return
        os.replace(aside, final)
    except BaseException:
        _remove(aside, fs)
        raise
    descriptor = os.open(os.path.dirname(final), os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name itself
    finally:
        os.close(descriptor)


def _remove(path: str, fs: Any) -> None:
    with contextlib.suppress(Exception):  # the first error is the one to tell
        fs.rm_file(path)
