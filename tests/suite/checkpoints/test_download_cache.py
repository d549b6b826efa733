"""One download a node: whoever else wants a checkpoint waits for it; what is cut off goes on; who dies is succeeded."""

import os
import shutil
import stat
import subprocess
import sys
import time
from collections import Counter

import pytest

from deadbench.suite.checkpoints import download_cache as node_cache
from deadbench.suite.checkpoints import http_requests
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.download_cache import cache_folder, fetch_once, lease
from deadbench.suite.errors import CheckpointError
from tests.conftest import ROOT, TINY_NEOX, save_tiny
from tests.suite.checkpoints.servers import misbehaving

# As on a file system whose flock does nothing.
NO_FLOCK = "import fcntl; fcntl.flock = lambda *_: None\n"
COPY = (
    NO_FLOCK + "import sys; from deadbench.suite.checkpoints.checkpoint import Checkpoint\n"
    "with Checkpoint(sys.argv[1]).local_copy() as folder: print(folder)"
)
HOLD = NO_FLOCK + (
    "import sys, time; from pathlib import Path; from deadbench.suite.checkpoints.download_cache import lease\n"
    "with lease(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("whole") / "m", TINY_NEOX | {"hidden_size": 64, "vocab_size": 4000})


@pytest.fixture
def server(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("DEADBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(http_requests, "FIRST_WAIT_SECONDS", 0.01)
    folder = tmp_path / "served"
    shutil.copytree(whole, folder)
    with misbehaving(folder) as running:
        yield running


def downloads(server):
    """How often each file was asked for as a whole, or to its end."""
    return Counter(name for name, asked in server.requests if asked is None or asked.endswith("-"))


@pytest.mark.subprocess
def test_many_processes_cause_one_download(server):
    command = [sys.executable, "-c", COPY, server.url]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    folders = {process.communicate(timeout=120)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert len(folders) == 1
    assert downloads(server) == dict.fromkeys(("config.json", "model.safetensors"), 1)
    with Checkpoint(server.url).local_copy() as copy:
        assert str(copy) in folders
        assert (copy / "model.safetensors").read_bytes() == (server.folder / "model.safetensors").read_bytes()
    assert downloads(server)["model.safetensors"] == 1


@pytest.mark.slow
def test_a_download_that_was_cut_off_goes_on(server, whole):
    data = (whole / "model.safetensors").read_bytes()
    with Checkpoint(server.url).local_copy() as copy:
        pass
    (copy.parent / "complete").unlink()
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.part").write_bytes(data[:100_000])
    server.requests.clear()
    with Checkpoint(server.url).local_copy() as copy:
        assert (copy / "model.safetensors").read_bytes() == data
    asked = [asked for name, asked in server.requests if name == "model.safetensors" and asked.endswith("-")]
    assert asked == ["bytes=100000-"]


def test_a_changed_checkpoint_is_another_copy(server):
    with Checkpoint(server.url).local_copy() as first:
        pass
    text = (server.folder / "config.json").read_text() + "\n"
    (server.folder / "config.json").write_text(text)
    with Checkpoint(server.url).local_copy() as second:
        assert second != first
        assert (second / "config.json").read_text() == text


def test_a_full_disk_is_told_before_the_download(server, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    copied = Checkpoint(server.url).local_copy()
    with pytest.raises(CheckpointError, match="GB to download and 0.0 GB free in .*DEADBENCH_CACHE"), copied:
        pass
    assert downloads(server) == {}


@pytest.mark.subprocess
def test_who_holds_the_lease_and_dies_is_succeeded(tmp_path):
    path = tmp_path / "x.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    waiter = subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    time.sleep(0.5)
    holder.kill()
    holder.communicate()
    assert waiter.stdout.readline() == "held\n"
    waiter.kill()
    waiter.communicate()
    with lease(path) as check:
        check()


def test_the_cache_is_where_it_is_told_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("DEADBENCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("DEADBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "deadbench" / "checkpoints"


def test_no_secret_of_a_source_is_in_a_path_or_a_message(server):
    source = server.url.replace("://", "://me:hunter2@") + "?sig=abcdef"
    with Checkpoint(source).local_copy() as copy:
        assert "hunter2" not in str(copy)
        assert "abcdef" not in str(copy)
    server.faults["config.json"] = ["403"]
    with pytest.raises(CheckpointError, match="access denied") as caught:
        Checkpoint(source).config()
    assert "hunter2" not in str(caught.value)
    assert "abcdef" not in str(caught.value)


class Small:
    """A source of one file."""

    def size(self, name):
        return 3

    def download(self, name, target):
        target.write_bytes(b"own")


@pytest.mark.parametrize("planted", ["a folder for all", "a link", "a folder of another user"])
def test_what_a_stranger_put_into_a_cache_for_all_is_refused(tmp_path, monkeypatch, planted):
    monkeypatch.setenv("DEADBENCH_CACHE", str(tmp_path / "cache"))
    ours = fetch_once(Small(), "http://host/m", "1", ["file"])
    place, cache = ours.parent, tmp_path / "cache"
    assert (ours / "file").read_bytes() == b"own"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    cache.chmod(0o1777)
    assert fetch_once(Small(), "http://host/m", "1", ["file"]) == ours, "of our own"
    if planted == "a link":
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    elif planted == "a folder for all":
        place.chmod(0o777)
    else:
        monkeypatch.setattr(node_cache.os, "getuid", lambda: place.stat().st_uid + 1)
        if place.stat().st_uid == 0:
            os.chown(place, 1, -1)
            monkeypatch.undo()
            monkeypatch.setenv("DEADBENCH_CACHE", str(cache))
    with pytest.raises(CheckpointError, match="another user of this machine"):
        fetch_once(Small(), "http://host/m", "1", ["file"])


def test_a_cache_that_cannot_be_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DEADBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="no place for the checkpoint"):
        fetch_once(Small(), "http://host/m", "1", ["file"])
