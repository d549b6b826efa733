"""Files behind HTTP, read by byte ranges: a Hub repository at a revision, or a folder on any web server.

A server that ignores `Range` is never allowed to send a whole checkpoint. How a request is made: `http_requests`.
"""

import concurrent.futures
import contextlib
import json
import re
import threading
import urllib.parse
from pathlib import Path

import httpx2

from deadbench.suite.checkpoints.formats.table import FORMATS
from deadbench.suite.checkpoints.http_requests import CutOffError, Requests, body_of, client, total
from deadbench.suite.errors import CheckpointError
from deadbench.suite.secrets import scrubbed

# What a web server without listings is asked for.
KNOWN_FILES = (
    "config.json", *(name for each in FORMATS for name in (each.index, each.file) if name), "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model",
    "spiece.model", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
CONCURRENT_REQUESTS = 8

_FIRST_BYTES = 16_384  # asked for together with a file's size: a configuration, or the head of a header, in one request
_SMALL_BYTES = 16_000_000  # as far as a server that ignores Range is read from a file's start


class HttpFolder:
    """The files below one URL.

    Attributes:
        commit: the Hub's commit of what is read, once the files are listed; None elsewhere.
        bytes_read: bytes of file content received so far.
        lists: whether the server tells its files' names; elsewhere each known name is asked for.
    """

    lists = False

    def __init__(self, source: str, url: str, requests: Requests | None = None):
        """Open the folder at `url`, whose query goes to every file; `source` is what the user called it."""
        address, _, self._query = url.partition("?")
        self.source, self.url = scrubbed(source), address.rstrip("/")
        self.commit: str | None = None
        self.bytes_read = 0
        self._requests = requests or Requests(url, client())
        self._heads: dict[str, tuple[int, bytes, str]] = {}  # size, first bytes and ETag of the files seen
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Names of the files, of those that a checkpoint can have."""
        with concurrent.futures.ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            there = pool.map(self._exists, KNOWN_FILES)
            names = [name for name, found in zip(KNOWN_FILES, there, strict=True) if found]
        first = next((each for each in FORMATS if each.file in names or each.index in names), None)
        if first and first.index and first.file not in names:  # shards have no names but those that the index tells
            index = self.read(first.index)
            shards: set[object] = set()
            with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):  # told by who reads it
                shards = set(json.loads(index)["weight_map"].values())
            plain = sorted(shard for shard in shards if isinstance(shard, str) and "/" not in shard)
            with concurrent.futures.ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
                names += [n for n, found in zip(plain, pool.map(self._exists, plain), strict=True) if found]
        return names

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._head(name)[0]

    def stamp(self, name: str) -> str:
        """What changes when the file does: its ETag, or the time of its last change."""
        return self._head(name)[2]

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` (the end of the file for None)."""
        size, first, _ = self._head(name)
        end = size if end is None else min(end, size)
        if end <= len(first):
            return first[start:end]
        return first[start:] + self._request(name, max(start, len(first)), end)[0]

    def download(self, name: str, target: Path) -> None:
        """Complete `target` to the whole file: what is there of it is not asked for again."""

        def missing() -> dict[str, str]:
            there = target.stat().st_size if target.exists() else 0
            return {"Range": f"bytes={there}-"} if there else {}

        def write(answer: httpx2.Response) -> None:
            if answer.status_code == 416:  # all of it is there
                return
            resumed = answer.status_code == 206
            if resumed:
                self._ranged(answer, name, target.stat().st_size)
            expected, received = answer.headers.get("Content-Length"), 0
            with target.open("ab" if resumed else "wb") as file:
                for piece in answer.iter_raw():
                    file.write(piece)
                    received += len(piece)
            if expected is not None and received != int(expected):
                raise CutOffError(f"{received} of {expected} bytes")
            self._count(received)

        self._requests.ask(self._address(name), self._called(name), missing, write)

    def has(self, name: str) -> bool:
        """Whether there is such a file; one request, and none where it has been asked for."""
        return self._exists(name)

    def _address(self, name: str) -> str:
        return f"{self.url}/{urllib.parse.quote(name)}" + (f"?{self._query}" if self._query else "")

    def _exists(self, name: str) -> bool:
        try:
            self._head(name)
        except FileNotFoundError:
            return False
        return True

    def _head(self, name: str) -> tuple[int, bytes, str]:
        """Size, first bytes and stamp of a file, in one request."""
        if name not in self._heads:
            data, size, stamp = self._request(name, 0, _FIRST_BYTES)
            self._heads[name] = (size, data, stamp)
        return self._heads[name]

    def _request(self, name: str, start: int, end: int) -> tuple[bytes, int, str]:
        """Bytes `start` to `end` of a file or as many as it has, its size and stamp."""

        def take(answer: httpx2.Response) -> tuple[bytes, int, str]:
            stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            if answer.status_code == 416:  # nothing there: an empty file, or one that is shorter than it was
                return b"", total(answer.headers.get("Content-Range")) or 0, stamp
            if answer.status_code == 206:
                size, first = self._ranged(answer, name, start), start
            else:
                size, first = self._unranged(answer, name, end), 0
            wanted = max(0, min(end, size) - first)
            data = body_of(answer, wanted)
            self._count(len(data))
            if len(data) < wanted:
                raise CutOffError(f"{len(data)} of {wanted} bytes")
            return data[start - first :], size, stamp

        wanted_range = {"Range": f"bytes={start}-{end - 1}"}
        return self._requests.ask(self._address(name), self._called(name), lambda: wanted_range, take)

    def _count(self, received: int) -> None:
        with self._lock:
            self.bytes_read += received

    def _ranged(self, answer: httpx2.Response, name: str, start: int) -> int:
        """Size of the file, from a 206 answer that is what was asked for."""
        told = answer.headers.get("Content-Range", "")
        size = total(told)
        if size is None or not re.match(rf"bytes {start}-", told):
            raise CheckpointError(f"{self._called(name)}: the server answers with another range ({told!r})")
        return size

    def _unranged(self, answer: httpx2.Response, name: str, end: int) -> int:
        """Size of the file, from a 200 answer that starts at its first byte whatever was asked for."""
        told = answer.headers.get("Content-Length", "")
        if not told.isdigit():
            raise CheckpointError(
                f"{self._called(name)}: the server ignores Range requests and tells no length; "
                "serve the checkpoint with ranges"
            )
        if min(end, int(told)) > _SMALL_BYTES:
            raise CheckpointError(
                f"{self._called(name)}: the server ignores Range requests, so {int(told):,} bytes would be downloaded "
                "for a few; serve the checkpoint with ranges, or download it and name the folder"
            )
        return int(told)

    def _called(self, name: str) -> str:
        return f"{self.source}: {name}"
