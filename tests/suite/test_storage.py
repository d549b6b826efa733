"""Files are whole or not there, whoever writes them: at every step a full disk, or a kill, leaves what was there."""

import json
import os
import resource
from pathlib import Path

import fsspec
import numpy as np
import pytest

from deadbench.suite import storage
from deadbench.suite.storage import create_new, is_local, is_url, open_place, read_file, refusal, write_whole
from tests.conftest import TWINS


def plain(folder, monkeypatch):
    return lambda version: write_whole(folder / "plain", f"version {version}".encode())


def document(folder, monkeypatch):
    from deadbench.runners.results.store import ResultStore

    store = ResultStore(str(folder))
    return lambda version: store.write_text("runs/r/run.json", json.dumps({"version": version}))


def rows(folder, monkeypatch):
    from deadbench.runners.results.store import ResultStore
    from deadbench.suite.schema import to_table

    store = ResultStore(str(folder))
    return lambda version: store.write({"reads": to_table("reads", [{"model": f"m{version}"}])}, "stamp")


def directions(folder, monkeypatch):
    from deadbench.runners.results.directions_file import save_directions

    facts = dict.fromkeys(("source", "family", "final_norm", "final_norm_tensor", "revision"), "x")
    return lambda version: save_directions(folder / "d.safetensors", [(facts, np.full(4, float(version)))])


def saved_read(folder, monkeypatch):
    from deadbench.runners.worker import saved_state
    from deadbench.suite.ranks import Ranks
    from tests.runners.sleepers import sleeping_jobs

    (job,) = sleeping_jobs(folder.parent / "registry", 1)
    saved = saved_state.SavedRead(job.checkpointed(1, str(folder)).reads[0], Ranks(), {}, possible=True)
    monkeypatch.setattr(
        saved, "_batches", lambda position, *_: iter([saved_state._row(facts="f", position=str(position.batch))])
    )

    def save(version):
        saved.save(saved_state.Position(batch=version), None, None, in_step=False)
        if saved.remark:
            raise OSError(saved.remark)

    return save


def page(folder, monkeypatch):
    from deadbench.analysis.pages import report

    def write(version):
        monkeypatch.setattr(report, "report_page", lambda locations: (f"page {version}", []))
        report.write_report("results", folder / "report.html")

    return write


def plot(folder, monkeypatch):
    import vl_convert

    from deadbench.analysis.plots.export import save_plot

    monkeypatch.setattr(vl_convert, "vegalite_to_svg", lambda spec, vl_version: f"<svg>{spec['title']}</svg>")
    return lambda version: save_plot({"title": str(version)}, folder / "plot.svg")


def atlas(folder, monkeypatch):
    from deadbench.suite.atlas.__main__ import _write

    return lambda version: _write(folder / "atlas.json", {"m": [{"version": version}]})


USERS = [plain, document, rows, directions, page, plot, atlas]


class Killed(BaseException):
    pass


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def planted(patch, place, error):
    target = {
        "write": "fsspec.implementations.local.LocalFileOpener.write",
        "fsync": "deadbench.suite.storage.os.fsync",
        "rename": "deadbench.suite.storage.os.replace",
    }[place]

    def fail(*_args, **_kwargs):
        raise error

    patch.setattr(target, fail)


@pytest.mark.parametrize("place", ["write", "fsync", "rename"])
def test_what_could_not_be_written_is_named(place, tmp_path, monkeypatch, deadbench):
    """The kernel names no file where a disk is full."""
    planted(monkeypatch, place, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(tmp_path / "report.html", b"x")
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "report.html"))
    out = tmp_path / "d.safetensors"
    code, _, err = deadbench("export", TWINS / "layernorm" / "step4096", "-o", out)
    assert (code, err) == (1, f"deadbench: {out}: No space left on device\n")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("place", ["write", "fsync", "rename"])
