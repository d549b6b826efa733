"""`deadbench attach` as a user meets it: what goes where, and the exit code of what was followed."""

import json

import pytest

from deadbench.runners.cluster import submitted
from deadbench.runners.cluster.submitted import Submitted
from deadbench.runners.reporting import following
from deadbench.runners.reporting.run_record import RunRecord
from deadbench.runners.results.store import ResultStore
from tests.runners.sleepers import sleeping_jobs

RUN = "20260101T000000Z-a"
ENTRY = "python -m deadbench run --address auto --out /srv/results"


@pytest.fixture
def record(tmp_path):
    record = RunRecord(ResultStore(str(tmp_path / "out")), RUN, sleeping_jobs(tmp_path / "registry", 1), print)
    record.started("none", [])
    return record


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("stopped", 1), ("interrupted", 130)])
def test_the_exit_code_is_the_runs(deadbench, record, tmp_path, status, code):
    record.ended(status, OSError("the disk is full") if status == "stopped" else None)
    found, out, err = deadbench("attach", tmp_path / "out")
    assert found == code
    assert out == f"{status}: 0 ok, 0 failed, 0 by other runs; results in {tmp_path / 'out'}\n"
    assert ("the disk is full" in err) == (status == "stopped")
    assert f"run {RUN} on " in err


def test_a_failed_read_is_exit_1_and_one_document(deadbench, record, tmp_path):
    record._facts["reads"][0] |= {"status": "failed", "error": "no"}
    record.ended("finished")
    code, out, _ = deadbench("attach", tmp_path / "out", "--json")
    told = json.loads(out)
    assert (code, told["run_id"], told["status"], told["failed"]) == (1, RUN, "finished", 1)
    assert told["reads"][0]["error"] == "no"


def test_ctrl_c_leaves_the_run_and_says_how_to_come_back(deadbench, record, tmp_path, monkeypatch):
    def pressed(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(following.time, "sleep", pressed)
    code, out, err = deadbench("attach", tmp_path / "out")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == (f"deadbench: left; the run goes on: deadbench attach {tmp_path / 'out'} comes back")
    assert json.loads((tmp_path / "out" / "runs" / RUN / "run.json").read_text())["status"] == "running"


@pytest.mark.parametrize("address", ["", " ", "x" * 5000, "a\0b", "-/x", "a\x1b[31mb"])
def test_what_can_be_no_place_is_exit_2_and_one_line(deadbench, address):
    code, out, err = deadbench("attach", "--", address)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "give a run's --out, or a Ray as" in err
    assert len(err) <= 301
    assert err.rstrip("\n").isprintable()


def test_a_result_set_without_a_run_is_exit_2(deadbench, tmp_path):
    code, _, err = deadbench("attach", tmp_path)
    assert (code, err) == (2, f"deadbench: {tmp_path}: no run has left its record here; give the --out of a run\n")
    assert list(tmp_path.iterdir()) == []


class FakeJobs:
    found = Submitted("raysubmit_1", "RUNNING", ENTRY, None, 1)

    def __init__(self, address):
        assert address in ("auto", "http://127.0.0.1:8265", "head:6379")

    def latest(self, wanted):
        return self.found

    def follow(self, job, write, say):
        for chunk in ("plan", "ning …\nread \x1b[2J", "\n", *["z" * 1000] * 50, "\nAKIAIOSFODNN7EXAMPLE", "\nlast"):
            write(chunk)
        return Submitted(job.id, "FAILED", ENTRY, 1, 1)


@pytest.mark.parametrize("address", ["auto", "http://127.0.0.1:8265", "head:6379"])
def test_a_job_is_followed_by_what_it_prints(deadbench, monkeypatch, address):
    monkeypatch.setattr(submitted, "Jobs", FakeJobs)
    code, out, err = deadbench("attach", address)
    assert code == 1
    assert out == "job raysubmit_1 failed, exit code 1; results in /srv/results\n"
    first, *told, endless, secret, last = err.splitlines()
    assert (first, told, last) == (f"job raysubmit_1: {ENTRY}", ["planning …", "read \\x1b[2J"], "last")
    assert len(endless) == 300
    assert "AKIA" not in secret


def test_a_driver_of_its_own_is_followed_by_its_result_set(deadbench, record, tmp_path, monkeypatch):
    monkeypatch.setattr(submitted, "Jobs", FakeJobs)
    record.ended("finished")
    monkeypatch.setattr(
        FakeJobs, "found", Submitted(None, "RUNNING", f"deadbench run --out {tmp_path / 'out'}", None, 1)
    )
    code, out, _ = deadbench("attach", "auto")
    assert (code, out.split(":")[0]) == (0, "finished")
    monkeypatch.setattr(FakeJobs, "found", Submitted(None, "RUNNING", "deadbench run --out /no/such", None, 1))
    code, _, err = deadbench("attach", "auto")
    assert code == 2
    assert "/no/such, is not seen from here" in err
