"""What a test starts it must say: `make test-fast` would else wait for it."""

import subprocess
import sys

import pytest


def test_a_process_that_is_not_announced_fails_its_test():
    with pytest.raises(AssertionError, match="mark the test with one of ray, vllm, subprocess"):
        subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.mark.subprocess
def test_one_that_is_announced_runs():
    subprocess.run([sys.executable, "-c", ""], check=True)
