"""The plan against arithmetic by hand, and its memory against what a read was measured to take."""

import json
import os
import subprocess
import sys

import pytest

from runners.cluster import PlanError, parse_cluster
from runners.jobs import Overrides, build_jobs
from runners.needs import measure, needs
from runners.plan import PROCESS_BYTES, make_plan, place_jobs
from suite.architecture import build_config
from suite.registry import load_registry
from tests.conftest import ROOT


def neox(D, L, heads, vocabulary):
    return {
        "model_type": "gpt_neox", "hidden_size": D, "intermediate_size": 4 * D, "num_hidden_layers": L,
        "num_attention_heads": heads, "vocab_size": vocabulary,
    }  # fmt: skip


COMMAND_R = {
    "model_type": "cohere", "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40,
    "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 256000,
}  # fmt: skip
MODELS = {
    "pythia-1.4b": {"config": neox(2048, 24, 16, 50304)},
    "pythia-6.9b": {"config": neox(4096, 32, 32, 50432)},
    "command-r": {"config": COMMAND_R, "dtype": "bfloat16"},
}


@pytest.fixture
def registry(tmp_path):
    models = [{"id": name, "input": "tokens:random"} | entry for name, entry in MODELS.items()]
    path = tmp_path / "models.yaml"
    path.write_text(json.dumps({"protocols": {"standard": {}}, "suites": {}, "models": models}))
    return path


def jobs_of(path, models=tuple(MODELS), **overrides):
    return build_jobs(load_registry(path), path, list(models), None, ["random"], Overrides(**overrides))


def test_sizes_are_those_counted_by_hand():
    size = measure(build_config(neox(64, 3, 4, 500)), 256)
    block = 12 * 64**2 + 13 * 64  # QKV, output, two of the MLP; their biases and two norms
    assert (size.largest_block, size.outside_blocks) == (block, 500 * 64 + 128)
    assert size.parameters == 3 * block + size.outside_blocks
    assert (size.num_taps, size.hidden_size) == (4, 64)
    assert size.divisors == {"num_attention_heads": 4, "intermediate_size": 256}
    need = needs(size, "random", 2, 640)
    assert (need.weights, need.resident_load) == (2 * size.parameters, 4 * size.parameters + 2 * 500 * 64)
    assert need.stream == 640 * 64 * 2
    # The MLP's inner activations and their GELU, of 4096 tokens, are all that is alive there beside the stream.
    assert 4 * 4096 * 64 * 9 <= size.activation_bytes <= 4 * 4096 * 64 * 20


@pytest.mark.parametrize(
    ("shape", "engines", "ranks"),
    [
        ("1x24GB", ["streaming", "streaming", "torch"], [1, 1, 1]),
        ("8x80GB", ["torch", "torch", "torch"], [2, 1, 1]),
        ("2x8x141GB", ["torch", "torch", "torch"], [1, 1, 1]),
        ("8x24GB", ["torch", "torch", "torch"], [8, 2, 1]),
        ("0x24GB", ["streaming", "streaming", "torch"], [1, 1, 1]),
    ],
)
def test_placements_on_assumed_clusters(registry, shape, engines, ranks):
    plan = make_plan(jobs_of(registry), parse_cluster(shape))
    assert [row.model for row in plan] == ["command-r", "pythia-6.9b", "pythia-1.4b"], "largest first"
    assert [row.engine for row in plan] == engines
    assert [row.tensor_parallel for row in plan] == ranks
    assert [row.problem for row in plan] == [None] * 3
    assert plan[0].weight_bytes == pytest.approx(70e9, rel=0.01)
    cluster = parse_cluster(shape).largest
    for row in plan:
        limit = cluster.gpu_bytes if cluster.gpus else cluster.host_bytes
        assert (row.peak_bytes if cluster.gpus else row.peak_host_bytes) <= limit
        assert row.tensor_parallel == 1 or 64 % row.tensor_parallel == 0


