"""Two nodes as network namespaces with two links: ranks and replicas meet on that of Ray's address alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

LINKS = {"other": "10.77.1", "rays": "10.77.2"}  # which were up in this order
RANK = """
import json, sys
from dataclasses import replace
import psutil, torch
import torch.distributed as dist
from deadbench.runners.doctor.rank_checks import reduced
from deadbench.runners.doctor.read_checks import twin_job
from deadbench.runners.jobs.events import Finished
from deadbench.runners.worker.group import join_group, run_rank

torch.set_num_threads(1)
rank, first, address = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.stdin.readline()
found = {"digest": reduced(rank, 2, (first, 29501), address).digest}
shared = twin_job("torch").over(2)
divided = twin_job("torch")
divided = replace(divided, reads=tuple(replace(read, replicas=2) for read in divided.reads))
for port, (name, job) in enumerate((("shared", shared), ("divided", divided)), 29502):
    group = join_group(rank, 2, (first, port))
    rows = [event.row for event in run_rank(group, job, "apart", 1) if isinstance(event, Finished)]
    group.ranks.gather(None)
    dist.destroy_process_group()
    found[name] = [[row["status"], row["depth"], row["error"]] for row in rows]
found["sent"] = {name: each.bytes_sent for name, each in psutil.net_io_counters(pernic=True).items()}
print(json.dumps(found))
"""


def namespaces_are_allowed():
    tools = all(shutil.which(name) for name in ("ip", "unshare", "nsenter"))
    return tools and subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.full
@pytest.mark.subprocess
@pytest.mark.skipif(not namespaces_are_allowed(), reason="network namespaces are root's, with ip, unshare and nsenter")
def test_ranks_and_replicas_of_two_nodes_meet_on_the_link_of_rays_address():
    nodes = []
    for number in (1, 2):
        command = ["unshare", "-n", sys.executable, "-W", "ignore", "-c", RANK, str(number - 1)]
        command += [f"{LINKS['rays']}.1", f"{LINKS['rays']}.{number}"]
        environment = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
        nodes.append(subprocess.Popen(
            command, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))  # fmt: skip
    try:
        for node in nodes:
            while os.readlink(f"/proc/{node.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
                assert node.poll() is None, node.stderr.read()
        for link, network in LINKS.items():
            ends = [f"dbt{link[:3]}{number}" for number in (1, 2)]
            _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for number, (node, end) in enumerate(zip(nodes, ends, strict=True), 1):
                _ip("link", "set", end, "netns", str(node.pid), "name", link)
                for words in (f"addr add {network}.{number}/24 dev {link}", f"link set {link} up", "link set lo up"):
                    _ip(*words.split(), within=node.pid)
        for node in nodes:
            node.stdin.write("go\n")
            node.stdin.flush()
        told = [node.communicate(timeout=200) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    first, second = (json.loads(out.splitlines()[-1]) if out else pytest.fail(err) for out, err in told)
    assert first["digest"] == second["digest"]
    for name in ("shared", "divided"):
        ((status, depth, error),) = first[name]
        assert (status, error, round(depth)) == ("ok", None, 14), name
        assert second[name] == []
    for found in (first, second):
        assert found["sent"]["rays"] > 2**22, "what was summed"
        assert found["sent"]["other"] < 10_000, "a neighbour is looked for, no more"


def _ip(*words, within=None):
    entered = ["nsenter", "-t", str(within), "-n"] if within else []
    subprocess.run([*entered, "ip", *words], check=True, capture_output=True)
