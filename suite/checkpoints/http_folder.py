"""Files behind HTTP, read by byte ranges: a Hub repository at a revision, or a folder on any web server.

A server that ignores `Range` is never allowed to send a whole checkpoint, and what it announced is all that is taken.
A file stays the one that was first asked for: by If-Match, and by its ETag, time and size in every answer. How requests
are made: `http_requests`.
"""

import concurrent.futures
import contextlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import httpx2

from deadbench.suite.checkpoints.formats.table import FORMATS
from deadbench.suite.checkpoints.http_requests import CutOffError, Requests, total
from deadbench.suite.checkpoints.no_weights import ADAPTER_FILE
from deadbench.suite.checkpoints.rate_limits import number
from deadbench.suite.errors import ChangedError, CheckpointError
from deadbench.suite.secrets import shown_place

# What a web server without listings is asked for.
KNOWN_FILES = (
    "config.json", *(name for each in FORMATS for name in (each.index, each.file) if name), "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model",
    "spiece.model", "preprocessor_config.json", "processor_config.json", ADAPTER_FILE, "adapter_model.safetensors",
    "adapter_model.bin",
)  # fmt: skip
CONCURRENT_REQUESTS = 8

_FIRST_BYTES = 16_384  # asked for together with a file's size: a configuration, or the head of a header, in one request
_SMALL_BYTES = 16_000_000  # as far as a server that ignores Range is read from a file's start


