"""A run without Ray: the rows are the worker's own, and what has finished is kept whatever comes."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import polars as pl
import pytest

from deadbench.runners.driver.driver import StoppedError
from deadbench.runners.driver.in_process import execute_in_process
from deadbench.runners.driver.loop import Settings
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished, Progress
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.planning.assign import in_one_process
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker import run as worker
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, TWINS
from tests.runners.sleepers import sleeping_jobs

TWIN = TWINS / "layernorm" / "step4096"
# What says when and in which process a row was made.
OF_THE_RUN = {"run_id", "started_at", "finished_at", "load_seconds", "forward_seconds", "spectrum_seconds",
              "peak_host_bytes"}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(first, second)`: two models of two reads each, done by these functions in turn; returns the summary."""
    monkeypatch.setattr(worker, "_quieten", lambda: None)
    store = ResultStore(str(tmp_path / "out"))

    def go(*functions, timeout=60.0):
        jobs, turns = sleeping_jobs(tmp_path / "jobs", 2), iter(functions)

        def read(job):
            yield Progress(job.label(), "forward")
            return next(turns)()

        monkeypatch.setattr(worker, "READ_FUNCTIONS", dict.fromkeys(worker.READ_FUNCTIONS, read))
        with Reporter(4) as reporter:
            return execute_in_process(jobs, store, Settings("none", timeout), reporter, "run")

    go.out = tmp_path / "out"
    return go


def rows(out):
    return pl.read_parquet(out / "reads" / "*.parquet").sort("finished_at").select("model", "read", "status", "error")


def done():
    return {"reads": [{"depth": 3.0, "alignment": 1.0, "family": "layernorm"}]}


def fail():
    raise ValueError("no such norm")


def test_every_read_is_a_row_failed_or_not_in_order(run):
    summary = run(done, fail, done, done)
    assert (summary.ok, summary.failed) == (3, 1)
    assert rows(run.out).rows() == [
        ("m000", "random", "ok", None),
        ("m000", "functional", "failed", "no such norm"),
        ("m001", "random", "ok", None),
        ("m001", "functional", "ok", None),
    ]
    record = json.loads((run.out / "runs" / "run" / "run.json").read_text())
    assert (record["status"], record["cluster"]["address"]) == ("finished", "none")
    assert [each["status"] for each in record["reads"]] == ["ok", "failed", "ok", "ok"]
    assert [each["nodes"] for each in record["placements"]] == [["this process"], ["this process"]]


def test_an_interrupt_loses_nothing_that_finished(run):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(done, done, interrupt)
    assert rows(run.out)["model"].to_list() == ["m000", "m000"]
    assert json.loads((run.out / "runs" / "run" / "run.json").read_text())["status"] == "interrupted"
    assert len(ResultStore(str(run.out)).finished()) == 2


def test_a_read_that_hangs_is_a_failed_row_and_the_next_goes_on(run):
    def hang():
        time.sleep(30)

    importlib.import_module("torch")  # which a first read waits for: here that is no silence
    started = time.monotonic()
    summary = run(done, hang, done, done, timeout=0.2)
    assert time.monotonic() - started < 10
    assert (summary.ok, summary.failed) == (3, 1)
    assert rows(run.out)["error"].to_list()[1] == "no progress for 0.2 s (--timeout)"


def test_a_lost_gpu_ends_the_run_after_its_row(run):
    def lose():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(StoppedError, match="can use its GPU no more: give the same command to go on"):
        run(done, lose, done, done)
    assert rows(run.out)["status"].to_list() == ["ok", "failed"]


def test_an_engine_of_other_processes_carries_its_reason(tmp_path):
    (job,) = sleeping_jobs(tmp_path, 1)
    (left,) = in_one_process([replace(job, reads=(replace(job.reads[0], engine="vllm"), job.reads[1]))])
    assert left.reads[0].error.startswith("vllm runs in processes of its own; give --engine torch")
    assert left.reads[1].error is None


def test_what_one_process_cannot_do_is_refused(deadbench):
    for command in ("run", "plan"):
        code, _, error = deadbench(command, TWIN, "--address", "none", "--replicas", "2")
        assert code == 2
        assert "--address none is one process; leave out --tensor-parallel and --replicas" in error


@pytest.mark.subprocess
def test_from_the_shell_without_ray_the_rows_are_the_workers_own(tmp_path):
    """To the bit; a second time nothing is read again; and Ray cannot even be imported."""
    script = (
        "import sys; sys.modules['ray'] = None; sys.argv[0] = 'deadbench';"
        "from deadbench.runners.cli.main import main; main()"
    )
    command = [sys.executable, "-c", script, "run", str(TWIN), "--address", "none", "--out", str(tmp_path), "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first, second = (
        subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["ok"] == 3
    assert (json.loads(second.stdout)["ok"], json.loads(second.stdout)["skipped"]) == (0, 3)
    path = ROOT / "models.yaml"
    (job,) = build_jobs(load_registry(path), path, [str(TWIN)], None, None, Overrides())
    for event in worker.run_model(job, "run", 1):
        if isinstance(event, Finished):
            expected, read = event.row, event.job.read
            (found,) = pl.read_parquet(tmp_path / "reads" / "*.parquet").filter(read=read).to_dicts()
            assert {n: v for n, v in found.items() if n not in OF_THE_RUN} == {
                n: v for n, v in expected.items() if n not in OF_THE_RUN
            }
            for table in event.tables.keys() - {"reads"}:
                same = pl.read_parquet(tmp_path / table / "*.parquet").filter(read=read).drop("run_id")
                assert same.to_dicts() == pl.from_arrow(event.tables[table]).drop("run_id").to_dicts()
