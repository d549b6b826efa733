"""The driver on a real local Ray: what dies becomes failed rows, the others go on, nothing finished is lost."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
import urllib.request

import polars as pl
import psutil
import pytest

from deadbench.runners.cluster import actors, joining, nodes, processes
from deadbench.runners.cluster.joining import JoinError
from deadbench.runners.driver import loop
from deadbench.runners.driver.driver import execute
from deadbench.runners.driver.loop import Settings
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.results.store import ResultStore
from deadbench.suite.registry.loading import load_registry
from tests.conftest import save_tiny
from tests.runners.sleepers import sleeping

pytestmark = pytest.mark.ray


@pytest.fixture
def registry(tmp_path):
    """Three tiny models, the first with five checkpoints."""
    for step in range(5):
        save_tiny(tmp_path / "series" / f"step{step}", seed=step)
    save_tiny(tmp_path / "b")
    save_tiny(tmp_path / "c")
    path = tmp_path / "models.yaml"
    path.write_text(
        "protocols: {standard: {tokens: 8D}}\nsuites: {}\nmodels:\n"
        "  - {id: a, source: series, input: 'tokens:random', parameters: 9, checkpoints: {pattern: 'step{step}', "
        "first: 0, last: 4, every: 1}}\n"
        "  - {id: b, source: b, input: 'tokens:random'}\n"
        "  - {id: c, source: c, input: 'tokens:random'}\n"
    )
    return path


@pytest.fixture
def asleep(monkeypatch):
    """Reads that take a fifth of a second and measure nothing."""
    monkeypatch.setattr(actors, "actor_class", sleeping(0.2))


def run(registry, out, models=("a", "b", "c"), reads=None, settings=None, fresh=False, run_id="run"):
    jobs = build_jobs(load_registry(registry), registry, list(models), None, reads, Overrides())
    store = ResultStore(str(out))
    done = set() if fresh else store.finished()
    left = [job for job in (job.without(done) for job in jobs) if job.reads]
    with Reporter(1) as reporter:
        return execute(left, store, settings or Settings(), reporter, run_id)


def rows(out):
    return pl.scan_parquet(out / "reads" / "*.parquet").collect()


def acting(body):
    """An actor class whose runs are `body(job)` and no event."""

    def make(options):
        import ray

        class ModelActor:
            def __init__(self, token):
                processes.mark_process(token)

            @ray.method(num_returns="streaming")
            def run(self, job, run_id, attempt, place, meeting):
                body(job)
                yield from ()

        return ray.remote(max_restarts=0, max_task_retries=0, **options)(ModelActor)

    return make


def lives(pid):
    with contextlib.suppress(psutil.NoSuchProcess):  # it may end between two looks
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def actor_processes():
    found = []
    for process in psutil.Process().children(recursive=True):  # not those of another Ray on this machine
        with contextlib.suppress(psutil.Error):
            if "ModelActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_when(out, model, count):
    """Kill -9 the actor of the running model once `count` of its rows are there."""

    def watch():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            files = list((out / "reads").glob("*.parquet")) if (out / "reads").exists() else []
            if len(files) >= count and actor_processes():
                for process in actor_processes():
                    os.kill(process.pid, signal.SIGKILL)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_every_read_is_one_row_and_a_second_run_reads_nothing(ray_session, registry, tmp_path):
    summary = run(registry, tmp_path / "out")
    assert (summary.ok, summary.failed) == (5 * 2 + 1 + 3 + 3, 0)
    frame = rows(tmp_path / "out")
    assert frame.select("model", "revision", "read").is_unique().all()
    assert frame["status"].unique().to_list() == ["ok"]
    again = build_jobs(load_registry(registry), registry, ["a", "b", "c"], None, None, Overrides())
    done = ResultStore(str(tmp_path / "out")).finished()
    assert [job.without(done).reads for job in again] == [(), (), ()]


def test_kill_9_of_an_actor_loses_the_read_that_it_was_at(ray_session, registry, tmp_path, asleep):
    out = tmp_path / "out"
    killer = kill_when(out, "a", 2)
    summary = run(registry, out, ["a"], settings=Settings(max_retries=0))
    killer.join()
    frame = rows(out)
    assert len(frame) == 11, "every planned read is one row"
    failed = frame.filter(pl.col("status") == "failed")
    assert (summary.ok, summary.failed, failed.height) == (10, 1, 1), "the reads after it are read by another process"
    assert failed["error"].to_list() == ["the process of this model died: killed, or crashed"]
    assert frame["attempt"].unique().to_list() == [1]


def test_a_segfault_is_told_and_tried_again(ray_session, registry, tmp_path, monkeypatch):
    def crash(job):
        import ctypes

        ctypes.string_at(0)

    monkeypatch.setattr(actors, "actor_class", acting(crash))
    summary = run(registry, tmp_path / "out", ["b"], reads=["parameters"])
    row = rows(tmp_path / "out").row(0, named=True)
    assert (summary.failed, row["attempt"]) == (1, 2)
    assert row["error"] == "the process of this model died: killed, or crashed (segmentation fault)"


def test_a_segfault_is_told_of_a_process_that_never_said_where_it_is(ray_session, registry, tmp_path, monkeypatch):
    def crash(_):
        import ctypes

        ctypes.string_at(0)

    monkeypatch.setattr(actors, "_home", crash)
    monkeypatch.setattr(actors, "actor_class", acting(lambda job: None))
    run(registry, tmp_path / "out", ["b"], reads=["parameters"], settings=Settings(max_retries=0))
    error = rows(tmp_path / "out")["error"].item()
    assert error == "the process of this model died: killed, or crashed (segmentation fault)"


def test_the_next_run_reads_only_what_failed(ray_session, registry, tmp_path, asleep):
    out = tmp_path / "out"
    killer = kill_when(out, "a", 3)
    first = run(registry, out, ["a"], settings=Settings(max_retries=0))
    killer.join()
    second = run(registry, out, ["a"])
    assert (second.ok, second.failed) == (first.failed, 0)


def test_with_retries_the_rest_is_read_by_another_attempt(ray_session, registry, tmp_path, asleep):
    out = tmp_path / "out"
    killer = kill_when(out, "a", 2)
    summary = run(registry, out, ["a"], settings=Settings(max_retries=1))
    killer.join()
    frame = rows(out)
    assert (summary.ok, summary.failed, frame.height) == (11, 0, 11)
    assert sorted(frame["attempt"].unique()) == [1, 2]


def test_a_broken_model_fails_and_the_others_go_on(ray_session, registry, tmp_path):
    (tmp_path / "b" / "model.safetensors").write_bytes(b"broken")
    summary = run(registry, tmp_path / "out", ["b", "c"])
    frame = rows(tmp_path / "out")
    assert (summary.ok, summary.failed) == (4, 2)
    assert set(frame.filter(pl.col("status") == "failed")["model"]) == {"b"}


def test_what_cannot_be_opened_is_a_failed_row_and_takes_no_device(ray_session, registry, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "b")
    shutil.rmtree(tmp_path / "series" / "step3")
    started = []

    def recorded(job, *rest):
        started.append([read.label() for read in job.reads])
        return actors.start(job, *rest)

    monkeypatch.setattr(actors, "actor_class", sleeping(0.0))
    monkeypatch.setattr(loop, "start", recorded)
    summary = run(registry, tmp_path / "out", ["a", "b"], ["trained"])
    frame = rows(tmp_path / "out")
    failed = frame.filter(pl.col("status") == "failed").sort("model")
    assert (summary.ok, summary.failed, frame.height) == (4, 2, 6)
    assert failed["model"].to_list() == ["a", "b"]
    assert failed["error"].str.contains("no such directory").all()
    assert started == [[f"a step{step} trained" for step in (0, 1, 2, 4)]]


def test_a_silent_actor_is_given_up(ray_session, registry, tmp_path, monkeypatch):
    monkeypatch.setattr(actors, "actor_class", acting(lambda job: time.sleep(600)))
    summary = run(registry, tmp_path / "out", ["b"], settings=Settings(timeout=2, max_retries=0))
    assert (summary.ok, summary.failed) == (0, 3)
    assert set(rows(tmp_path / "out")["error"]) == {"no progress for 2 s (--timeout)"}


def test_a_run_opens_no_port_and_keeps_no_token(ray_session, registry, tmp_path, monkeypatch, deadbench):
    def listening():
        return {each.laddr for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN}

    token, before, during = "hf_secretsecretsecret", listening(), []
    write = ResultStore.write

    def watched(self, *arguments):
        during.append(listening())
        write(self, *arguments)

    monkeypatch.setattr(ResultStore, "write", watched)
    monkeypatch.setenv("HF_TOKEN", token)
    out = tmp_path / "out"
    code, printed, err = deadbench("run", "b", f"none/{token}", "--registry", registry, "--out", out)
    assert code == 1, err
    assert token not in printed + err
    code, printed, err = deadbench("run", "b", "--registry", registry, "--out", out)
    assert code == 0, err
    assert len(during) >= 3
    assert set().union(*during) <= before, "Ray's own ports, opened when it was started"
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any(path.name == "run.json" for path in files)
    assert [path for path in files if token.encode() in path.read_bytes()] == []
    assert token not in printed + err


def test_actors_are_gone_afterwards(ray_session, registry, tmp_path):
    run(registry, tmp_path / "out", ["b"])
    deadline = time.monotonic() + 20
    while actor_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert actor_processes() == []


@pytest.mark.parametrize("failing", [False, True])
def test_what_an_actor_started_is_gone_before_the_next_model(ray_session, registry, tmp_path, monkeypatch, failing):
    """A child in a session of its own, which outlives the kill of its parent."""
    pids = tmp_path / "pids"
    pids.mkdir()

    def body(job):
        import subprocess

        alive = [p.name for p in pids.iterdir() if lives(int(p.name))]
        (tmp_path / f"{job.model_id}.alive").write_text(str(alive))
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        (pids / str(child.pid)).touch()
        if failing:
            os._exit(1)

    monkeypatch.setattr(actors, "actor_class", acting(body))
    monkeypatch.setattr(nodes, "_CPU_SLOTS", 1)
    run(registry, tmp_path / "out", ["b", "c"], ["parameters"], Settings(max_retries=0))
    assert [(tmp_path / f"{model}.alive").read_text() for model in "bc"] == ["[]", "[]"]
    assert len(list(pids.iterdir())) == 2
    assert not any(lives(int(p.name)) for p in pids.iterdir())


def test_an_interrupt_stops_the_actors_and_keeps_what_finished(ray_session, registry, tmp_path, monkeypatch, asleep):
    out = tmp_path / "out"
    write = ResultStore.write

    def interrupt_after_three(self, tables, stamp=None):
        write(self, tables, stamp)
        if len(list((out / "reads").glob("*"))) == 3:
            monkeypatch.setattr(ResultStore, "write", write)  # once
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    monkeypatch.setattr(ResultStore, "write", interrupt_after_three)
    with pytest.raises(KeyboardInterrupt):
        run(registry, out, ["a"])
    assert rows(out).height == 3
    record = json.loads(next((out / "runs").glob("*/run.json")).read_text())
    assert (record["status"], sum(read["status"] == "ok" for read in record["reads"])) == ("interrupted", 3)
    summary = run(registry, out, ["a"])
    assert (summary.ok, rows(out).height) == (8, 11)


def test_prometheus_reads_a_run_at_the_nodes_own_endpoint(ray_session, registry, tmp_path, asleep):
    summary = run(registry, tmp_path / "out", ["b", "c"], run_id="watched")
    assert summary.ok == 6
    seen, deadline = ([], []), time.monotonic() + 60  # Ray reports every ten seconds
    while (sum(seen[0]), seen[1]) != (6, [0.0]) and time.monotonic() < deadline:
        time.sleep(0.5)
        series = scraped('run_id="watched"')
        seen = series("reads_total"), series("running_models")
    assert (sum(seen[0]), seen[1]) == (6, [0.0])


def scraped(label):
    """What finds the values of a series with this label at the metrics endpoint of this node."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if label in line]
    return lambda name: [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"ray_deadbench_{name}{{")]


def test_an_address_that_answers_nobody_is_one_line(monkeypatch):
    import ray

    if ray.is_initialized():
        monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(**kwargs):
        raise ConnectionError("no\nanswer")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(joining, "check_answers", lambda address: None)
    with pytest.raises(JoinError, match=r"Ray at 'host:1' cannot be joined \(ConnectionError: no answer\)"):
        joining.connect("host:1")
