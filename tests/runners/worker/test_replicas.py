"""Reads by replicas, and reads that are cut off and go on: the row of one undisturbed process, no token run twice."""

import json
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from deadbench.runners.cluster import actors
from deadbench.runners.driver.driver import execute
from deadbench.runners.driver.loop import Settings
from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.engines.streaming import StreamingEngine
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished, Progress, Remark
from deadbench.runners.jobs.job import JobError, Overrides
from deadbench.runners.planning.assign import place_jobs
from deadbench.runners.planning.hardware import parse_cluster
from deadbench.runners.planning.plan import make_plan
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker import forward, passes
from deadbench.runners.worker import saved_state as checkpoints
from deadbench.runners.worker.progress_folder import FOLDER, remove_checkpoints
from deadbench.runners.worker.run import run_model
from deadbench.suite.ranks import Ranks
from deadbench.suite.registry.loading import load_registry
from tests.conftest import save_tiny
from tests.runners.engines.test_tensor_parallel import LLAMA
from tests.suite.spectra.test_arrow_state import in_ranks

BATCH = 64
BATCHES = 8
EQUAL = [
    "family", "num_tokens", "num_distinct_inputs", "num_dead_1e4", "num_dead_1e6", "num_dead_1e8", "num_dead_1e10",
    "num_algebraic", "num_learned", "num_rounding", "kernel_exact", "blocks_preserved", "worst_block",
    "spectrum_method", "protocol_hash", "source_fingerprint", "tensor_parallel",
]  # fmt: skip
CLOSE = ["lambda_v", "lambda_second", "lambda_mean", "lambda_max", "depth", "depth_exact", "alignment",
         "worst_block_ratio", "lambda_control"]  # fmt: skip


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    save_tiny(folder / "neox")
    save_tiny(folder / "llama", LLAMA)
    (folder / "models.yaml").write_text(
        f"protocols: {{standard: {{tokens: {BATCH * BATCHES - 20}, sequence_length: 32}}}}\nsuites: {{}}\nmodels:\n"
        "  - {id: neox, source: neox, input: 'tokens:random', dtype: float32}\n"
        "  - {id: llama, source: llama, input: 'tokens:random', dtype: bfloat16}\n"
    )
    return folder / "models.yaml"


