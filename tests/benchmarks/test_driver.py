"""The driver on `ray.cluster_utils.Cluster` with logical GPUs and reads that sleep; and the schedule, simulated.

Seconds of the whole run, of one, two and four nodes with equally much to do for each: the ratio is the scaling. `make
bench` takes reads of seconds; `make test` short ones once, for what it asserts.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.runners.simulation import ANY, POWERS, SHARED, cluster, lower_bound, models, simulate

_STORE = 80 * 2**20


@pytest.fixture(scope="module")
def clusters(sized):
    """`clusters(nodes, devices of each)`: the address of a running one: at full size a new one, else one that grows."""
    from ray.cluster_utils import Cluster

    running = []

    def have(nodes, devices):
        if sized(full=True, quick=not running):
            close()
            head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE}
            running.append(Cluster(initialize_head=True, head_node_args=head))
        (cluster,) = running
        while len(cluster.worker_nodes) < nodes:
            cluster.add_node(num_cpus=4, num_gpus=devices, object_store_memory=_STORE)
        return cluster.address

    def close():
        while running:
            running.pop().shutdown()

    yield have
    close()


def drive(benchmark, address, models, seconds, out):
    """One run of so many models, two reads each, every model on a GPU of its own; what it took."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.runners.sleepers", address]
    command += [str(out), str(models), str(seconds), "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": True}
    done = benchmark.pedantic(subprocess.run, args=(command,), kwargs=options, rounds=1)
    took = json.loads(done.stdout.splitlines()[-1])
    assert (took["ok"], took["failed"]) == (2 * models, 0)
    benchmark.extra_info |= took | {"driver_ms_per_read": 1e3 * took["driver_cpu_seconds"] / (2 * models)}


@pytest.mark.ray
@pytest.mark.benchmark(group="driver: weak scaling over nodes, four models of two reads of 10 s for each")
@pytest.mark.parametrize(
    "nodes", [pytest.param(1, marks=pytest.mark.bench), 2, pytest.param(4, marks=pytest.mark.bench)]
)
def test_scaling(benchmark, clusters, sized, nodes, tmp_path):
    models, seconds = sized((4, 10.0), (1, 0.1))
    drive(benchmark, clusters(nodes, 1), nodes * models, seconds, tmp_path / "out")


@pytest.mark.ray
@pytest.mark.bench  # at a small size it is test_scaling
@pytest.mark.benchmark(group="driver: its own time, extra_info['driver_ms_per_read'] of 200 reads of 0.1 s")
def test_overhead(benchmark, clusters, tmp_path):
    drive(benchmark, clusters(1, 4), 100, 0.1, tmp_path / "out")


@pytest.mark.bench  # fewer of them are test_schedule's
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