@dataclass(frozen=True)
class _Version:
    """What tells a file from one that takes its place: what a server says of it, "" where it does not."""

    size: int
    etag: str
    modified: str

    @classmethod
    def of(cls, answer: httpx2.Response, size: int) -> "_Version":
        return cls(size, answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", ""))

    def difference(self, other: "_Version") -> str | None:
        """What both tell and tell otherwise."""
        for what, mine, its in (
            ("size", self.size, other.size), ("ETag", self.etag, other.etag), ("time", self.modified, other.modified),
        ):  # fmt: skip
            if mine != its and mine != "" and its != "":
                return f"{what} was {mine} and is {its}"
        return None

    def comparable(self, other: "_Version") -> bool:
        """Whether both tell one thing, ETag or time, or neither tells any; of nothing (416) there is none to tell."""
        told = (self.etag, other.etag), (self.modified, other.modified)
        return self.size == 0 or any(all(pair) for pair in told) or not any(any(pair) for pair in told)

    def wanted(self) -> dict[str, str]:
        """The condition of a request for this one; a weak ETag is none, since If-Match compares strongly."""
        return {"If-Match": self.etag} if self.etag.startswith('"') else {}


class HttpFolder:
    """The files below one URL.

    Attributes:
        commit: the Hub's commit of what is read, once the files are listed; None elsewhere.
        bytes_read: bytes of file content received so far.
        lists: whether the server tells its files' names; elsewhere each known name is asked for.
    """

    lists = False
    _pinned = False  # the address itself names a version

    def __init__(self, source: str, url: str, requests: Requests | None = None):
        """Open the folder at `url`, whose query goes to every file; `source` is what the user called it."""
        address, _, self._query = url.partition("?")
        self.source, self.url = shown_place(source), address.rstrip("/")
        self.commit: str | None = None
        self.bytes_read = 0
        self._requests = requests or Requests(url)
        self._first: dict[str, bytes] = {}  # bytes of the files seen
        self._versions: dict[str, _Version] = {}  # of the same
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
                for start in range(0, len(plain), CONCURRENT_REQUESTS):
                    asked = plain[start : start + CONCURRENT_REQUESTS]
                    answers = list(pool.map(self._exists, asked))
                    names += [name for name, found in zip(asked, answers, strict=True) if found]
                    if not all(answers):  # one is missing, and an index may name a million
                        break
        return names

    def size(self, name: str) -> int:
        """Bytes of a file."""
        self._head(name)
        return self._versions[name].size

    def stamp(self, name: str) -> str:
        """What changes when the file does: its ETag, or the time of its last change."""
        self._head(name)
        return self._versions[name].etag or self._versions[name].modified

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` (the end of the file for None)."""
        first, size = self._head(name), self.size(name)
        end = size if end is None else min(end, size)
        if end <= len(first):
            return first[start:end]
        return first[start:] + self._request(name, max(start, len(first)), end)

    def download(self, name: str, target: Path) -> None:
        """Complete `target` to the whole file: what is there of it is not asked for again.

        Raises:
            ChangedError: the file is another one than when it was first asked for; nothing of it is kept.
        """
        size = self.size(name)  # of the file that is wanted, whatever comes

        def missing() -> dict[str, str]:
            there = target.stat().st_size if target.exists() else 0
            return {"Range": f"bytes={there}-"} if there else {}

        def write(answer: httpx2.Response) -> None:
            if answer.status_code == 416:  # all of it is there
                self._hold(name, answer, total(answer.headers.get("Content-Range")) or size)
                return
            resumed = answer.status_code == 206
            start = target.stat().st_size if resumed else 0
            whole = self._ranged(answer, name, start) if resumed else _length(answer)
            self._hold(name, answer, size if whole is None else whole)
            received = 0
            with target.open("ab" if resumed else "wb") as file:
                for piece in self._requests.pieces(answer):
                    file.write(piece[: size - start - received])
                    received += len(piece)
                    if start + received > size:
                        raise ChangedError(f"{self._called(name)}: more is sent than the {size:,} bytes announced")
            if start + received < size:
                raise CutOffError(f"{start + received} of {size} bytes")
            self._count(received)

        try:
            self._requests.ask(
                self._address(name), self._called(name), lambda: self._condition(name) | missing(), write
            )
        except ChangedError:
            target.unlink(missing_ok=True)
            raise

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

    def _head(self, name: str) -> bytes:
        """First bytes of a file; with them comes what tells it from another version."""
        if name not in self._first:
            self._first[name] = self._request(name, 0, _FIRST_BYTES)
        return self._first[name]

    def _condition(self, name: str) -> dict[str, str]:
        """What makes a server refuse to answer with another version than the first."""
        return self._versions[name].wanted() if name in self._versions and not self._pinned else {}

    def _hold(self, name: str, answer: httpx2.Response, size: int) -> None:
        """Raise ChangedError where an answer is not of the version of the first answer, which this one may be."""
        version = _Version.of(answer, size)
        with self._lock:
            first = self._versions.setdefault(name, version)
        if difference := first.difference(version):
            raise ChangedError(f"{self._called(name)}: changed while it was read (its {difference}); run again")
        if not self._pinned and answer.status_code != 416 and not first.comparable(version):
            raise ChangedError(
                f"{self._called(name)}: the server tells ETag or time of some answers and not of others, which may be "
                "of two versions; run again"
            )

    def _request(self, name: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a file or as many as it has."""

        def take(answer: httpx2.Response) -> bytes:
            if answer.status_code == 416:  # nothing there: an empty file, or one that is shorter than it was
                self._hold(name, answer, total(answer.headers.get("Content-Range")) or 0)
                return b""
            if answer.status_code == 206:
                size, first = self._ranged(answer, name, start), start
            else:
                size, first = self._unranged(answer, name, end), 0
            self._hold(name, answer, size)
            wanted = max(0, min(end, size) - first)
            data = self._requests.body_of(answer, wanted)
            self._count(len(data))
            if len(data) < wanted:
                raise CutOffError(f"{len(data)} of {wanted} bytes")
            return data[start - first :]

        wanted_range = {"Range": f"bytes={start}-{end - 1}"}
        return self._requests.ask(
            self._address(name), self._called(name), lambda: self._condition(name) | wanted_range, take
        )

    def _count(self, received: int) -> None:
        with self._lock:
            self.bytes_read += received

    def _ranged(self, answer: httpx2.Response, name: str, start: int) -> int:
        """Size of the file, from a 206 answer that is what was asked for."""
        told = answer.headers.get("Content-Range", "")
        size = total(told)
        match = re.match(r"bytes ([0-9]{1,18})-([0-9]{1,18})/", told)
        first, last = (int(match[1]), int(match[2])) if match else (-1, -1)
        if size is None or first != start or _length(answer) not in (None, last - first + 1):
            raise CheckpointError(f"{self._called(name)}: the server answers with another range ({told!r})")
        return size

    def _unranged(self, answer: httpx2.Response, name: str, end: int) -> int:
        """Size of the file, from a 200 answer that starts at its first byte whatever was asked for."""
        length = _length(answer)
        if length is None:
            raise CheckpointError(
                f"{self._called(name)}: the server ignores Range requests and tells no length; "
                "serve the checkpoint with ranges"
            )
        if min(end, length) > _SMALL_BYTES:
            raise CheckpointError(
                f"{self._called(name)}: the server ignores Range requests, so {length:,} bytes would be downloaded "
                "for a few; serve the checkpoint with ranges, or download it and name the folder"
            )
        return length

    def _called(self, name: str) -> str:
        return f"{self.source}: {name}"


def _length(answer: httpx2.Response) -> int | None:
    """Bytes of an answer's body, as its head tells; None where it does not."""
    return number(answer.headers.get("Content-Length", ""))
