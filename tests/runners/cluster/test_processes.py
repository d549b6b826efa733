"""What a model has started is found and ended, however young it is."""

import os
import signal
import subprocess

import psutil
import pytest

from deadbench.runners.cluster import processes


@pytest.mark.subprocess
def test_a_process_that_is_just_beginning_is_waited_for(monkeypatch):
    """Between the start of a program and that of its environment it carries no mark."""
    child = subprocess.Popen(["sleep", "600"], env=os.environ | {processes.MARK: "beginner"}, start_new_session=True)
    looks, environ = [], psutil.Process.environ

    def late(process):
        if process.pid != child.pid:
            return environ(process)
        looks.append(process)
        return environ(process) if len(looks) > 4 else {}

    monkeypatch.setattr(psutil.Process, "environ", late)
    try:
        assert processes._end("beginner", []) == []
        assert child.wait(timeout=5) == -signal.SIGTERM
    finally:
        child.kill()
