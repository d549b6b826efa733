"""A run during which an actor, a node and the driver are killed at random moments, and started again.

python -m tests.runners.chaos --seeds 20 --models 40
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.conftest import ROOT
from tests.runners.sleepers import READS, rows, sleeping_jobs, value_of

_GPUS = 4  # logical, of each node
_STORE = 80 * 2**20


class Disorder:
    """One cluster of logical GPUs for one seed, and what happens to it."""

    def __init__(self, seed: int, models: int, seconds: float, folder: Path):
        from ray.cluster_utils import Cluster

        self.rng, self.models, self.seconds, self.out = random.Random(seed), models, seconds, folder / "out"
        self.said: list[str] = []
        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "object_store_memory": _STORE}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self._add_node() for _ in range(2)]
        self.driver: subprocess.Popen[bytes] | None = None

    def _add_node(self):
        return self.cluster.add_node(num_cpus=16, num_gpus=_GPUS, object_store_memory=_STORE)

    def start_driver(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.runners.sleepers", self.cluster.address]
        command += [str(self.out), str(self.models), str(self.seconds)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        with (self.out.parent / "driver.log").open("ab") as log:
            self.driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def finished(self) -> int:
        folder = self.out / "reads"
        return len(list(folder.glob("*.parquet"))) if folder.exists() else 0

    def kill_actor(self) -> None:
        actors = [p for p in psutil.process_iter(["cmdline"]) if "ray::ModelActor" in " ".join(p.info["cmdline"] or ())]
        ours = {child.pid for child in psutil.Process().children(recursive=True)}
        actors = [p for p in actors if p.pid in ours]
        if actors:
            self.rng.choice(actors).kill()
        self.said.append(f"actor at {self.finished()}" if actors else "no actor")

    def kill_node(self) -> None:
        """A raylet by kill -9; another node joins."""
        node = self.nodes.pop(self.rng.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self._add_node())
        self.said.append(f"node at {self.finished()}")

    def kill_driver(self) -> None:
        """By kill -9; the same command is given again."""
        assert self.driver is not None
        self.driver.send_signal(signal.SIGKILL)
        self.driver.wait()
        self.said.append(f"driver at {self.finished()}")
        self.start_driver()

    def go(self, patience: float) -> None:
        """Each of the three once, at a random number of finished reads and in random order; until the driver ends."""
        deadline = time.monotonic() + patience
        events = [self.kill_actor, self.kill_node, self.kill_driver]
        self.rng.shuffle(events)
        planned = self.models * len(READS)
        moments = sorted(self.rng.uniform(0, 0.85 * planned) for _ in events)
        self.start_driver()
        while self.driver is not None and self.driver.poll() is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.finished()} of {planned} reads after {patience:g} s; {self.said}")
            if events and self.finished() >= moments[0]:
                moments.pop(0)
                time.sleep(self.rng.uniform(0, self.seconds))
                events.pop(0)()
            time.sleep(0.05)
        assert self.driver is not None
        assert self.driver.returncode == 0, (self.out.parent / "driver.log").read_text()[-3000:]
        assert not events, f"the run was over before {[event.__name__ for event in events]}"

    def close(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()


def survive(seed: int, models: int, seconds: float, folder: Path, patience: float = 600.0) -> dict[str, object]:
    """One seed; returns what happened. Every read must be exactly one `ok` row, with its value, or honestly failed."""
    started = time.monotonic()
    disorder = Disorder(seed, models, seconds, folder)
    try:
        disorder.go(patience)
    finally:
        disorder.close()
    frame = rows(disorder.out)
    expected = {(r.model.id, r.read): value_of(r) for j in sleeping_jobs(folder / "again", models) for r in j.reads}
    seen = list(zip(frame["model"], frame["read"], strict=True))
    assert len(seen) == len(set(seen)), "a read counted twice"
    assert set(seen) == set(expected), "a read lost, or one that nobody asked for"
    failed = 0
    for model, read, status, depth, error in frame.select("model", "read", "status", "depth", "error").rows():
        if status == "ok":
            assert depth == expected[model, read]
        else:
            failed += 1
            assert "died" in error or "node" in error, f"{model} {read}: {error}"
    again = int((frame["attempt"] > 1).sum())
    seconds_taken = round(time.monotonic() - started, 1)
    return {"seed": seed, "killed": disorder.said, "failed": failed, "again": again, "seconds": seconds_taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--models", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.2)
    given = parser.parse_args()
    for seed in range(given.first, given.first + given.seeds):
        with tempfile.TemporaryDirectory(prefix="chaos") as folder:
            print(survive(seed, given.models, given.seconds, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