@pytest.fixture(scope="module")
def undisturbed(registry):
    """The tables of each model's trained read, by one process that nothing cuts off."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(forward, "BATCH_TOKENS", BATCH)
        return {model: rows_of(run_model(job_of(registry, model), "run", 1)) for model in ("neox", "llama")}


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(forward, "BATCH_TOKENS", BATCH)
    monkeypatch.setattr(checkpoints, "_WRITING_SHARE", 0)


def job_of(registry, model, read="trained", **overrides):
    (job,) = build_jobs(load_registry(registry), registry, [model], None, [read], Overrides(**overrides))
    return job


def rows_of(events):
    (event,) = (e for e in events if isinstance(e, Finished))
    assert event.row["status"] == "ok", event.traceback
    return {name: table.to_pylist() for name, table in event.tables.items()}


def assert_same(found, expected):
    row, reference = found["reads"][0], expected["reads"][0]
    assert {name: row[name] for name in EQUAL} == {name: reference[name] for name in EQUAL}
    assert [row[name] for name in CLOSE] == pytest.approx([reference[name] for name in CLOSE], rel=1e-6)
    for one, other in zip(found["blocks"], expected["blocks"], strict=True):
        names = ("block", "state", "rank_limited", "preserved", "bottom_coordinates")
        assert [one[name] for name in names] == [other[name] for name in names]
        assert one["sigma_min"] == pytest.approx(other["sigma_min"], rel=1e-6)
    verdicts = [[row["verdicts"] for row in each["spectra"]] for each in (found, expected)]
    assert verdicts[0] == verdicts[1]


class Interrupted(BaseException):
    """As a kill is to a process: nothing of ours catches it."""


def killed_at(monkeypatch, batch, taken=None):
    """Every batch that is taken is noted; at the `batch`-th the process ends."""
    noted = [] if taken is None else taken
    take = passes.Passes._take

    def counted(self, each, *rest):
        if len(noted) == batch:
            raise Interrupted
        noted.append(each)
        return take(self, each, *rest)

    monkeypatch.setattr(passes.Passes, "_take", counted)
    return noted


def interrupted(job, registry, tmp_path, monkeypatch, at=5):
    """Run until batch `at`, saving after each; returns the job, which now has a checkpoint."""
    (tmp_path / "out").mkdir()
    job = job.checkpointed(1e-9, str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        killed_at(patched, at)
        with pytest.raises(Interrupted):
            list(run_model(job, "run", 1))
    return job


@pytest.mark.parametrize("model", ["neox", "llama"])
def test_a_read_that_was_cut_off_runs_only_the_tokens_that_are_left(
    registry, undisturbed, tmp_path, monkeypatch, small_batches, model
):
    job = interrupted(job_of(registry, model), registry, tmp_path, monkeypatch)
    assert len(list((tmp_path / "out" / FOLDER).iterdir())) == 1
    taken = killed_at(monkeypatch, None)
    events = list(run_model(job, "run", 2))
    assert len(taken) == BATCHES - 5
    assert [e.text for e in events if isinstance(e, Remark)] == [
        f"goes on from its checkpoint, at {5 * BATCH} of {BATCHES * BATCH - 20} tokens"
    ]
    forwards = [e for e in events if isinstance(e, Progress) and e.phase == "forward"]
    assert forwards[0].done == 6 * BATCH
    found = rows_of(events)
    assert_same(found, undisturbed[model])
    assert found["reads"][0]["forward_seconds"] > 0


def test_a_read_in_several_passes_goes_on_in_the_pass_it_was_in(
    registry, undisturbed, tmp_path, monkeypatch, small_batches
):
    job = job_of(registry, "neox", accumulator_gb=0.0)
    job = interrupted(job, registry, tmp_path, monkeypatch, at=BATCHES + 3)
    taken = killed_at(monkeypatch, None)
    events = list(run_model(job, "run", 2))
    assert len(taken) == 3 * BATCHES - (BATCHES + 3), "three taps, one a pass"
    assert any(isinstance(e, Remark) and e.text.endswith("taps from 1") for e in events)
    assert_same(rows_of(events), undisturbed["neox"])


@pytest.mark.parametrize("fault", ["torn", "other version", "other input", "a folder"])
def test_a_checkpoint_that_does_not_fit_is_ignored_in_one_line(
    registry, undisturbed, tmp_path, monkeypatch, small_batches, fault
):
    job = interrupted(job_of(registry, "neox"), registry, tmp_path, monkeypatch)
    (file,) = (tmp_path / "out" / FOLDER).iterdir()
    if fault == "torn":
        file.write_bytes(file.read_bytes()[:-1000])
    elif fault == "a folder":
        file.unlink()
        file.mkdir()
    elif fault == "other version":
        monkeypatch.setattr(checkpoints, "versions", lambda: json.dumps({"torch": "3.0"}))
    else:
        monkeypatch.setattr(forward, "BATCH_TOKENS", 2 * BATCH)
    taken = killed_at(monkeypatch, None)
    events = list(run_model(replace(job).checkpointed(3600, str(tmp_path / "out")), "run", 2))
    (remark,) = (e.text for e in events if isinstance(e, Remark))
    assert remark.startswith("its checkpoint is ignored: ")
    assert "\n" not in remark
    assert len(taken) == (BATCHES // 2 if fault == "other input" else BATCHES)
    assert_same(rows_of(events), undisturbed["neox"])


def test_a_place_that_cannot_be_written_is_said_and_the_read_goes_on(
    registry, undisturbed, tmp_path, monkeypatch, small_batches
):
    job = job_of(registry, "neox")
    events = list(run_model(job.checkpointed(1e-9, str(tmp_path / "nowhere")), "run", 1))
    assert [e.text for e in events if isinstance(e, Remark)] == [
        f"no checkpoints: {tmp_path / 'nowhere'} is no folder of this node"
    ]
    assert_same(rows_of(events), undisturbed["neox"])
    assert not (tmp_path / "nowhere").exists()

    class Full:
        free = 2000

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: Full)
    events = list(run_model(job.checkpointed(1e-9, str(tmp_path)), "run", 1))
    remarks = {e.text for e in events if isinstance(e, Remark)}
    assert remarks == {"no checkpoint: it would take more than half of the 0.0 GB that are free"}
    assert list((tmp_path / FOLDER).iterdir()) == [], "nothing half written is left"
    assert_same(rows_of(events), undisturbed["neox"])


def test_checkpoints_go_to_a_bucket_too(registry, monkeypatch, small_batches):
    import fsspec

    job = job_of(registry, "neox").checkpointed(1e-9, "memory://results")
    with monkeypatch.context() as patched:
        killed_at(patched, 4)
        with pytest.raises(Interrupted):
            list(run_model(job, "run", 1))
    taken = killed_at(monkeypatch, None)
    rows_of(run_model(job, "run", 2))
    assert len(taken) == BATCHES - 4
    assert len(fsspec.filesystem("memory").ls(f"/results/{FOLDER}")) == 1
    remove_checkpoints("memory://results", job.reads[0])
    assert not fsspec.filesystem("memory").find("/results")


@pytest.mark.parametrize(("engine", "size"), [("torch", 11), ("streaming", 2)])
def test_replicas_in_threads(registry, undisturbed, monkeypatch, small_batches, engine, size):
    """More replicas than batches; and block by block, in step at every block."""
    made = {"torch": TorchEngine, "streaming": StreamingEngine}[engine]
    mine, lock = threading.local(), threading.Lock()
    load = made.load_trained

    def one_at_a_time(self, *arguments):
        with lock:  # transformers loads by way of globals
            return load(self, *arguments)

    def work(ranks):
        mine.ranks = ranks
        return list(run_model(job_of(registry, "neox", engine=engine, replicas=size), "run", 1))

    monkeypatch.setattr(made, "load_trained", one_at_a_time)
    monkeypatch.setattr(forward, "make_engine", lambda *_: made(torch.device("cpu"), ranks=mine.ranks))
    first, *others = in_ranks(size, work)
    assert_same(rows_of(first), undisturbed["neox"])
    assert all("spectra" not in rows_of(events) for events in others), "the first tells"


def test_replicas_and_a_resumed_read_refuse_repeated_rows_alike(registry, tmp_path, monkeypatch, small_batches):
    """One id all along is one row of a model without absolute positions; each replica sees all of them."""
    np.save(tmp_path / "ids.npy", np.arange(16)[:, None] % 12 + np.full((16, 32), 5))
    spec, mine, lock = f"tokens:{tmp_path / 'ids.npy'}", threading.local(), threading.Lock()
    load = TorchEngine.load_trained

    def one_at_a_time(self, *arguments):
        with lock:
            return load(self, *arguments)

    def job(**overrides):
        return job_of(registry, "llama", input=spec, dtype="float32", **overrides)

    def told(events):
        (event,) = (e for e in events if isinstance(e, Finished))
        return event.row["error"]

    def work(ranks):
        mine.ranks = ranks
        return list(run_model(job(replicas=2), "run", 1))

    expected = told(run_model(job(), "run", 1))
    assert "of 512 rows differ, for hidden size 16" in expected
    resumed = interrupted(job(), registry, tmp_path, monkeypatch)
    assert told(run_model(resumed, "run", 2)) == expected
    monkeypatch.setattr(TorchEngine, "load_trained", one_at_a_time)
    monkeypatch.setattr(forward, "make_engine", lambda *_: TorchEngine(torch.device("cpu"), ranks=mine.ranks))
    assert told(in_ranks(2, work)[0]) == expected


@pytest.mark.parametrize("torn", [False, True], ids=["both saved", "one did not"])
def test_ranks_that_share_a_model_go_on_together_or_begin_anew_together(
    registry, undisturbed, tmp_path, monkeypatch, small_batches, torn
):
    """Ranks that all see the whole stream, as tensor parallel does: saved at the same batch by all, or of no use."""
    out, mine, lock = tmp_path / "out", threading.local(), threading.Lock()
    out.mkdir()
    job = job_of(registry, "neox").checkpointed(1e-9, str(out))
    load, take, taken = TorchEngine.load_trained, passes.Passes._take, []

    def one_at_a_time(self, *arguments):
        with lock:
            return load(self, *arguments)

    def work(ranks):
        mine.ranks = ranks
        return list(run_model(job, "run", 1))

    def cut(self, *arguments):
        if arguments[-1].batch == 5:
            raise Interrupted
        taken.append(self._ranks.rank)
        return take(self, *arguments)

    def interrupted(ranks):
        with pytest.raises(Interrupted):
            work(ranks)

    monkeypatch.setattr(TorchEngine, "load_trained", one_at_a_time)
    monkeypatch.setattr(forward, "make_engine", lambda *_: TorchEngine(torch.device("cpu"), ranks=mine.ranks))
    with monkeypatch.context() as patched:
        patched.setattr(passes.Passes, "_take", cut)
        in_ranks(2, interrupted, "taps")
    assert sorted(path.name[-10:] for path in (out / FOLDER).iterdir()) == ["0of2.arrow", "1of2.arrow"]
    if torn:
        next((out / FOLDER).glob("*1of2.arrow")).unlink()
    taken.clear()
    again = killed_at(monkeypatch, None, taken)
    first, _ = in_ranks(2, work, "taps")
    assert len(again) == 2 * (BATCHES if torn else BATCHES - 5)
    (remark,) = (e.text for e in first if isinstance(e, Remark))
    assert remark.startswith(
        "the ranks' checkpoints are of different places" if torn else "goes on from its checkpoint"
    )
    assert_same(
        rows_of(first), undisturbed["neox"] | {"reads": [undisturbed["neox"]["reads"][0] | {"tensor_parallel": 2}]}
    )


def test_streaming_replicas_are_none_idle(registry, monkeypatch, small_batches):
    monkeypatch.setattr(forward, "make_engine", lambda *_: StreamingEngine(torch.device("cpu"), ranks=idle))
    idle = Ranks(0, 9, divided="tokens")
    *_, event = run_model(job_of(registry, "neox", engine="streaming", replicas=9), "run", 1)
    assert event.row["error"].startswith("9 replicas for 8 batches of about 64 tokens")
    assert event.row["error"].endswith("give --replicas 8 at most, or more --tokens")


def test_replicas_and_what_they_do_not_go_with(registry):
    with pytest.raises(JobError, match="neox: --replicas 2 does not go with --tensor-parallel 2; leave one out"):
        job_of(registry, "neox", replicas=2, tensor_parallel=2)
    one, two = job_of(registry, "neox"), job_of(registry, "neox", replicas=2)
    assert [r.identity() for r in one.reads] == [r.identity() for r in two.reads], "the same row"
    assert job_of(registry, "neox", "parameters", replicas=2).replicas == 1
    assert job_of(registry, "neox", "functional", replicas=2).replicas == 1
    (row,) = make_plan([two], parse_cluster("8x80GB"))
    assert (row.gpus, row.note, row.problem) == (2, "2 replicas divide the tokens", None)
    (row,) = make_plan([job_of(registry, "neox", replicas=9)], parse_cluster("8x80GB"))
    assert row.problem == "9 replicas need 9 GPUs and there are 8; give --replicas 8"
    (placed,), problems = place_jobs([two], parse_cluster("2x1x80GB"))
    assert (placed.replicas, problems) == (2, [])


def table(out, name):
    return pl.scan_parquet(out / name / "*.parquet").collect().to_dicts()


def run(registry, out, model, reads, replicas, settings=None):
    jobs = build_jobs(load_registry(registry), registry, [model], None, reads, Overrides(replicas=replicas))
    done = ResultStore(str(out)).finished()
    jobs = [job.without(done) for job in jobs]
    settings = settings or Settings("auto", timeout=300)
    return execute(jobs, ResultStore(str(out)), settings, Reporter(len(jobs)), f"run-{replicas}")


def small(folder, die_at=None, victim=0):
    """Actors with small batches that note each; the `victim` rank's process is killed once, at batch `die_at`."""

    def make(options):
        import ray

        from deadbench.runners.cluster.processes import mark_process

        class ModelActor:
            def __init__(self, token):
                mark_process(token)

            @ray.method(num_returns="streaming")
            def run(self, job, run_id, attempt, place, meeting):
                from deadbench.runners.worker import forward, passes
                from deadbench.runners.worker import saved_state as checkpoints
                from deadbench.runners.worker.group import join_group, run_rank

                forward.BATCH_TOKENS, checkpoints._WRITING_SHARE = BATCH, 0
                take = passes.Passes._take

                def counted(self, *arguments):
                    if place[0] == victim and arguments[-1].batch == die_at and not (folder / "dead").exists():
                        (folder / "dead").touch()
                        os.kill(os.getpid(), signal.SIGKILL)
                    with (folder / f"rank {place[0]} attempt {attempt}").open("a") as file:
                        file.write("x")
                    return take(self, *arguments)

                passes.Passes._take = counted
                if meeting is None:
                    yield from run_model(job, run_id, attempt)
                else:
                    yield from run_rank(join_group(*place, meeting), job, run_id, attempt)

        return ray.remote(max_restarts=0, max_task_retries=0, **options)(ModelActor)

    return make


