"""Real vLLM in two stages, on its CPU build: each reads its blocks, the last the norm, and the rows are torch's."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.vllm
@pytest.mark.full
@pytest.mark.subprocess
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm")
def test_two_stages_give_the_rows_of_torch():
    command = [sys.executable, "-W", "ignore", "-m", "tests.runners.engines.pipelined"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(json.loads(done.stdout.splitlines()[-1]))


def assert_same(tables):
    ((known,), known_blocks), ((row,), blocks) = tables["torch"], tables["vllm"]
    assert row["status"] == "ok", row["error"]
    assert "hooked model.norm (RMSNorm) and 4 blocks in 2 stages, stream h + r" in row["engine_detail"]
    assert row["tensor_parallel"] == 2
    for name in ("lambda_max", "lambda_mean", "lambda_min", "worst_block", "worst_block_ratio"):
        assert row[name] == pytest.approx(known[name], rel=1e-4), name
    for name in ("block", "state", "preserved"):
        assert [each[name] for each in blocks] == [each[name] for each in known_blocks]
    sigmas = [each["sigma_min"] for each in known_blocks]
    assert [each["sigma_min"] for each in blocks] == pytest.approx(sigmas, rel=1e-4)
