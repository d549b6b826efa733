"""A streaming read that is cut off anywhere: it goes on where it was saved, and the row is equal to the bit."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from deadbench.analysis.results import scan
from deadbench.runners.engines.streaming import StreamingEngine
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished, Progress, Remark, SilenceError
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.worker import forward
from deadbench.runners.worker import saved_state as checkpoints
from deadbench.runners.worker.progress_folder import FOLDER
from deadbench.runners.worker.run import run_model
from deadbench.suite.reads.residual import ResidualRead
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, save_tiny
from tests.runners.engines.test_tensor_parallel import LLAMA
from tests.runners.worker.test_replicas import Interrupted, rows_of
from tests.suite.spectra.test_arrow_state import in_ranks

BATCH, BATCHES = 64, 4
OF_TIME = ("load_seconds", "forward_seconds", "spectrum_seconds", "started_at", "finished_at", "peak_host_bytes")


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    save_tiny(folder / "neox")
    save_tiny(folder / "llama", LLAMA)
    (folder / "models.yaml").write_text(
        f"protocols: {{standard: {{tokens: {BATCH * BATCHES - 20}, sequence_length: 32}}}}\nsuites: {{}}\nmodels:\n"
        "  - {id: neox, source: neox, input: 'tokens:random', dtype: float32}\n"
        "  - {id: llama, source: llama, input: 'tokens:random', dtype: bfloat16}\n"
    )
    return folder / "models.yaml"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(forward, "BATCH_TOKENS", BATCH)
    monkeypatch.setattr(checkpoints, "_WRITING_SHARE", 0)


def job_of(registry, model, read, **overrides):
    jobs = build_jobs(
        load_registry(registry), registry, [model], None, [read], Overrides(engine="streaming", **overrides)
    )
    return jobs[0]


def saving(registry, model, read, out, **overrides):
    out.mkdir(exist_ok=True)
    return job_of(registry, model, read, **overrides).checkpointed(1e-9, str(out))


def bits(tables):
    """All that was read, without what a clock says."""
    return {
        name: [{key: repr(value) for key, value in row.items() if key not in OF_TIME} for row in rows]
        for name, rows in tables.items()
    }


def cut_after(monkeypatch, saves, job):
    """Run until that many checkpoints are written."""
    save, written = checkpoints.SavedRead.save, []

    def counted(self, *arguments, **also):
        save(self, *arguments, **also)
        assert not self.remark
        written.append(arguments[0].swept)
        if len(written) == saves:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.SavedRead, "save", counted)
        with pytest.raises(Interrupted):
            list(run_model(job, "run", 1))
    return written[-1]


@pytest.mark.parametrize(
    ("model", "read", "taps", "blocks"), [("neox", "random", "all", 2), ("llama", "trained", "every:2", 3)]
)
def test_cut_after_any_batch_of_any_block_the_row_is_equal_to_the_bit(
    registry, tmp_path, monkeypatch, model, read, taps, blocks
):
    expected = bits(rows_of(run_model(job_of(registry, model, read, taps=taps), "run", 1)))
    moments = BATCHES * blocks - 1  # after the last batch of the last block nothing is left to be lost
    for moment in range(1, moments + 1):
        job = saving(registry, model, read, tmp_path / f"{moment}", taps=taps)
        swept = cut_after(monkeypatch, moment, job)
        assert swept == moment // BATCHES
        events = list(run_model(job, "run", 1))
        assert [e.text for e in events if isinstance(e, Remark)] == [
            f"goes on from its checkpoint, after block {swept}"
        ]
        told = [e.done for e in events if isinstance(e, Progress) and e.phase == "blocks"]
        assert told == [step / BATCHES for step in range(moment + 1, BATCHES * blocks + 1)], "no batch is run twice"
        assert bits(rows_of(events)) == expected


@pytest.mark.parametrize("fault", ["a bit", "torn", "another model"])
def test_a_checkpoint_that_is_not_what_was_written_is_not_used(registry, tmp_path, monkeypatch, fault):
    expected = bits(rows_of(run_model(job_of(registry, "neox", "random"), "run", 1)))
    job = saving(registry, "neox", "random", tmp_path / "out")
    cut_after(monkeypatch, 5, job)
    (file,) = (tmp_path / "out" / FOLDER).iterdir()
    written = bytearray(file.read_bytes())
    if fault == "a bit":
        written[len(written) // 2] ^= 1
        file.write_bytes(written)
    elif fault == "torn":
        file.write_bytes(written[:-100])
    else:  # as if transformers had changed under the same version
        monkeypatch.setattr("deadbench.runners.engines.sweep_state._digest", lambda *_: "other")
    events = list(run_model(job, "run", 1))
    remarks = [e.text for e in events if isinstance(e, Remark)]
    nowhere = "its checkpoint leads nowhere (the model does not come to the place where it was saved): begins anew"
    assert remarks[-1] == (nowhere if fault == "another model" else "its checkpoint is ignored: it is not whole")
    assert bits(rows_of(events)) == expected


def test_a_read_that_goes_on_and_is_silent_ends_and_is_not_begun_anew(registry, tmp_path, monkeypatch):
    job = saving(registry, "neox", "random", tmp_path / "out")
    swept = cut_after(monkeypatch, 5, job)

    def silent(self, *arguments):
        raise SilenceError("no progress for 5 s (--timeout)")

    with monkeypatch.context() as patched:
        patched.setattr(ResidualRead, "close_pass", silent)
        events = list(run_model(job, "run", 1))
    assert [e.text for e in events if isinstance(e, Remark)] == [f"goes on from its checkpoint, after block {swept}"]
    assert [(e.row["status"], e.row["error"]) for e in events if isinstance(e, Finished)] == [
        ("failed", "no progress for 5 s (--timeout)")
    ]


def test_replicas_save_at_blocks_and_go_on_together(registry, tmp_path, monkeypatch):
    mine, lock = threading.local(), threading.Lock()
    load, save = StreamingEngine.load_trained, checkpoints.SavedRead.save

    def one_at_a_time(self, *arguments):
        with lock:  # transformers loads by way of globals
            return load(self, *arguments)

    def work(ranks):
        mine.ranks = ranks
        return list(run_model(saving(registry, "neox", "trained", tmp_path / "out", replicas=2), "run", 1))

    def cut(self, *arguments, **also):
        save(self, *arguments, **also)
        raise Interrupted

    def interrupted(ranks):
        with pytest.raises(Interrupted):
            work(ranks)

    monkeypatch.setattr(StreamingEngine, "load_trained", one_at_a_time)
    monkeypatch.setattr(forward, "make_engine", lambda *_: StreamingEngine(torch.device("cpu"), ranks=mine.ranks))
    (tmp_path / "out").mkdir()
    undisturbed, _ = in_ranks(2, work)
    for left in (tmp_path / "out" / FOLDER).iterdir():
        left.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.SavedRead, "save", cut)
        in_ranks(2, interrupted)
    assert len(list((tmp_path / "out" / FOLDER).iterdir())) == 2
    first, _ = in_ranks(2, work)
    assert [e.text for e in first if isinstance(e, Remark)] == ["goes on from its checkpoint, after block 1"]
    assert bits(rows_of(first)) == bits(rows_of(undisturbed))


KILLED = """
import sys
from pathlib import Path
from deadbench.runners.worker import forward, saved_state
from deadbench.runners.worker.run import run_model
from tests.runners.worker.test_cut_streaming import BATCH, saving
forward.BATCH_TOKENS, saved_state._WRITING_SHARE = BATCH, 0
for event in run_model(saving(Path(sys.argv[1]), "neox", "random", Path(sys.argv[2])), "run", 1):
    print(event, flush=True)
