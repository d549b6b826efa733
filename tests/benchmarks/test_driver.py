"""The driver on `ray.cluster_utils.Cluster` with logical GPUs and reads that sleep; and the schedule, simulated.

Seconds of the whole run, of one, two and four nodes with equally much to do for each: the ratio is the scaling.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.runners.simulation import ANY, POWERS, SHARED, cluster, lower_bound, models, simulate

_STORE = 80 * 2**20
_MODELS, _SECONDS = 4, 5.0  # for each node; of each of a model's two reads


@pytest.mark.benchmark(group="driver: weak scaling over nodes")
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_scaling(benchmark, nodes, tmp_path):
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE}
    ray_cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            ray_cluster.add_node(num_cpus=4, num_gpus=1, object_store_memory=_STORE)
        command = [sys.executable, "-W", "ignore", "-m", "tests.runners.sleepers", ray_cluster.address]
        command += [str(tmp_path / "out"), str(nodes * _MODELS), str(_SECONDS), "1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

        def drive():
            return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)

        done = benchmark.pedantic(drive, rounds=1)
    finally:
        ray_cluster.shutdown()
    took = json.loads(done.stdout.splitlines()[-1])
    reads = 2 * nodes * _MODELS
    assert (took["ok"], took["failed"]) == (reads, 0)
    benchmark.extra_info |= took | {"driver_ms_per_read": 1e3 * took["driver_cpu_seconds"] / reads}


@pytest.mark.benchmark(group="schedule: 200 models, decisions of a whole run")
@pytest.mark.parametrize("shape", [(8,), (8, 8, 8, 8)], ids=["1x8", "4x8"])
@pytest.mark.parametrize("sizes", [POWERS, SHARED, ANY], ids=["1-2-4-8", "with-shares", "1-to-8"])
def test_makespan(benchmark, shape, sizes):
    nodes = cluster(*shape)
    ratios = []
    for seed in range(50):
        suite = models(seed, sizes, error=0.5)
        ratios.append(simulate(suite, nodes)[1] / lower_bound(suite, nodes))
    benchmark.extra_info |= {"mean": sum(ratios) / len(ratios), "worst": max(ratios)}
    assert max(ratios) <= 1.15
    benchmark.pedantic(simulate, args=(models(0, sizes), nodes), rounds=1)