def batches(folder):
    return {path.name: len(path.read_text()) for path in sorted(folder.glob("rank *"))}


@pytest.fixture(scope="module")
def one(ray_session, registry, tmp_path_factory):
    out, counts = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("counts")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(actors, "actor_class", small(counts))
        assert run(registry, out, "neox", ["parameters", "trained"], 1).ok == 2
    assert batches(counts) == {"rank 0 attempt 1": BATCHES}
    return out


def trained(out):
    return {
        name: [row for row in table(out, name) if row["read"] == "trained"] for name in ("reads", "blocks", "spectra")
    }


@pytest.mark.ray
def test_two_replicas_give_the_row_of_one(ray_session, registry, one, tmp_path, monkeypatch):
    monkeypatch.setattr(actors, "actor_class", small(tmp_path))
    out = tmp_path / "out"
    assert run(registry, out, "neox", ["parameters", "trained"], 2).ok == 2
    assert batches(tmp_path) == {"rank 0 attempt 1": BATCHES // 2, "rank 1 attempt 1": BATCHES // 2}
    assert len(table(out, "reads")) == 2, "parameters are read once"
    assert_same(trained(out), trained(one))
    assert trained(out)["reads"][0]["engine_detail"] == "resident on one device; tokens over 2 replicas"
    assert run(registry, out, "neox", ["trained"], 1).reads == [], "its row stands for the read"


@pytest.mark.ray
@pytest.mark.parametrize(("replicas", "victim", "at"), [(1, 0, 5), (2, 1, 2)], ids=["one actor", "one of two replicas"])
def test_kill_9_then_the_rest_from_the_checkpoint(
    ray_session, registry, one, tmp_path, monkeypatch, replicas, victim, at
):
    monkeypatch.setattr(actors, "actor_class", small(tmp_path, die_at=at, victim=victim))
    out = tmp_path / "out"
    saving = Settings("auto", timeout=300, max_retries=0, checkpoint_interval=1e-9)
    first = run(registry, out, "neox", ["trained"], replicas, saving)
    assert (first.ok, first.failed) == (0, 1)
    assert len(list((out / FOLDER).iterdir())) >= 1
    before = batches(tmp_path)
    second = run(registry, out, "neox", ["trained"], replicas, saving)
    assert (second.ok, second.failed) == (1, 0)
    share = BATCHES // replicas
    name = f"rank {victim} attempt 1"
    assert batches(tmp_path)[name] == share, f"none twice: {before[name]} before the kill, the rest after it"
    ok = {key: [row for row in rows if row.get("status", "ok") == "ok"] for key, rows in trained(out).items()}
    assert_same(ok, trained(one))
    assert list((out / FOLDER).iterdir()) == [], "what is stored needs no checkpoint"
