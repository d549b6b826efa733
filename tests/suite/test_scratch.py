"""Temporary folders: for their process alone, gone with it, and swept where it was killed."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from deadbench.suite.scratch import Scratch, is_scratch, sweep
from tests.conftest import ROOT


def test_a_folder_is_its_users_alone_and_gone_when_it_is_closed(tmp_path):
    with Scratch(tmp_path) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "big").mkdir()
        (folder / "big" / "file").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_use_is_left_and_so_is_what_is_another_s(tmp_path):
    kept = Scratch(tmp_path)
    (tmp_path / "deadbench-without-lock").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "deadbench-young").write_text("x")
    (tmp_path / "deadbench-old").write_text("x")
    os.utime(tmp_path / "deadbench-old", (time.time() - 90_000,) * 2)
    assert sweep(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["deadbench-without-lock", "else", "deadbench-young", kept.path.name]
    )
    kept.close()


def test_a_scratch_folder_is_known_by_the_process_that_holds_it(tmp_path):
    with Scratch(tmp_path) as folder:
        assert is_scratch(folder)
        copy = tmp_path / "deadbench-copy"
        copy.mkdir()
        (copy / "in-use").write_text("")
        assert not is_scratch(copy)
        assert not is_scratch(tmp_path)
    assert not is_scratch(folder)


def test_a_link_under_the_name_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "in-use").write_text("")
    (tmp_path / "deadbench-link").symlink_to("precious")
    (tmp_path / "deadbench-odd").mkdir()
    (tmp_path / "deadbench-odd" / "in-use").symlink_to(tmp_path / "precious" / "in-use")
    assert sweep(tmp_path) == 0
    assert (tmp_path / "precious" / "in-use").exists()


@pytest.mark.subprocess
def test_what_a_killed_process_left_is_swept(tmp_path):
    program = "import sys, time; from deadbench.suite.scratch import Scratch; s = Scratch(sys.argv[1])\n"
    program += "(s.path / 'file').write_text('x'); print(s.path, flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    assert sweep(tmp_path) == 0, "it lives"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(tmp_path.iterdir())) == 1
    assert sweep(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []
