"""A real Ray cluster of one node, started as an administrator starts it: by `ray start`, with token authentication.

Everything is its own, temporary folder, home, token and ports, and what was started is ended by its process ids: no
`ray stop`, which would end every Ray of the machine.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
START_SECONDS = 180


@dataclass(frozen=True)
class RayCluster:
    """Where it is, and the environment in which `ray` and its jobs find it."""

    gcs: str
    dashboard: str
    environment: dict[str, str]

    def ray(self, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess:
        """Run `ray ARGUMENTS`; `changes` to the environment, None to take a variable away."""
        environment = {k: v for k, v in (self.environment | changes).items() if v is not None}
        return subprocess.run(
            [BIN / "ray", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300
        )


@contextlib.contextmanager
def ray_cluster(cpus: int = 2) -> Iterator[RayCluster]:
    """A running cluster; whatever it started is gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="db-", dir="/tmp"))  # short: sockets' paths are limited
    gcs, dashboard, *others = free_ports(8)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = kept | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(home),
    }
    names = ("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "ray-client-server", "runtime-env-agent", "node-manager")  # fmt: skip  # noqa: E501
    command = [
        BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={home}", f"--num-cpus={cpus}",
        "--num-gpus=0", f"--object-store-memory={100 * 2**20}", "--min-worker-port=0", "--max-worker-port=0",
        *(f"--{name}-port={port}" for name, port in zip(names, others, strict=True)),
    ]  # fmt: skip
    with (home / "start.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    cluster = RayCluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environment)
    try:
        _wait(cluster, head, home / "start.log")
        yield cluster
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=20)
        end_all("RAY_AUTH_TOKEN", environment["RAY_AUTH_TOKEN"])
        head.wait(timeout=10)
        shutil.rmtree(home, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait(cluster: RayCluster, head: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    host, port = cluster.dashboard.removeprefix("http://").split(":")
    while time.monotonic() < deadline and head.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            break
        time.sleep(0.1)
    while time.monotonic() < deadline and head.poll() is None:
        if cluster.ray("job", "list", f"--address={cluster.dashboard}").returncode == 0:
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def end_all(variable: str, value: str) -> None:
    """End every process of this machine that has `variable` as `value` in its environment, but this one."""
    ours = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                process.kill()
                ours.append(process)
    psutil.wait_procs(ours, timeout=10)
