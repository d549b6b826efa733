"""Four drivers of one result set, as processes that are killed at random moments and started again.

python -m tests.runners.many_drivers --seeds 20

Each is `run --address none` with reads that only sleep. By turns a dead one is known as a dead process of this machine,
or only by its silence, as on another machine; some are not killed but stopped for longer than a lease, and go on.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

from tests.conftest import ROOT
from tests.runners.sleepers import rows, sleeping_jobs, value_of

DRIVERS, MODELS, LEASE = 4, 12, 1.5  # the last in seconds
READS = 2 * MODELS


def drive(out: Path, seconds: float, seed: int, *, far: bool) -> None:
    """One driver: what `deadbench run` does."""
    from deadbench.runners.driver import in_process, sharing
    from deadbench.runners.driver.driver import new_run_id
    from deadbench.runners.driver.loop import Settings
    from deadbench.runners.jobs.events import Progress
    from deadbench.runners.reporting.progress import Reporter
    from deadbench.runners.results import claims
    from deadbench.runners.results.store import ResultStore
    from deadbench.runners.worker import run as worker

    rng = random.Random(seed)

    def read(job):
        yield Progress(job.label(), "asleep")
        time.sleep(rng.uniform(0, 2 * seconds))
        if job.model.id == "m003":
            raise ValueError("no such norm")
        return {"reads": [{"depth": value_of(job), "family": "layernorm", "alignment": 1.0}]}

    worker.READ_FUNCTIONS = dict.fromkeys(worker.READ_FUNCTIONS, read)
    worker._quieten = lambda: None
    in_process.AGAIN_SECONDS = 0.1
    in_process.Sharing = lambda *given, **named: sharing.Sharing(*given, **named, lease=LEASE, beat=LEASE / 6)
    if far:
        claims.own_facts = lambda: {"host": "far"}
    store = ResultStore(str(out))
    done = store.finished()
    jobs = [job.without(done) for job in sleeping_jobs(out.parent / f"jobs-{os.getpid()}", MODELS)]
    jobs = [job for job in jobs if job.reads]
    with Reporter(sum(len(job.reads) for job in jobs)) as reporter:
        in_process.execute_in_process(jobs, store, Settings("none"), reporter, new_run_id())


def start(out: Path, seconds: float, seed: int, *, far: bool) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "tests.runners.many_drivers", "--drive", str(out)]
    command += ["--seconds", str(seconds), "--first", str(seed), *(["--far"] if far else [])]
    with (out.parent / "drivers.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)


def runs(out: Path) -> dict[str, tuple[str, str]]:
    """When each run that was not killed began and ended; of the others the end is their beginning."""
    records = [json.loads(path.read_text()) for path in out.glob("runs/*/run.json")]
    return {each["run_id"]: (each["started_at"], each["finished_at"] or each["started_at"]) for each in records}


def alone(known: dict[str, tuple[str, str]], run: str) -> bool:
    """Whether no other was there when a run began: the same command, given again, tries again what failed."""
    return not any(began < known[run][0] < ended for other, (began, ended) in known.items() if other != run)


def survive(seed: int, folder: Path, seconds: float = 0.15, kills: int = 4, patience: float = 120.0) -> dict:
    """One seed; returns what happened. Every read must be one row, and nothing of claims be left."""
    rng, out, began, said = random.Random(seed), folder / "out", time.monotonic(), []
    far = bool(seed % 2)
    starts = iter(range(100 * seed, 100 * seed + 99))

    def count() -> int:
        return len(list((out / "reads").glob("*.parquet")))

    drivers = [start(out, seconds, next(starts), far=far) for _ in range(DRIVERS)]
    stopped: list[tuple[float, subprocess.Popen]] = []
    moments = sorted(rng.uniform(0, 0.85 * READS) for _ in range(kills))
    try:
        while any(driver.poll() is None for driver in drivers):
            assert time.monotonic() - began < patience, f"{count()} of {READS} reads; {said}"
            while stopped and time.monotonic() > stopped[0][0]:
                stopped.pop(0)[1].send_signal(signal.SIGCONT)
            alive = [each for each in drivers if each.poll() is None and all(each is not s for _, s in stopped)]
            if moments and alive and count() >= moments[0]:
                moments.pop(0)
                victim = rng.choice(alive)
                if rng.random() < 0.4:
                    victim.send_signal(signal.SIGSTOP)
                    stopped.append((time.monotonic() + rng.uniform(0.5, 2.5) * LEASE, victim))
                    said.append(f"stopped at {count()}")
                else:
                    how = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
                    victim.send_signal(how)
                    victim.wait()
                    drivers[drivers.index(victim)] = start(out, seconds, next(starts), far=far)
                    said.append(f"{how.name} at {count()}")
            time.sleep(0.02)
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()
    assert [driver.returncode for driver in drivers] == [0] * DRIVERS, (folder / "drivers.log").read_text()[-3000:]
    frame = rows(out)
    expected = {(r.model.id, r.read): value_of(r) for j in sleeping_jobs(folder / "again", MODELS) for r in j.reads}
    ok = frame.filter(frame["status"] == "ok")
    seen = {(model, read): depth for model, read, depth in ok.select("model", "read", "depth").rows()}
    wanted = {key: value for key, value in expected.items() if key[0] != "m003"}
    assert ok.height == len(seen), "a read that is there twice"
    assert seen == wanted, "a read lost, or one with another value"
    failed = frame.filter(frame["status"] == "failed")
    assert set(failed["model"]) == {"m003"}
    assert failed["read"].n_unique() == 2
    assert failed.select("run_id", "read").is_unique().all()
    # Who begins when all is there may find others that have just left, whose records end a moment later.
    all_there = frame.group_by("model", "read").agg(pl.col("finished_at").min())["finished_at"].max().isoformat()
    for read in set(failed["read"]):
        first, *again = sorted(failed.filter(failed["read"] == read)["run_id"], key=lambda run: runs(out)[run][0])
        beside = [run for run in again if not alone(runs(out), run) and runs(out)[run][0] < all_there]
        assert not beside, (
            f"{read} failed in {first}, and again in {beside}; all there at {all_there}; {said}; {runs(out)}"
        )
    assert not (out / "_claims").exists() or not list((out / "_claims").iterdir())
    by = frame["run_id"].n_unique()
    return {"seed": seed, "far": far, "did": said, "by": by, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.15)
    parser.add_argument("--drive", type=Path)
    parser.add_argument("--far", action="store_true")
    given = parser.parse_args()
    if given.drive is not None:
        drive(given.drive, given.seconds, given.first, far=given.far)
        return
    for seed in range(given.first, given.first + given.seeds):
        with tempfile.TemporaryDirectory(prefix="drivers") as folder:
            print(survive(seed, Path(folder), given.seconds), flush=True)


if __name__ == "__main__":
    main()
