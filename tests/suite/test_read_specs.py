"""The table of reads: one line each, and a function for every line."""

import subprocess
import sys

import pytest

from deadbench.runners.engines.registry import DEFAULT, ENGINES
from deadbench.runners.worker.run import READ_FUNCTIONS
from deadbench.suite.read_specs import READ_SPECS


def test_every_read_has_its_function_and_an_engine():
    assert list(READ_FUNCTIONS) == list(READ_SPECS)
    assert set(ENGINES[DEFAULT].reads) == {name for name, spec in READ_SPECS.items() if spec.runs_model}
    for engine in ENGINES.values():
        assert set(engine.reads) <= set(READ_SPECS)


def test_what_runs_no_model_has_nothing_to_divide_or_to_feed():
    for spec in READ_SPECS.values():
        if not spec.runs_model:
            assert (spec.divides, spec.tokens, spec.dtype) == (False, None, None)


@pytest.mark.subprocess
def test_the_table_imports_nothing_heavy():
    code = """import sys, deadbench.suite.read_specs, deadbench.runners.jobs.resolved
print([name for name in ("torch", "transformers", "ray") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
