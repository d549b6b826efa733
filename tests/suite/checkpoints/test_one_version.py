"""A file stays the one that was first asked for: wherever it is, its bytes are never those of two versions."""

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import boto3
import fsspec
import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.suite.checkpoints import http_requests
from deadbench.suite.checkpoints.download_cache import fetch_once
from deadbench.suite.checkpoints.fsspec_folder import FsspecFolder
from deadbench.suite.checkpoints.http_folder import HttpFolder
from deadbench.suite.errors import ChangedError
from tests.suite.checkpoints.servers import s3_server
from tests.suite.checkpoints.test_http_states import Body


class Changing:
    """A server of one file, of version 0 for its first `lasts` requests and of version 1 from then on.

    `says` is how it tells them apart; `heeds`, whether it heeds If-Match.
    """

    def __init__(self, sizes=(50_000, 50_000), says=("ETag",), heeds=False, lasts=1, cut=False, ranges=True):
        self.versions = [bytes([version]) * size for version, size in enumerate(sizes)]
        self.says, self.heeds, self.lasts, self.cut, self.ranges = says, heeds, lasts, cut, ranges
        self.requests = []

    def __call__(self, request):
        version = int(len(self.requests) >= self.lasts)
        self.requests.append(request)
        data, told = self.versions[version], {}
        if "ETag" in self.says:
            told["ETag"] = f'"{version}"'
        if "weak" in self.says:
            told["ETag"] = f'W/"{version}"'
        if "Last-Modified" in self.says:
            told["Last-Modified"] = f"Sat, 0{version + 1} Jan 2000 00:00:00 GMT"
        wanted = request.headers.get("If-Match")
        if self.heeds and wanted not in (None, told.get("ETag")):
            return httpx2.Response(412)
        start, _, end = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(start), min(int(end) + 1 if end else len(data), len(data))
        if "Range" not in request.headers or not self.ranges:
            body, status = data, 200
        elif start >= len(data):
            return httpx2.Response(416, headers=told | {"Content-Range": f"bytes */{len(data)}"})
        else:
            body, status = data[start:end], 206
            told["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        told["Content-Length"] = str(len(body))
        return httpx2.Response(status, headers=told, stream=Body(body[: len(body) // 2] if self.cut else body))


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(http_requests, "FIRST_WAIT_SECONDS", 0.0)

    def serve(server):
        client = httpx2.Client(transport=httpx2.MockTransport(server))
        monkeypatch.setattr(http_requests, "client", lambda public_only=False: client)
        return HttpFolder("http://host/m", "http://host/m")

    return serve


SAYS = st.sampled_from([("ETag",), ("weak",), ("Last-Modified",), ("ETag", "Last-Modified")])


@given(says=SAYS, heeds=st.booleans(), lasts=st.integers(1, 6), ranges=st.booleans(), cut=st.booleans(),
       reads=st.lists(st.tuples(st.integers(0, 49_000), st.integers(1, 40_000)), min_size=1, max_size=5))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_what_is_read_is_of_one_version(says, heeds, lasts, ranges, cut, reads):
    with pytest.MonkeyPatch.context() as patch:
        server = Changing(says=says, heeds=heeds, lasts=lasts, ranges=ranges)
        client = httpx2.Client(transport=httpx2.MockTransport(server))
        patch.setattr(http_requests, "client", lambda public_only=False: client)
        patch.setattr(http_requests, "FIRST_WAIT_SECONDS", 0.0)
        folder = HttpFolder("http://host/m", "http://host/m")
        for start, length in reads:
            try:
                got = folder.read("file", start, start + length)
            except ChangedError:
                assert len(server.requests) > lasts
            else:
                assert got == server.versions[0][start : start + length]
        server.cut = cut
        with TemporaryDirectory() as place:
            target = Path(place) / "file"
            try:
                folder.download("file", target)
            except ChangedError:
                assert not target.exists(), "nothing of two versions is kept"
            except http_requests.CheckpointError:
                assert cut
                assert set(target.read_bytes()) <= {0}
            else:
                assert target.read_bytes() == server.versions[0]


@pytest.mark.parametrize(
    ("says", "sizes", "named"),
    [
        (("ETag",), (50_000, 50_000), 'its ETag was "0" and is "1"'),
        (("Last-Modified",), (50_000, 50_000), "its time was Sat, 01 Jan 2000 00:00:00 GMT and is Sat, 02 Jan"),
        ((), (50_000, 50_001), "its size was 50000 and is 50001"),
    ],
    ids=["etag", "time", "size"],
)
def test_the_header_of_one_and_the_numbers_of_another_are_told(served, says, sizes, named):
    folder = served(Changing(sizes, says))
    assert folder.read("model.safetensors", 0, 8) == bytes(8)
    with pytest.raises(
        ChangedError, match=re.escape(f"http://host/m: model.safetensors: changed while it was read ({named}")
    ):
        folder.read("model.safetensors", 30_000, 40_000)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"ETag": '"0"'}, {}),
        ({}, {"ETag": '"1"'}),
        ({"ETag": '"0"'}, {"Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT"}),
        ({"Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT"}, {}),
    ],
)
def test_a_server_that_no_longer_tells_which_version_it_sends(served, first, then):
    told = [first, then]

    def server(request):
        start, end = (int(each) for each in request.headers["Range"].removeprefix("bytes=").split("-"))
        span = {"Content-Range": f"bytes {start}-{end}/50000", "Content-Length": str(end + 1 - start)}
        return httpx2.Response(206, headers=span | told.pop(0), stream=Body(bytes(end + 1 - start)))

    folder = served(server)
    assert folder.read("file", 0, 8) == bytes(8)
    with pytest.raises(ChangedError, match="file: the server tells ETag or time of some answers and not of others"):
        folder.read("file", 30_000, 40_000)


