"""`import deadbench` in a process of its own, beside one that imports nothing: the difference is what it costs."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.subprocess
@pytest.mark.benchmark(group="import deadbench")
@pytest.mark.parametrize("statement", ["import deadbench", "pass"])
def test_import(benchmark, statement):
    benchmark(subprocess.run, [sys.executable, "-c", statement], cwd=ROOT, check=True)
