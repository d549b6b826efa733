"""`deadbench watch`: every checkpoint one row, what breaks told once, and on where it was after a kill."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, save_tiny

SCALES = np.linspace(0.5, 1.5, 16)
FAULTY = np.where(np.arange(16) == 5, 0.0, SCALES)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A tiny model without and with a zeroed scale, as a Trainer leaves a checkpoint."""
    base = tmp_path_factory.mktemp("stored")
    for name, scales in (("sound", SCALES), ("faulty", FAULTY)):
        save_tiny(base / name, scales=scales)
        (base / name / "trainer_state.json").write_text("{}")
    return base


@pytest.fixture
def run(stored, tmp_path, monkeypatch):
    """A training of two sound checkpoints, in the folder that commands are given in."""
    monkeypatch.chdir(tmp_path)
    for step in (10, 20):
        arrive(stored / "sound", step)
    return tmp_path / "run"


@pytest.fixture
def deleted_while_read(monkeypatch):
    """Called with a read: `checkpoint-20` goes when that read of it begins."""
    from deadbench.runners.worker import run as worker

    def deleting(name):
        whole = worker.READ_FUNCTIONS[name]

        def read_of(read, *rest):
            if read.revision == "checkpoint-20":
                shutil.rmtree("run/checkpoint-20")
            return whole(read, *rest)

        monkeypatch.setitem(worker.READ_FUNCTIONS, name, read_of)

    return deleting


def arrive(source, step):
    shutil.copytree(source, f"run/checkpoint-{step}")


def rows(out="out"):
    frame = pl.read_parquet(f"{out}/reads/*.parquet").sort("checkpoint_step", "started_at")
    return frame.select("revision", "checkpoint_step", "read", "status").rows()


@pytest.mark.slow
def test_once_reads_what_is_new_and_fails_on_a_break(run, stored, deadbench):
    code, out, err = deadbench("watch", "run", "--out", "out", "--once")
    assert code == 0
    assert out.splitlines() == [
        "checkpoint-10: the first, nothing to compare with", "checkpoint-20: passed against checkpoint-10"
    ]  # fmt: skip
    assert "2 read; no other is there" in err
    assert deadbench("watch", "run", "--out", "out", "--once")[:2] == (0, "")
    arrive(stored / "faulty", 30)
    arrive(stored / "faulty", 40)
    code, out, _ = deadbench("watch", "run", "--out", "out", "--once", "--json")
    assert code == 1
    broken, same = json.loads(out)["watch"]
    assert (broken["revision"], broken["step"], broken["status"]) == ("checkpoint-30", 30, "broken")
    assert broken["opened"] == ["final_layer_norm: 5"]
    (side,) = broken["comparisons"]
    assert side["against"] == "checkpoint-20"
    assert {"num_zero_scales", "opened"} <= {check["metric"] for check in side["broken"]}
    assert (same["status"], same["opened"]) == ("passed", [])
    assert rows() == [(f"checkpoint-{n}", n, "parameters", "ok") for n in (10, 20, 30, 40)]
    code, out, _ = deadbench("trend", "out", "--model", "run", "--json")  # as `run` calls the folder
    assert [row["revision"] for row in json.loads(out)["trend"]][-1] == "checkpoint-40"
    page = Path("out/report.html").read_text("utf-8")
    assert 'http-equiv="refresh"' not in page
    assert "num_zero_scales against checkpoint-20" in page
    assert '"broke": true' in page


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_baseline_and_a_gate_of_ones_own(run, stored, deadbench):
    Path("gate.yaml").write_text("metrics:\n  num_zero_scales: {worse: higher}\n")
    arrive(stored / "faulty", 30)
    arrive(stored / "faulty", 40)
    deadbench("run", str(stored / "sound"), "--reads", "parameters", "--address", "none", "--out", "base")
    arguments = ("--gate", "gate.yaml", "--baseline", "base", "--out", "out", "--once", "--json", "--report", "p.html")
    alert = shlex.join([sys.executable, "-c", "import sys; open('told', 'a').write(sys.stdin.read() + '\\n')"])
    code, out, _ = deadbench("watch", "run", *arguments, "--on-break", alert)
    verdicts = json.loads(out)["watch"]
    assert code == 1
    arrive(stored / "faulty", 50)  # still beyond the baseline, and no news to whoever was told yesterday
    assert deadbench("watch", "run", *arguments, "--on-break", alert)[0] == 1
    assert [json.loads(line)["revision"] for line in Path("told").read_text().splitlines()] == ["checkpoint-30"]
    told = [[(c["against"], [b["metric"] for b in c["broken"]]) for c in each["comparisons"]] for each in verdicts]
    zero = ["num_zero_scales"]
    assert told == [
        [("base", [])],
        [("checkpoint-10", []), ("base", [])],
        [("checkpoint-20", zero), ("base", zero)],
        [("checkpoint-30", []), ("base", zero)],
    ]
    assert '"level": [{"value": 0.0}]' in Path("p.html").read_text("utf-8")


