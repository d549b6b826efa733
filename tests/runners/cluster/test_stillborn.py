"""Workers of Ray that end at an import before Ray knows them: their own last line is told, and the wait has an end."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.subprocess

TRACEBACK = """Traceback (most recent call last):
  File "/lib/ray/_private/workers/default_worker.py", line 8, in <module>
    import ray
  File "/lib/ray/_common/utils.py", line 23, in <module>
    import psutil
ImportError: libpsutil.so: cannot open shared object file\x1b[0m
[2026-11-29 02:17:25,200 E 1 1] (raylet) worker_pool.cc:660: Some workers of the worker process(2) have not registered
"""
WAITING = """
import sys, time
from pathlib import Path
from deadbench.runners.cluster import stillborn
stillborn.STARTING_SECONDS, stillborn.PATIENCE_SECONDS = 0.0, float(sys.argv[2])
with stillborn.watched(Path(sys.argv[1])):
    time.sleep(float(sys.argv[3]))
print("begun")
"""


def play(folder, text, patience, seconds):
    logs = folder / "session_2026" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.err").write_text(text)
    command = [sys.executable, "-c", WAITING, folder, str(patience), str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def test_their_last_line_ends_the_wait(tmp_path):
    code, out, err = play(tmp_path, TRACEBACK * 2, 50, 50)
    assert (code, out) == (-9, "")
    assert err == (
        "deadbench: Ray's worker processes end before they begin: ImportError: libpsutil.so: cannot open shared object "
        "file\\x1b[0m; mend that in this environment\n"
    )


def test_what_is_no_workers_traceback_ends_nothing_but_patience_does(tmp_path):
    other = 'Traceback\n  File "agent.py"\nImportError: x\n'
    assert play(tmp_path / "a", other, 50, 2.5) == (0, "begun\n", "")
    code, _, err = play(tmp_path / "b", other, 0.5, 50)
    assert (code, err) == (-9, "deadbench: Ray did not start within 0 s; mend that in this environment\n")
