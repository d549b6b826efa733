"""Models that only sleep: real jobs, actors, driver and results, and rows that depend on nothing but their key.

As a program it is one driver on a cluster that runs already, which a test can kill; it prints what it took:

    python -m tests.runners.sleepers ADDRESS OUT MODELS SECONDS [GPUS OF A MODEL]...
"""

import json
import os
import sys
import time
from pathlib import Path

import polars as pl

from deadbench.runners.cluster import actors
from deadbench.runners.driver import driver
from deadbench.runners.driver.driver import execute, new_run_id
from deadbench.runners.driver.loop import Settings
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished, Progress, to_tables
from deadbench.runners.jobs.job import ModelJob, Overrides, ReadJob
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.results.store import ResultStore
from deadbench.suite.registry.loading import load_registry

READS = ("random", "functional")
SHARES = (0.25, 0.5, 1.0, 1.0, 2.0)


def sleeping_jobs(folder: Path, count: int, shares=SHARES) -> list[ModelJob]:
    """`count` models of two reads each; their sizes go through `shares` of a GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    config = "{model_type: gpt_neox, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 97}"
    models = [f"  - {{id: m{n:03}, config: {config}, input: 'tokens:random'}}\n" for n in range(count)]
    path = folder / "models.yaml"
    path.write_text(f"protocols: {{standard: {{tokens: 128}}}}\nsuites: {{}}\nmodels:\n{''.join(models)}")
    names = [f"m{n:03}" for n in range(count)]
    jobs = build_jobs(load_registry(path), path, names, None, list(READS), Overrides())
    return [sized(job, shares[n % len(shares)]) for n, job in enumerate(jobs)]


def sized(job: ModelJob, devices: float) -> ModelJob:
    """The job, asking for so many GPUs; several are one actor's, as with vLLM."""
    from dataclasses import replace

    if devices <= 1:
        return replace(job, gpu_share=devices, work=5e13)
    reads = tuple(replace(read, engine="vllm") for read in job.reads)
    return replace(job, reads=reads, tensor_parallel=int(devices), work=5e13 * devices)


def value_of(read: ReadJob) -> float:
    """The depth that this read always has."""
    return float(sum(read.label().encode()) % 97)


def sleeping(seconds: float):
    """An actor class whose reads take so long each and do nothing."""

    def make(options):
        import ray

        from deadbench.runners.cluster.processes import mark_process

        class ModelActor:
            def __init__(self, token):
                mark_process(token)

            @ray.method(num_returns="streaming")
            def run(self, job, run_id, attempt, place, meeting):
                from datetime import UTC, datetime

                for read in job.reads:
                    yield Progress(read.label(), "asleep")
                    time.sleep(seconds)
                    row = {"status": "ok", "depth": value_of(read), "family": "layernorm", "alignment": 1.0}
                    yield Finished(read, to_tables({"reads": [row]}, read, run_id, attempt, datetime.now(UTC)))
                    attempt = 1

        return ray.remote(max_restarts=0, max_task_retries=0, **options)(ModelActor)

    return make


def rows(out: Path) -> pl.DataFrame:
    """The rows of `reads`."""
    return pl.scan_parquet(out / "reads" / "*.parquet").collect()


def drive(address: str, out: Path, count: int, seconds: float, shares=SHARES) -> int:
    """One driver over what is not yet there, as `deadbench run` is; returns the exit code."""
    import ray

    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    actors.actor_class = sleeping(seconds)
    driver.check_gpu_nodes = lambda: ([], [])  # Ray has them, torch has not: nothing here would use them
    store = ResultStore(str(out))
    done = store.finished()
    jobs = [job.without(done) for job in sleeping_jobs(out / "registry", count, shares)]
    left = [job for job in jobs if job.reads]
    began, busy = time.monotonic(), time.thread_time()
    with Reporter(sum(len(job.reads) for job in left)) as reporter:
        summary = execute(left, store, Settings(address, timeout=120), reporter, new_run_id())
    took = {"seconds": time.monotonic() - began, "driver_cpu_seconds": time.thread_time() - busy}
    print(json.dumps(took | {"ok": summary.ok, "failed": summary.failed}), flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sizes = tuple(float(each) for each in sys.argv[5:]) or SHARES
    sys.exit(drive(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sizes))