@pytest.mark.parametrize(
    "head",
    [
        {"Content-Range": "bytes 0-16383/50000", "Content-Length": "50000"},  # all of it, and called a part
        {"Content-Range": "bytes 0-/50000", "Content-Length": "16384"},
        {"Content-Range": "bytes 0-16383/" + "9" * 5000, "Content-Length": "16384"},
        {"Content-Range": "bytes 0-16383/\u0665\u0660", "Content-Length": "16384"},
        {"Content-Range": "items 0-16383/50000", "Content-Length": "16384"},
        {"Content-Length": "16384"},
    ],
)
def test_a_part_that_is_not_what_was_asked_for(served, head):
    raw = [(name.encode(), told.encode()) for name, told in head.items()]
    folder = served(lambda request: httpx2.Response(206, headers=raw, stream=Body(bytes(16_384))))
    with pytest.raises(http_requests.CheckpointError, match="file: the server answers with another range"):
        folder.read("file", 0, 8)


def test_a_server_that_heeds_the_condition_is_told_it(served):
    server = Changing(heeds=True)
    folder = served(server)
    folder.size("file")
    with pytest.raises(ChangedError, match=r"^http://host/m: file: changed while it was read; run again$"):
        folder.read("file")
    assert [request.headers.get("If-Match") for request in server.requests] == [None, '"0"']


def test_a_download_goes_on_with_the_file_that_it_began_with(served, tmp_path, monkeypatch):
    monkeypatch.setenv("DEADBENCH_CACHE", str(tmp_path))
    server = Changing(lasts=100)
    folder = served(server)
    assert folder.size("file") == 50_000
    server.cut = True
    with pytest.raises(http_requests.CheckpointError, match="cut off"):
        fetch_once(folder, "http://host/m", "0", ["file"])
    (part,) = tmp_path.glob("*/checkpoint/file.part")
    assert 0 < part.stat().st_size < 50_000
    again = served(Changing(lasts=1))  # the size is asked of version 0, the rest comes of version 1
    with pytest.raises(ChangedError):
        fetch_once(again, "http://host/m", "0", ["file"])
    assert list(tmp_path.glob("*/checkpoint/*")) == []


class Endless(httpx2.SyncByteStream):
    sent = 0

    def __iter__(self):
        while True:
            self.sent += 4096
            yield bytes(4096)


@pytest.mark.parametrize("length", [None, "183", "5000000"])
def test_nothing_is_written_past_what_was_announced(served, tmp_path, length):
    endless = Endless()

    def server(request):
        if "Range" in request.headers:
            told = {"Content-Range": "bytes 0-182/183", "Content-Length": "183"}
            return httpx2.Response(206, headers=told, stream=Body(bytes(183)))
        return httpx2.Response(200, headers={"Content-Length": length} if length else {}, stream=endless)

    folder = served(server)
    assert folder.size("file") == 183
    with pytest.raises(ChangedError, match="more is sent than the 183 bytes announced|its size was 183 and is 5000000"):
        folder.download("file", tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert endless.sent <= 2 * 4096


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request, tmp_path):
    """Where one file can be put, as (location, put)."""
    if request.param == "folder":
        yield str(tmp_path), lambda data: (tmp_path / "file").write_bytes(data)
    elif request.param == "memory":
        fs = fsspec.filesystem("memory")
        yield "memory://one-version", lambda data: fs.pipe_file("/one-version/file", data)
        fs.rm("/one-version", recursive=True)
    else:
        with s3_server():
            s3 = boto3.client("s3")
            s3.create_bucket(Bucket="models")
            yield (
                "s3://models/one-version",
                lambda data: s3.put_object(Bucket="models", Key="one-version/file", Body=data),
            )


def test_a_file_that_is_replaced_is_told_wherever_it_is(store, tmp_path):
    location, put = store
    put(bytes(5000))
    folder = FsspecFolder("m", location)
    assert folder.names() == ["file"]
    assert folder.read("file", 0, 8) == bytes(8)
    put(b"x" * 4000)
    with pytest.raises(ChangedError, match=r"^m: file: changed while it was read \(from 5,000 bytes of .*; run again$"):
        folder.read("file", 100, 200)
    with pytest.raises(ChangedError):
        folder.download("file", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert FsspecFolder("m", location).read("file", 0, 8) == b"x" * 8


def test_a_file_that_is_replaced_during_a_download_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(5000))
    folder = FsspecFolder("m", str(tmp_path))
    ranges = folder._fs.cat_ranges

    def replaced(*args, **kwargs):
        (tmp_path / "file").write_bytes(b"x" * 5000)
        os.utime(tmp_path / "file", (1, 1))  # clocks of some file systems are coarse
        return ranges(*args, **kwargs)

    monkeypatch.setattr(folder._fs, "cat_ranges", replaced)
    with pytest.raises(ChangedError):
        folder.download("file", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
