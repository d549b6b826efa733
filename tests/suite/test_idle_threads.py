"""numpy's idle threads: told to sleep in the command and in its workers, before numpy is there to hear it."""

import os
import subprocess
import sys

import pytest

from deadbench.suite.idle_threads import let_idle_threads_sleep, one_torch_thread


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "20")
    let_idle_threads_sleep()
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == "20"
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT")
    let_idle_threads_sleep()
    assert int(os.environ["OPENBLAS_THREAD_TIMEOUT"]) == 4


def test_torch_has_its_threads_again_when_the_last_that_wants_one_is_done():
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        first, second = one_torch_thread(), one_torch_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # as of two threads, neither inside the other
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


COMMAND = """
import os, sys
from deadbench.runners.cli import main
assert "numpy" not in sys.modules
sys.argv = ["deadbench", "--version"]
try:
    main.main()
except SystemExit:
    pass
print(os.environ.get("OPENBLAS_THREAD_TIMEOUT"), "numpy" in sys.modules)
"""


@pytest.mark.subprocess
def test_the_command_tells_them_before_it_loads_numpy():
    told = {name: value for name, value in os.environ.items() if name != "OPENBLAS_THREAD_TIMEOUT"}
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, check=True, env=told)
    assert done.stdout.split()[-2:] == ["4", "False"]