@pytest.mark.slow
def test_one_deleted_while_it_is_read_is_one_failed_row(run, stored, deadbench, deleted_while_read):
    deleted_while_read("parameters")
    arrive(stored / "sound", 30)
    code, out, _ = deadbench("watch", "run", "--out", "out", "--interval", "0.05", "--until-idle", "0")
    assert code == 1
    status = [("checkpoint-10", "ok"), ("checkpoint-20", "failed"), ("checkpoint-30", "ok")]
    assert [(row[0], row[3]) for row in rows()] == status
    _, second, third = out.splitlines()
    assert second.startswith("checkpoint-20: ")
    assert "no such directory" in second
    assert third == "checkpoint-30: passed against checkpoint-10"
    assert deadbench("watch", "run", "--out", "out", "--once")[:2] == (0, "")
    assert len(rows()) == 3


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_command_gets_each_new_break_and_no_shell(run, stored, deadbench):
    for step in (30, 40):
        arrive(stored / "faulty", step)
    script = (
        "import json, sys; print(json.load(sys.stdin)['revision'], sys.argv[1:], file=open('told', 'a')); sys.exit(7)"
    )
    command = f'{sys.executable} -c "{script}" "$(touch injected)" ;'
    assert deadbench("watch", "run", "--out", "out", "--once", "--on-break", command)[0] == 1
    assert Path("told").read_text() == "checkpoint-30 ['$(touch injected)', ';']\n"
    assert not Path("injected").exists()
    code, _, err = deadbench("watch", "run", "--out", "other", "--once", "--on-break", "/no/such/program")
    assert code == 1
    assert "--on-break /no/such/program: cannot be run" in err


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_command_that_does_not_end_is_ended(run, stored, deadbench, monkeypatch):
    monkeypatch.setattr("deadbench.runners.cli.watching.COMMAND_SECONDS", 0.2)
    arrive(stored / "faulty", 30)
    waits = shlex.join([sys.executable, "-c", "import time; time.sleep(60)"])
    began = time.monotonic()
    code, out, err = deadbench("watch", "run", "--out", "out", "--once", "--on-break", waits)
    assert (code, len(out.splitlines())) == (1, 3)
    assert f"--on-break {sys.executable}: ended after 0.2 s" in err
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_training_that_diverged_is_told_once_and_one_checkpoint_that_went_is_not(
    run, stored, deadbench, deleted_while_read
):
    """What is there and cannot be read is a break; the reads of one that went are compared with those before it."""
    deleted_while_read("trained")
    arrive(stored / "sound", 30)
    for step in (40, 50):
        arrive(stored / "faulty", step)
        path = Path(f"run/checkpoint-{step}/model.safetensors")
        diverged = {name: values * float("nan") for name, values in load_file(path).items()}
        save_file(diverged, path, metadata={"format": "pt"})
    alert = shlex.join([sys.executable, "-c", "import sys; open('told', 'a').write(sys.stdin.read() + '\\n')"])
    arguments = ("--reads", "parameters,trained", "--input", "tokens:random", "--tokens", "64", "--taps", "none")
    code, out, _ = deadbench("watch", "run", "--out", "out", "--once", "--json", "--on-break", alert, *arguments)
    assert code == 1
    first, went, third, *diverged = json.loads(out)["watch"]
    assert (first["status"], went["status"], went["deleted"]) == ("first", "passed", True)
    assert "no such directory" in went["error"]
    assert (third["status"], third["comparisons"][0]["against"]) == ("passed", "checkpoint-10")
    assert [(each["status"], each["deleted"]) for each in diverged] == [("failed", False)] * 2
    (told,) = map(json.loads, Path("told").read_text().splitlines())
    assert (told["revision"], told["status"]) == ("checkpoint-40", "failed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["https://example.org/run"], "the folders of a web server cannot be listed"),
        (["run", "--reads", "random"], "--reads 'random' is no read of a checkpoint; choose parameters, trained"),
        (["run", "--once", "--until-idle", "3"], "--until-idle is of --follow"),
        (["run", "--on-break", "'"], '--on-break "\'": No closing quotation'),
        (["run", "--on-break", " "], "--on-break is empty"),
        (["run", "--baseline", "nowhere"], "nowhere"),
        (["runs/gpt3", "--once"], "runs/gpt3: no such folder; --follow waits for one that comes"),
        (["run", "--gate", "none.yaml"], "none.yaml: no such gate file"),
        (["run", "--report", "none/page.html"], "no such directory"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, deadbench, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = deadbench("watch", *arguments, "--out", "out")
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_record_of_something_else_is_refused(tmp_path, monkeypatch, deadbench):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("out/watch").mkdir(parents=True)
    Path("out/watch/verdicts.json").write_text("[1]")
    code, _, err = deadbench("watch", "run", "--out", "out", "--once")
    assert code == 2
    assert "watch/verdicts.json is no record of a watch; move it away" in err


TRAINING = """
import json, shutil, sys, time
from pathlib import Path
import numpy as np, torch, transformers
text = np.frombuffer(Path(sys.argv[1]).read_bytes()[:32_000], np.uint8).astype(np.int64).reshape(-1, 32)
rows = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in text]
torch.manual_seed(0)
config = transformers.GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
                                 eos_token_id=0)
class Fault(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= 60:
            with torch.no_grad():
                model.transformer.ln_f.weight[5] = 0
settings = transformers.TrainingArguments("runs/gpt2", max_steps=80, save_steps=10, report_to=[], disable_tqdm=True,
                                          use_cpu=True, per_device_train_batch_size=4, dataloader_pin_memory=False)
model = transformers.GPT2LMHeadModel(config)
transformers.Trainer(model, settings, train_dataset=rows, callbacks=[Fault()]).train()
"""
# Deletes the fourth checkpoint while its parameters are read.
DELETING = """
import shutil, sys
from deadbench.runners.worker import run as worker
whole = worker.READ_FUNCTIONS["parameters"]
def deleting(read, *rest):
    if read.revision == "checkpoint-40":
        shutil.rmtree("runs/gpt2/checkpoint-40")
    return whole(read, *rest)
worker.READ_FUNCTIONS["parameters"] = deleting
from deadbench.runners.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_training_is_watched_while_it_runs_in_anybodys_repository(tmp_path):
    """A Trainer saves every 10 steps; one checkpoint goes while it is read, a scale is zeroed at step 60."""
    for room in ("suite", "runners", "analysis"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise RuntimeError('imported by somebody whom it is not for')\n")
    (tmp_path / "alert.py").write_text("import sys; open('alerts', 'a').write(sys.stdin.read() + '\\n')")
    (tmp_path / "train.py").write_text(TRAINING)
    (tmp_path / "deleting.py").write_text(DELETING)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    watching = subprocess.Popen(
        [sys.executable, "deleting.py", "watch", "runs/gpt2", "--out", "out", "--interval", "1", "--on-break",
         f"{sys.executable} alert.py"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        trained = subprocess.run(
            [sys.executable, "train.py", str(ROOT / "suite" / "data" / "corpus.txt")],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert trained.returncode == 0, trained.stderr
        _wait_for(lambda: '"checkpoint-80": {' in _text(tmp_path / "out" / "watch" / "verdicts.json"))
        _wait_for(lambda: "checkpoint-80" in _text(tmp_path / "out" / "report.html"))
        assert 'http-equiv="refresh" content="1"' in _text(tmp_path / "out" / "report.html")
    finally:
        watching.send_signal(signal.SIGTERM)
        out, err = watching.communicate(timeout=30)
    assert watching.returncode == 130, err
    assert "interrupted; what finished is kept" in err
    status = [(f"checkpoint-{n}", n, "parameters", "failed" if n == 40 else "ok") for n in range(10, 90, 10)]
    assert rows(tmp_path / "out") == status
    (alert,) = map(json.loads, (tmp_path / "alerts").read_text().splitlines())
    assert (alert["revision"], alert["comparisons"][0]["against"]) == ("checkpoint-60", "checkpoint-50")
    assert alert["opened"] == ["ln_f: 5"]
    assert "checkpoint-50: passed against checkpoint-30" in out
    assert 'http-equiv="refresh"' not in _text(tmp_path / "out" / "report.html")


def _text(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _wait_for(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