"""


@pytest.mark.slow
@pytest.mark.subprocess
def test_kill_9_at_a_random_moment(registry, tmp_path):
    expected = bits(rows_of(run_model(job_of(registry, "neox", "random"), "run", 1)))
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(registry), str(tmp_path / "out")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list((tmp_path / "out").glob(f"{FOLDER}/*.arrow")) and process.poll() is None:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.02))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    told = process.stdout.read()
    process.stdout.close()
    assert "Finished(" not in told, "killed too late to show anything"
    events = list(run_model(saving(registry, "neox", "random", Path(tmp_path / "out")), "run", 1))
    assert any(isinstance(e, Remark) and e.text.startswith("goes on from") for e in events)
    assert bits(rows_of(events)) == expected


LARGE = {  # 1.2 GB in float32
    "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 20, "num_attention_heads": 16, "vocab_size": 50_304,
}  # fmt: skip


@pytest.mark.full
@pytest.mark.subprocess
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("read", ["random", "trained"])
def test_kill_9_at_twenty_random_moments_of_a_gigabyte(read, tmp_path):
    """The command as a user gives it, killed and given again twenty times over."""
    save_tiny(tmp_path / "large", LARGE)
    command = [
        sys.executable, "-W", "ignore", "-m", "deadbench", "run", str(tmp_path / "large"), "--reads", read, "--input",
        "tokens:random", "--tokens", "3072", "--engine", "streaming", "--address", "none", "--checkpoint-interval", "2",
        "--dtype", "float32",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    subprocess.run([*command, "--out", str(tmp_path / "calm")], cwd=tmp_path, env=environment, check=True)
    undisturbed = time.monotonic() - began
    kills, rows, chance = 0, [], random.Random(0)
    while kills < 20:
        out = tmp_path / f"killed-{len(rows)}"  # a read that came through between two kills counts too; the next begins
        process = subprocess.Popen(
            [*command, "--out", str(out)], cwd=tmp_path, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert process.wait(chance.uniform(0, 0.6 * undisturbed)) == 0
            rows.append(out)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    last = tmp_path / f"killed-{len(rows)}"
    subprocess.run([*command, "--out", str(last)], cwd=tmp_path, env=environment, check=True)
    expected = stored(tmp_path / "calm")
    assert expected["reads"][0]["status"] == repr("ok")
    for out in [*rows, last]:
        assert stored(out) == expected
    print(f"{kills} kills over {len(rows) + 1} reads of {undisturbed:.0f} s")


def stored(out):
    of_run = {*OF_TIME, "run_id", "attempt"}
    rows = {name: scan(str(out), name).collect().to_dicts() for name in ("reads", "spectra", "blocks", "samples")}
    return bits({name: [{k: v for k, v in row.items() if k not in of_run} for row in rows[name]] for name in rows})