def test_a_small_model_takes_a_part_of_a_gpu_that_holds_it_whole(registry):
    jobs = jobs_of(registry, ["pythia-1.4b", "pythia-6.9b"])
    for shape, shares in (("8x40GB", [0.25, 1]), ("8x141GB", [0.125, 0.5])):
        cluster = parse_cluster(shape)
        rows = sorted(make_plan(jobs, cluster), key=lambda row: row.model)
        assert [row.gpus for row in rows] == shares
        for row in rows:
            assert row.passes == 1 or row.gpus == 1, "a share is not bought with another pass"
            assert row.peak_bytes <= row.gpus * cluster.largest.gpu_bytes
        assert [job.gpu_share for job in place_jobs(jobs, cluster)[0]] == shares
    assert [job.gpu_share for job in place_jobs(jobs, parse_cluster("0x500GB"))[0]] == [1, 1]


def test_what_cannot_fit_says_why_and_what_would(registry):
    (row,) = make_plan(jobs_of(registry, ["command-r"]), parse_cluster("1x6GB"))
    assert "4.2 GB outside the blocks, 1.6 GB a block" in row.problem
    (row,) = make_plan(jobs_of(registry, ["pythia-6.9b"], engine="streaming"), parse_cluster("1x2GB"))
    assert "--dtype bfloat16" in row.problem
    placed, problems = place_jobs(jobs_of(registry, ["command-r", "pythia-1.4b"]), parse_cluster("0x12GB"))
    assert placed[0].reads[0].error in problems[0]
    assert (placed[1].reads[0].engine, placed[1].reads[0].error) == ("torch", None)


def test_a_functional_read_is_whole_on_one_device(registry):
    jobs = build_jobs(load_registry(registry), registry, ["pythia-1.4b"], None, ["functional"], Overrides())
    (row,) = make_plan(jobs, parse_cluster("8x80GB"))
    assert (row.engine, row.gpus, row.tensor_parallel, row.dtype, row.problem) == ("torch", 1, 1, "float64", None)
    (row,) = make_plan(jobs, parse_cluster("1x8GB"))
    assert "holds the whole model" in row.problem
    placed, problems = place_jobs(jobs, parse_cluster("0x8GB"))
    assert placed[0].reads[0].error in problems[0]


@pytest.mark.parametrize("shape", ["8", "8x80", "x8x80GB", "0x8x80GB", "8x0GB", "-1x80GB"])
def test_a_cluster_that_is_none(shape):
    with pytest.raises(PlanError, match="--assume"):
        parse_cluster(shape)


MEASURED = """
import json, sys, transformers, warnings
from pathlib import Path
from runners.jobs import Overrides, build_jobs
from runners.events import peak_host_bytes
from runners.plan import place
from runners.cluster import this_machine
from runners.worker import Finished, run_model
from suite.registry import load_registry
from tests.runners.test_plan import neox
from suite.architecture import build_config, find_final_norm, build_model
import runners.forward, torch
path = Path(sys.argv[1])
(job,) = build_jobs(load_registry(path), path, ["m"], None, ["random"], Overrides(tokens=1100))
planned = place(job.reads[0], this_machine())
find_final_norm(build_model(build_config(neox(64, 1, 4, 99)))); torch.linalg.eigh(torch.eye(600, dtype=torch.float64))
overhead = peak_host_bytes()
*_, last = run_model(job, "run", 1)
assert last.row["status"] == "ok", last.row["error"]
print(json.dumps([planned.engine, planned.peak_host_bytes, overhead, last.row["peak_host_bytes"]]))
"""


@pytest.mark.parametrize("config", [neox(512, 12, 8, 120_000), neox(1024, 12, 16, 100_000)], ids=["0.4 GB", "1 GB"])
def test_planned_memory_is_within_15_percent_of_the_measured_peak(config, tmp_path):
    model = {"id": "m", "input": "tokens:random", "config": config, "dtype": "float32"}
    (tmp_path / "models.yaml").write_text(json.dumps({"protocols": {"standard": {}}, "suites": {}, "models": [model]}))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED, str(tmp_path / "models.yaml")],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    engine, planned, overhead, peak = json.loads(run.stdout.splitlines()[-1])
    assert engine == "torch"
    assert planned - PROCESS_BYTES == pytest.approx(peak - overhead, rel=0.15)
    assert planned == pytest.approx(peak, rel=0.15)
