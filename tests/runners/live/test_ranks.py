"""Processes that train together: each gives its part, and the first has the row of all tokens."""

import json
import os
import subprocess
import sys

import pytest
import torch

import deadbench
from tests.conftest import ROOT
from tests.runners.live.models import Gpt

pytestmark = pytest.mark.subprocess


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp-norm"])
def test_two_ranks_give_the_row_of_one(tmp_path, tokens, kind):
    torch.save(tokens, tmp_path / "ids.pt")
    command = [sys.executable, "-m", "tests.runners.live.ranks"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting"), str(tmp_path), kind],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0] + errors[1]
    found = json.loads((tmp_path / f"{kind}.json").read_text())
    torch.manual_seed(0)
    alone = deadbench.measure(Gpt(), tokens, reads=("parameters", "trained"))
    for mine, one in zip(found["reads"], alone.rows, strict=True):
        for name in ("family", "final_norm", "hidden_size", "num_blocks", "num_tokens", "num_parameters",
                     "num_distinct_inputs", "scale_harmonic", "kernel_exact", "num_dead_1e6", "blocks_preserved",
                     "status", "dtype", "model"):  # fmt: skip
            assert mine[name] == one[name], name
        if one["read"] == "trained":
            for name in ("lambda_mean", "lambda_max", "lambda_second", "depth_bottom"):
                assert mine[name] == pytest.approx(one[name], rel=1e-4), name
    for mine, one in zip(found["blocks"], alone.blocks, strict=True):
        assert mine["sigma_min"] == pytest.approx(one["sigma_min"], rel=1e-5)
    assert [row["scale_harmonic"] for row in found["norms"]] == [row["scale_harmonic"] for row in alone.norms]
    assert [line.partition(";")[0].partition(" (")[0] for line in found["told"]] == [
        "there is no batch",
        "Gpt cannot be called with a batch of 3 places and the names none",
    ]