@pytest.mark.parametrize("user", [*USERS, saved_read])
def test_a_full_disk_leaves_the_old_file_or_none_and_nothing_else(user, place, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    write = user(folder, monkeypatch)
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        planted(patch, place, full)
        if user is saved_read and place == "rename":  # only a remark to make of what could not be written
            write(1)
        else:
            with pytest.raises(OSError, match="No space left"):
                write(1)
    assert files(folder) == {}
    write(1)
    old = files(folder)
    assert len(old) == 1
    with monkeypatch.context() as patch:
        planted(patch, place, full)
        if user is saved_read and place == "rename":
            write(2)
        else:
            with pytest.raises(OSError, match="No space left"):
                write(2)
    assert files(folder) == old
    write(2)
    new = files(folder)
    assert new.keys() == old.keys()
    assert new != old


@pytest.mark.parametrize("place", ["write", "fsync", "rename"])
@pytest.mark.parametrize("user", USERS)
def test_a_kill_leaves_the_old_file_and_perhaps_one_that_no_reader_takes(user, place, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    write = user(folder, monkeypatch)
    write(1)
    old = files(folder)
    with monkeypatch.context() as patch:
        planted(patch, place, Killed())
        patch.setattr(storage, "_remove", lambda *_: None)  # who is killed clears nothing away
        with pytest.raises(Killed):
            write(2)
    left = files(folder)
    assert {name: left.pop(name) for name in old} == old
    assert all(Path(name).name.startswith(".") or name.startswith("_tmp/") for name in left)


def test_a_link_stays_a_link_and_no_folder_is_made(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target" / "file")
    write_whole(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "file").read_bytes() == b"1"
    assert os.listdir(tmp_path / "target") == ["file"]
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "file", b"1")


def test_a_pipe_is_written_into_and_no_file_takes_its_place(tmp_path):
    """As root, a page that was to go to /dev/null would else be a file there, for everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    with pytest.raises(OSError, match="No such device"):
        write_whole(pipe, b"nobody reads")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"one, ")
    write_whole(tmp_path / "link", b"two")
    assert os.read(reader, 99) == b"one, two"
    os.close(reader)
    assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_an_object_store_gets_one_write_of_the_whole(monkeypatch):
    memory = fsspec.filesystem("memory")
    calls = []
    monkeypatch.setattr(memory, "pipe_file", lambda path, data, **_: calls.append((path, data)))
    write_whole("/box/file", b"12", memory)
    assert calls == [("/box/file", b"12")]


def test_a_refusal_is_told_in_the_systems_words():
    assert refusal(OSError(28, "x", "/a/b")) == "No space left on device"
    assert refusal(ValueError("no\nsuch bucket https://me:pw@h/")) == "no such bucket https://h/"
    assert refusal(KeyError()) == "KeyError"


@pytest.mark.parametrize("name", ["exp::1", "a::x", "zip::x", "file:x", "data:x", "s3:x", "x::memory://y", "::"])
def test_a_path_of_this_machine_is_never_taken_for_a_url(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for location in (name, f"./{name}", f"{tmp_path}/{name}/"):
        assert not is_url(location)
        fs, root = open_place(location)
        assert is_local(fs)
        assert root == str(tmp_path / name)


@pytest.mark.parametrize(
    ("location", "root"), [("memory://runs/exp::1", "runs/exp::1"), ("simplecache::memory://runs/exp", "runs/exp")]
)
def test_a_url_is_a_chain_only_where_a_file_system_lies_in_another_place(location, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fs, found = open_place(location)
    assert is_url(location)
    assert not is_local(fs)
    assert found.lstrip("/") == root
    (tmp_path / location.partition("/")[0]).mkdir()
    assert is_url(location) == location.startswith("memory")


def test_a_file_that_a_person_names_is_neither_waited_for_nor_endless(tmp_path):
    from deadbench.runners.census.census import CensusError, list_sources
    from deadbench.suite.checkpoints.configurations import config_file
    from deadbench.suite.errors import CheckpointError
    from deadbench.suite.yaml_file import YamlError, load_yaml

    (tmp_path / "file").write_bytes(b"12345")
    os.mkfifo(tmp_path / "fifo")
    assert read_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_file(tmp_path / "file", 4)
    for what in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file|Is a directory"):
            read_file(what, 4)
    for read, error in ((load_yaml, YamlError), (config_file, CheckpointError)):
        with pytest.raises(error, match="not a regular file"):
            read(tmp_path / "fifo")
    with pytest.raises(CensusError, match=r"/dev/zero: cannot be read \(not a regular file\)"):
        list_sources("/dev/zero")


@pytest.mark.parametrize("room", [0, 3])
def test_a_file_that_a_full_disk_has_only_the_name_of_is_not_there(room, tmp_path):
    """Else nobody can make it until a lease is over."""
    path, fs = str(tmp_path / "claim"), fsspec.filesystem("file")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|No space left"):
            create_new(path, b"owner", fs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [*tmp_path.iterdir()] == []
    create_new(path, b"owner", fs)
    with pytest.raises(FileExistsError):
        create_new(path, b"another", fs)
    assert (tmp_path / "claim").read_bytes() == b"owner"


def test_what_a_killed_writer_left_goes_with_the_next_writing_of_the_same_file_and_nothing_else_does(tmp_path):
    left, new = tmp_path / ".d[1].json-0123abcd", tmp_path / ".d[1].json-89abcdef"
    others = [
        ".d1.json-0123abcd",
        ".d[1].json-0123ABCD",
        ".d[1].json-0123abcde",
        ".e.json-0123abcd",
        "d[1].json-0123abcd",
    ]
    for name in (left.name, new.name, *others):
        (tmp_path / name).write_text("half")
        if name != new.name:
            os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".d[1].json-00000000").mkdir()
    write_whole(tmp_path / "d[1].json", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"d[1].json", new.name, *others, ".d[1].json-00000000"}
