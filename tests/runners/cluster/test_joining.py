"""A dead address is told within seconds, a slow one has its time; nobody's working folder is in the path of workers."""

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import polars as pl
import pytest

from deadbench.runners.cluster import joining
from deadbench.runners.cluster.joining import JoinError, check_answers
from tests.conftest import ROOT, save_tiny
from tests.runners.clusters import free_ports

GREETING = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # the first frame of a server of gRPC: settings, none of them


@pytest.fixture
def dead(monkeypatch):
    """A port that nobody listens on."""
    monkeypatch.setattr(joining, "_REFUSED_SECONDS", 0.1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return free_ports(1)[0]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}", "[::1]:{}"])
def test_a_dead_address_is_one_line_that_names_who_gave_it(dead, monkeypatch, form):
    address = form.format(dead)
    with pytest.raises(JoinError, match="^--address .*no Ray answers there") as told:
        check_answers(address)
    assert address in str(told.value)
    monkeypatch.setenv("RAY_ADDRESS", address)
    for given in (None, "auto"):
        with pytest.raises(JoinError, match="^RAY_ADDRESS=") as told:
            check_answers(given)
        assert "\n" not in str(told.value)
    check_answers("local")


def test_auto_is_the_ray_that_was_started_last(dead, monkeypatch):
    monkeypatch.setattr("ray._private.services.get_ray_address_from_environment", lambda *_: f"127.0.0.1:{dead}")
    with pytest.raises(JoinError, match=f"^--address auto .the Ray at 127.0.0.1:{dead}, "):
        check_answers("auto")

    def none_running(*_):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray._private.services.get_ray_address_from_environment", none_running)
    check_answers("auto")  # Ray says it, at once


def test_who_answers_late_is_waited_for(dead, monkeypatch):
    monkeypatch.setattr(joining, "_REFUSED_SECONDS", 10.0)
    with socket.socket() as server:

        def start():
            time.sleep(0.3)
            server.bind(("127.0.0.1", dead))
            server.listen()
            with server.accept()[0] as head:
                head.sendall(GREETING)

        starting = threading.Thread(target=start)
        starting.start()
        check_answers(f"127.0.0.1:{dead}")
        starting.join()


@pytest.mark.parametrize(
    ("said", "told"),
    [(None, "what listens there says nothing for 0 s"), (b"HTTP/1.0 400 Bad", "another program"), (b"", "another")],
)
def test_who_accepts_and_is_no_ray_is_given_up(dead, monkeypatch, said, told):
    """A head that hangs takes connections, as the system does it for it; Ray itself asks on for many minutes."""
    monkeypatch.setattr(joining, "_GREETING_SECONDS", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", dead))
        server.listen()

        def answer():
            with server.accept()[0] as head:
                head.recv(100)
                head.sendall(said)

        answering = threading.Thread(target=answer if said is not None else lambda: None)
        answering.start()
        with pytest.raises(JoinError, match=f"no Ray answers there .*{told}"):
            check_answers(f"127.0.0.1:{dead}")
        answering.join()


def test_who_never_accepts_is_given_up(monkeypatch):
    monkeypatch.setattr(joining, "_SILENT_SECONDS", 0.5)

    def silent(address, timeout):
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(JoinError, match="no answer within"):
        check_answers("10.0.0.1:6379")


@pytest.mark.subprocess
def test_the_command_gives_a_dead_address_up_within_seconds(dead, tmp_path):
    folder = save_tiny(tmp_path / "m")
    began = time.monotonic()
    command = [sys.executable, "-m", "deadbench", "run", str(folder), "--reads", "parameters", "--out", "r"]
    environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{dead}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"deadbench: RAY_ADDRESS=127.0.0.1:{dead}: no Ray answers there")
    assert time.monotonic() - began < 60, "not the fifteen minutes that Ray takes; most of it is imports"


FILES = ("suite.py", "runners/__init__.py", "suite/__init__.py", "torch.py", "tokenizers.py")


@pytest.mark.ray
def test_workers_import_nothing_of_the_folder_that_the_command_was_given_in(tmp_path):
    save_tiny(tmp_path / "m")
    for name in FILES:
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('a module of the user')\n")
    program = "import sys; sys.path[:0] = [path]; from deadbench.runners.cli.main import main; main()"
    arguments = ["run", "../m", "--address", "local", "--reads", "parameters,random", "--tokens", "64", "--json"]
    arguments += ["--input", "tokens:random", "--out", str(tmp_path / "out")]
    # As the console script: deadbench is found by its own place, and the working folder is not looked in.
    command = [sys.executable, "-P", "-c", program.replace("path]", f"{str(ROOT)!r}]"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": tempfile.mkdtemp(dir="/tmp")}
    process = subprocess.Popen(
        command, cwd=tmp_path / "mine", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    open_to_others = []
    while process.poll() is None:  # what others of this machine could enter, while Ray runs
        for folder in Path(environment["TMPDIR"]).glob("deadbench-*"):
            open_to_others += [folder] if stat.S_IMODE(folder.stat().st_mode) & 0o077 else []
        time.sleep(0.1)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["ok"] == 2
    assert open_to_others == []
    assert stat.S_IMODE((tmp_path / "home/.ray/auth_token").stat().st_mode) == 0o600
    assert list(Path(environment["TMPDIR"]).iterdir()) == [], "nothing is left of that Ray"
    os.rmdir(environment["TMPDIR"])
    rows = pl.read_parquet(tmp_path / "out/reads/*.parquet")
    assert rows["status"].to_list() == ["ok", "ok"]


def test_a_clone_that_is_not_installed_is_found_by_workers_and_an_installed_one_needs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["deadbench"])
    elsewhere = [path for path in sys.path if path and not os.path.exists(os.path.join(path, "deadbench"))]
    monkeypatch.setattr(sys, "path", [str(ROOT), *elsewhere])  # as `python -m deadbench` in the clone
    assert joining._own_path() == [str(ROOT)]
    monkeypatch.setattr(sys, "path", ["/usr/bin", *elsewhere, str(ROOT)])  # as the console script of an installation
    assert joining._own_path() == []


@pytest.mark.parametrize(
    "address", ["127.0.0.1:99999999", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:0", "\x1b[2J:6379", "ray://h:99999"]
)
def test_an_address_that_ray_would_ask_for_ever_is_refused_at_once(address):
    with pytest.raises(JoinError, match="no address of a Ray; it is HOST:PORT"):
        check_answers(address)


@pytest.mark.parametrize("address", ["local", "x", "ray://name/path", "other://host:99999"])
def test_what_ray_itself_refuses_or_knows_is_left_to_it(address):
    check_answers(address)
