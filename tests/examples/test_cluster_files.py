"""The example cluster files are what Ray's launcher, KubeRay, Kueue and SLURM take, as far as that can be told without
machines: SLURM's commands are stubs that write down how they were called."""

import json
import os
import re
import signal
import subprocess
import time
import tomllib

import pytest
import yaml

from tests.conftest import ROOT

CLUSTER = ROOT / "examples" / "cluster"
BATCHES = ("slurm", "slurm-array")


@pytest.mark.parametrize("name", ["on-premises", "aws"])
def test_cluster_files_are_what_rays_launcher_takes(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "examples" / "cluster" / f"{name}.yaml").read_text(encoding="utf-8"))
    validate_config(prepare_config(config))
    commands = json.dumps(config)
    assert "ray stop" not in commands
    assert "RAY_AUTH_MODE=token" in commands


def test_where_gpus_come_when_they_are_asked_for_the_command_asks_for_what_may_come():
    from deadbench.runners.planning.hardware import parse_nodes

    text = (CLUSTER / "aws.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    gpu = config["available_node_types"]["gpu"]
    shape = re.search(r"python -m deadbench run .*--autoscale (\S+) ", text).group(1)
    come = parse_nodes(shape, "--autoscale").nodes
    assert gpu["min_workers"] == 0
    assert [node.gpus for node in come] == [gpu["resources"]["GPU"]] * gpu["max_workers"]
    assert gpu["max_workers"] == config["max_workers"]


@pytest.mark.parametrize("name", ["kuberay", "kueue"])
def test_the_operators_ray_and_image_are_of_the_pinned_versions(name):
    text = (CLUSTER / f"{name}.yaml").read_text(encoding="utf-8")
    ray = re.search(r"^ray(?:\[\S+\])?==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE).group(1)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert set(re.findall(r'rayVersion: "(\S+)"', text)) == {ray}
    assert set(re.findall(r"image: \S+/deadbench:(\S+)", text)) == {version}


def test_the_kuberay_file_is_a_whole_job():
    job = yaml.safe_load((ROOT / "examples" / "cluster" / "kuberay.yaml").read_text(encoding="utf-8"))
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {each["image"] for group in groups for each in group["template"]["spec"]["containers"]}
    assert (job["kind"], len(images), cluster["authOptions"]["mode"]) == ("RayJob", 1, "token")
    assert " --out s3://" in job["spec"]["entrypoint"]
    for each in cluster["workerGroupSpecs"]:  # without its autoscaler KubeRay takes `replicas`, whatever the limits say
        assert cluster.get("enableInTreeAutoscaling") or each["replicas"] == each["minReplicas"] == each["maxReplicas"]


def test_kueue_admits_what_its_quota_holds_and_counts_nothing_that_grows():
    documents = list(yaml.safe_load_all((CLUSTER / "kueue.yaml").read_text(encoding="utf-8")))
    flavor, queue, local, job = documents
    assert [each["kind"] for each in documents] == ["ResourceFlavor", "ClusterQueue", "LocalQueue", "RayJob"]
    (group,) = queue["spec"]["resourceGroups"]
    assert group["flavors"][0]["name"] == flavor["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert job["metadata"]["namespace"] == local["metadata"]["namespace"]
    assert (job["spec"]["suspend"], job["spec"]["shutdownAfterJobFinishes"]) == (True, True)
    cluster = job["spec"]["rayClusterSpec"]
    assert "enableInTreeAutoscaling" not in cluster
    groups = [(1, cluster["headGroupSpec"])]
    for each in cluster["workerGroupSpecs"]:
        assert each["replicas"] == each["minReplicas"] == each["maxReplicas"]
        groups.append((each["replicas"], each))
    asked = dict.fromkeys(group["coveredResources"], 0)
    for count, each in groups:
        (container,) = each["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {*container["resources"]["requests"]} <= {*asked}, "what no quota covers is never admitted"
        for name, amount in container["resources"]["requests"].items():
            asked[name] += count * int(amount.removesuffix("Gi"))
    quota = {each["name"]: int(each["nominalQuota"].removesuffix("Gi")) for each in group["flavors"][0]["resources"]}
    assert all(asked[name] <= quota[name] for name in asked), (asked, quota)
    plain = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text(encoding="utf-8"))
    assert job["spec"]["entrypoint"] == plain["spec"]["entrypoint"]


@pytest.fixture
def slurm(tmp_path):
    """`slurm(name, srun)` starts an example as SLURM would, with stubs for its commands; `.calls()`: what they saw."""
    stubs, calls = tmp_path / "bin", tmp_path / "calls"
    stubs.mkdir()

    def stub(name, body=""):
        lines = ["#!/bin/bash", f'echo "{name} $*" >> {calls}', body]
        (stubs / name).write_text("\n".join(lines) + "\n")
        (stubs / name).chmod(0o755)

    def start(name, srun="", addresses="10.0.0.5 192.168.7.1", nodes=("node-1", "node-2"), **variables):
        stub("scontrol", f"[[ $1 == show ]] && printf '%s\\n' {' '.join(nodes)}; true")
        asked = (
            'case "$*" in'
            f' *"hostname -I"*) echo "{addresses}";;'
            ' *"ip -4"*) echo "3: ib0    inet 192.168.7.1/24 brd 192.168.7.255 scope global ib0";;'
            f" *) {srun or 'true'};; esac"
        )
        stub("srun", asked)
        environment = {
            "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "96",
            "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8",
            "OUT": "/shared/results",
        } | variables  # fmt: skip
        environment = {key: value for key, value in environment.items() if value is not None}
        with (tmp_path / "log").open("w") as log:
            return subprocess.Popen(["bash", CLUSTER / f"{name}.sbatch"], env=environment, stdout=log, stderr=log)

    start.log = lambda: (tmp_path / "log").read_text()
    start.calls = lambda: calls.read_text().splitlines() if calls.exists() else []
    return start


def ours(call):
    """The arguments of deadbench in a call of srun; those of Ray before them."""
    before, _, command = call.partition("python -m deadbench ")
    return before.split(), command.split()


@pytest.mark.subprocess
@pytest.mark.parametrize(("interface", "head"), [("", "10.0.0.5"), ("ib0", "192.168.7.1")])
def test_sbatch_makes_a_ray_whose_head_is_on_the_interface(slurm, interface, head):
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args
    from typer.main import get_command

    from deadbench.runners.cli.main import app

    job = slurm("slurm", IFACE=interface, SLURM_JOB_END_TIME=str(int(time.time()) + 3600))
    assert job.wait(30) == 0, slurm.log()
    before, command = ours(slurm.calls()[-1])
    separator = before.index("--")
    symmetric, limited = before[before.index("symmetric-run") + 1 : separator], before[separator + 1 :]
    assert symmetric[:4] == ["--address", f"{head}:6379", "--min-nodes", "2"]
    options = curate_and_validate_ray_start_args(symmetric)
    assert options == ["--num-cpus=96", "--num-gpus=8", "--include-dashboard=false"]
    assert start.make_context("start", ["--head", *options]).params["num_gpus"] == 8
    assert limited[:2] == ["timeout", "--signal=TERM"]
    assert 3600 - 300 - 30 < int(limited[2]) <= 3600 - 300
    assert command == ["run", "--suite", "quick", "--address", "auto", "--out", "/shared/results"]
    assert get_command(app).commands["run"].make_context("run", command).params["out"] == "/shared/results"


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("nodes", "listed", "addresses", "head"),
    [
        (("gpu-a-01",), "gpu-a-01", "10.0.0.5", "10.0.0.5"),
        (("node01", "node02", "node03", "node07"), "node[01-03,07]", "10.0.0.5 fd00::5", "10.0.0.5"),
        (("r1-n1", "r2-n1"), "r[1-2]-n1", "fd00::5 2001:db8::5 10.0.0.5 192.168.7.1", "10.0.0.5"),
        (("node-1",), "node-1", "fd00::5 fe80::1", None),
        (("node-1",), "node-1", "", None),
    ],
)
def test_the_head_is_on_the_first_node_at_its_first_ipv4_address(slurm, nodes, listed, addresses, head):
    job = slurm(
        "slurm",
        addresses=addresses,
        nodes=nodes,
        SLURM_JOB_NODELIST=listed,
        SLURM_JOB_NUM_NODES=str(len(nodes)),
    )
    code, calls = job.wait(30), slurm.calls()
    assert calls[0] == f"scontrol show hostnames {listed}"
    assert f"--nodelist={nodes[0]} hostname -I" in calls[1]
    if head is None:
        assert code != 0
        assert f"{nodes[0]} has no IPv4 address on any interface; set IFACE" in slurm.log()
        assert len(calls) == 2
        return
    assert code == 0, slurm.log()
    assert f"symmetric-run --address {head}:6379 --min-nodes {len(nodes)} " in calls[-1]


@pytest.mark.subprocess
def test_an_array_is_drivers_without_ray_on_one_result_set(slurm):
    from typer.main import get_command

    from deadbench.runners.cli.main import app

    job = slurm("slurm-array", SUITE="paper")
    assert job.wait(30) == 0, slurm.log()
    _, command = ours(slurm.calls()[-1])
    assert command == ["run", "--suite", "paper", "--address", "none", "--out", "/shared/results"]
    assert get_command(app).commands["run"].make_context("run", command).params["address"] == "none"
    text = (CLUSTER / "slurm-array.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --array=0-9\n" in text
    assert "ray " not in text.lower().replace("no ray,", ""), "it needs none"


@pytest.mark.subprocess
@pytest.mark.parametrize("name", BATCHES)
def test_the_exit_code_of_the_run_is_the_jobs(slurm, name):
    job = slurm(name, srun="exit 1")
    assert job.wait(30) == 1
    assert not any(call.startswith("scontrol requeue") for call in slurm.calls()), "a failed read fails again"


@pytest.mark.subprocess
@pytest.mark.parametrize(("left", "seconds"), [("100", "60"), (None, None)])
def test_ray_ends_after_the_run_whose_time_was_over_and_the_job_is_queued_again(slurm, left, seconds):
    end = str(int(time.time()) + int(left)) if left else None
    job = slurm("slurm", srun="exit 124", SLURM_JOB_END_TIME=end)
    assert job.wait(30) == 0, slurm.log()
    assert slurm.calls()[-1] == "scontrol requeue 77"
    limit = ours(slurm.calls()[-2])[0][-1]
    assert limit == seconds if left else int(limit) > 30e6, "where SLURM does not say when, there is no limit"


@pytest.mark.subprocess
def test_a_driver_of_an_array_is_told_before_its_time_is_over_and_queued_again(slurm, tmp_path):
    ended = tmp_path / "ended"
    job = slurm(
        "slurm-array", srun=f"trap 'touch {ended}; exit 130' TERM; touch {tmp_path}/up; while :; do sleep 0.02; done"
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0, slurm.log()
    assert ended.exists(), "it could keep what it had"
    assert slurm.calls()[-1] == "scontrol requeue 77"


@pytest.mark.subprocess
@pytest.mark.parametrize("name", BATCHES)
def test_a_job_without_a_place_for_results_says_so(slurm, name):
    job = slurm(name, OUT=None)
    assert job.wait(30) != 0
    assert "give OUT, an absolute folder that all nodes see, or a URI" in slurm.log()
    assert slurm.calls() == []


@pytest.mark.parametrize("name", BATCHES)
def test_what_is_preempted_is_queued_again(name):
    text = (CLUSTER / f"{name}.sbatch").read_text(encoding="utf-8")
    head, _, script = text.partition("set -euo pipefail")
    asked = {line.split()[1] for line in head.splitlines() if line.startswith("#SBATCH ")}
    assert {"--requeue", "--open-mode=append"} <= asked
    assert ("--signal=B:USR1@300" in asked) == ("trap again USR1" in script) == (name == "slurm-array")
    assert "#SBATCH" not in script, "SLURM reads none after the first command"
