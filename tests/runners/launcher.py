"""A Ray cluster of one node made by Ray's cluster launcher: `ray up` with the local provider, over ssh on loopback.

The ssh server is the test's own (port, host key, authorised key), and gives whoever comes in a temporary home, so that
nothing of the user's is read or written. What is launched is known by that home in its environment and ended by its
process ids: no `ray down`, which calls `ray stop` and so ends every Ray of the machine.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.conftest import ROOT
from tests.runners.clusters import BIN, end_all, free_ports

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync")  # sshd is not in everybody's PATH
_SEARCHED = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"))
_PRIVILEGE_SEPARATION = Path("/run/sshd")  # which a server started by root wants, and the system's own start makes


def missing_programs() -> list[str]:
    """Which of the programs that the launcher needs are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SEARCHED) is None]


@dataclass(frozen=True)
class Launched:
    """The cluster's file, the token that its Ray asks for, and the environment of whoever talks to it."""

    file: Path
    token: str
    environment: dict[str, str]

    def ray(self, command: str, *arguments: str) -> subprocess.CompletedProcess:
        """Run `ray COMMAND cluster.yaml ARGUMENTS` in the repository's folder."""
        return subprocess.run(
            [BIN / "ray", command, self.file, *arguments],
            cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=300,
        )  # fmt: skip


@contextlib.contextmanager
def launched_cluster() -> Iterator[Launched]:
    """The cluster of examples/cluster/on-premises.yaml, on this machine; whatever was started is gone afterwards."""
    base = Path(tempfile.mkdtemp(prefix="db-", dir="/tmp"))  # short: sockets' paths are limited
    mine, node = base / "mine", base / "node"
    (mine / ".ray").mkdir(parents=True)
    node.mkdir()
    token = secrets.token_hex(32)
    (mine / ".ray" / "auth_token").write_text(token)
    (node / ".profile").write_text(". ~/.bashrc\n")  # as Debian's
    (node / ".bashrc").touch()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SSH_"))}
    environment = kept | {
        "HOME": str(mine),
        "PATH": os.pathsep.join((str(mine), str(BIN), os.environ["PATH"])),
        "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": str(base),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    cluster = Launched(base / "cluster.yaml", token, environment)
    cluster.file.write_text(yaml.safe_dump(_cluster(base)))
    try:
        with _ssh_server(base):
            up = cluster.ray("up", "--yes", "--no-config-cache")
            assert up.returncode == 0, up.stdout + up.stderr
            yield cluster
    finally:
        for home in (node, mine):
            end_all("HOME", str(home))
        shutil.rmtree(base, ignore_errors=True)


def _cluster(base: Path) -> dict:
    """The example's file for this machine: the tests' own installation, free ports, and folders of its own."""
    config = yaml.safe_load((ROOT / "examples/cluster/on-premises.yaml").read_text())
    gcs, *others = free_ports(8)
    names = ("dashboard", "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "ray-client-server", "runtime-env-agent", "node-manager")  # fmt: skip  # noqa: E501
    ours = [
        "--node-ip-address=127.0.0.1", f"--temp-dir={base}", "--num-cpus=2", "--num-gpus=0",
        f"--object-store-memory={100 * 2**20}", "--min-worker-port=0", "--max-worker-port=0",
        *(f"--{name}-port={port}" for name, port in zip(names, others, strict=True)),
    ]  # fmt: skip
    (start,) = config["head_start_ray_commands"]
    assert "--port=6379" in start
    assert "ray stop" not in start
    exports = f"PATH={BIN}:$PATH PYTHONPATH=$HOME/deadbench RAY_AUTH_MODE=token RAY_ADDRESS=127.0.0.1:{gcs}"
    return config | {
        "cluster_name": base.name,
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "auth": {"ssh_user": getpass.getuser(), "ssh_private_key": str(base / "key")},
        "setup_commands": [f"echo 'export {exports} RAY_USAGE_STATS_ENABLED=0' >> ~/.bashrc"],
        "head_start_ray_commands": [f"{start.replace('--port=6379', f'--port={gcs}')} {' '.join(ours)}"],
    }


@contextlib.contextmanager
def _ssh_server(base: Path) -> Iterator[None]:
    """An ssh server on loopback, and an `ssh` of the same port before the system's in the launcher's PATH."""
    sshd, ssh, keygen = (shutil.which(name, path=_SEARCHED) for name in PROGRAMS[:3])
    for name in ("key", "host_key"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", base / name], check=True)
    (port,) = free_ports(1)
    (base / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {base}/host_key\nAuthorizedKeysFile {base}/key.pub\n"
        "AuthenticationMethods publickey\nPermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nPidFile none\n"
        f"SetEnv HOME={base}/node PATH={os.environ['PATH']}\n"
    )
    wrapper = base / "mine" / "ssh"  # the launcher takes a user, a key and a proxy, but no port
    wrapper.write_text(f'#!/bin/sh\nexec {ssh} -F none -p {port} "$@"\n')
    wrapper.chmod(0o755)
    made = os.geteuid() == 0 and not _PRIVILEGE_SEPARATION.exists()
    if made:
        _PRIVILEGE_SEPARATION.mkdir(mode=0o755)
    log = base / "sshd.log"
    server = subprocess.Popen([sshd, "-D", "-f", base / "sshd_config", "-E", log])
    try:
        _wait(port, server, log)
        yield
    finally:
        server.terminate()
        server.wait(timeout=10)
        if made:
            _PRIVILEGE_SEPARATION.rmdir()


def _wait(port: int, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())
