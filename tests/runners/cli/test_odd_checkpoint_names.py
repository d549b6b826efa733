"""`deadbench watch`, `run` and `export` where names hold what no table, terminal or counter takes."""

import os

import polars as pl
import pytest

from deadbench.runners.doctor.lines import line_of
from deadbench.suite.checkpoints.arrivals import Arrivals
from deadbench.suite.checkpoints.series import trainer_step
from deadbench.suite.checkpoints.training_steps import LARGEST_STEP, checkpoint_step
from tests.conftest import save_tiny

ODD = {
    "escape": "checkpoint-7\x1b[2J",
    "bidi": "checkpoint-7\u202egnp",
    "newline": "checkpoint-7\nX",
    "not UTF-8": os.fsdecode(b"checkpoint-7-\xff"),
    "long": "checkpoint-7-" + "a" * 240,
    "a step of no table": "checkpoint-999999999999999m",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("stored") / "tiny")
    (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.fixture(params=ODD)
def run(request, tiny, tmp_path, monkeypatch):
    """A training of an odd checkpoint and a plain one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name in (ODD[request.param], "checkpoint-1000"):
        (tmp_path / "run" / name).symlink_to(tiny)
    return "run"


def clean(text):
    for line in text.split("\n"):
        assert line.isprintable()
        assert len(line) <= 300
    return text


@pytest.mark.parametrize(
    "command", [("watch", "--once", "--interval", "0.05"), ("run", "--address", "none", "--reads", "parameters")]
)
def test_the_plain_checkpoint_is_read_beside_an_odd_one(run, command, deadbench):
    code, out, err = deadbench(command[0], run, *command[1:], "--out", "out")
    clean(out), clean(err)
    assert code == 0
    assert "checkpoint-1000" in pl.read_parquet("out/reads/*.parquet")["revision"].to_list()


def test_what_waits_is_told_in_one_line(tmp_path, monkeypatch, deadbench):
    monkeypatch.chdir(tmp_path)
    for name in ODD.values():
        (tmp_path / "run" / name).mkdir(parents=True)
    code, out, err = deadbench("watch", "run", "--once", "--out", "out", "--interval", "0.05")
    assert (code, out) == (0, "")
    assert "waiting for" in clean(err)


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\u202eb"])
def test_an_export_names_its_file_cleanly(tiny, tmp_path, monkeypatch, deadbench, name):
    monkeypatch.chdir(tmp_path)
    code, out, _ = deadbench("export", tiny, "-o", name)
    assert code == 0
    assert "5 norms" in clean(out)


@pytest.mark.parametrize("told", ["\u00b2", "\u2460", "\u0e52"])
def test_a_tracker_of_letters_that_are_no_number_ends_no_look(tmp_path, told):
    (tmp_path / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"x")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(told, encoding="utf-8")
    (arrival,) = Arrivals(str(tmp_path)).look()
    assert arrival.waits_for is not None


@pytest.mark.parametrize("name", ["iter_0000007", "global_step7"])
def test_a_tracker_that_is_a_pipe_is_not_waited_for(tmp_path, name):
    (tmp_path / name / "mp_rank_00").mkdir(parents=True)
    (tmp_path / name / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"x")
    for told in ("latest_checkpointed_iteration.txt", "latest"):
        os.mkfifo(tmp_path / told)
    (arrival,) = Arrivals(str(tmp_path)).look()
    assert arrival.waits_for is not None


def test_a_trainers_state_that_is_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    os.mkfifo(tmp_path / "checkpoint-5" / "trainer_state.json")
    assert trainer_step(tmp_path / "checkpoint-5") is None
    assert all(each.waits_for for each in Arrivals(str(tmp_path)).look())


def test_a_pipe_named_as_a_file_of_weights_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "checkpoint-5.safetensors")
    assert Arrivals(str(tmp_path)).look() == []


def test_a_step_is_one_that_a_table_holds():
    assert checkpoint_step("checkpoint-999999999999m") == 999_999_999_999_000_000 <= LARGEST_STEP
    assert checkpoint_step("checkpoint-999999999999999m") is None


def test_what_a_check_says_is_a_clean_line():
    assert clean(line_of("node", "check", lambda: "\x1b[2J" + "x" * 5000).told).startswith("\\x1b")
