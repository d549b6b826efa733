"""What is told while a run goes on: the table, the events, the record. Without Ray."""

import json
import re

import pytest
from rich.console import Console

from deadbench.runners.cluster.node_versions import installed_versions
from deadbench.runners.jobs.events import Progress, failed_read
from deadbench.runners.reporting import progress
from deadbench.runners.reporting.event_log import EventLog
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.reporting.run_record import RunRecord
from deadbench.runners.results.store import ResultStore
from deadbench.suite.secrets import shown_command
from tests.runners.sleepers import sleeping_jobs


@pytest.fixture
def jobs(tmp_path):
    return sleeping_jobs(tmp_path / "registry", 2)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_blocks_have_a_time_left_and_a_checkpoint_does_not_begin_them_anew(clock, capsys):
    reporter = Reporter(1)
    reporter.progress("m", Progress("m random", "loading"))
    reporter._lines["m"].told = clock[0]
    for done in (10, 10.5, 11):
        reporter.progress("m", Progress("m random", "blocks", done, 60, unit="blocks"))
        reporter.progress("m", Progress("m random", "checkpoint"))
        clock[0] += 100
    assert progress._cells(reporter._lines["m"])[1:4] == ("checkpoint", "-", "-")
    reporter.progress("m", Progress("m random", "blocks", 11.5, 60, unit="blocks"))
    cells = progress._cells(reporter._lines["m"])
    assert (cells[2], cells[3], cells[5]) == ("11.5 of 60 blocks", "3 min 20 s a block", "2 h 41 min")
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "m random: loading"
    assert told[-1] == "m random: blocks, 11.5 of 60 blocks, about 2 h 41 min left", (
        "a line a minute without a terminal"
    )
    assert len(told) == 4


def test_the_live_table_has_rate_memory_and_time_left(clock):
    reporter = Reporter(4)
    reporter._lines["m"] = progress._Line(Progress("m random", "loading"))
    reporter.progress("m", Progress("m random", "forward", 1000, 9000))
    clock[0] += 10
    reporter.progress("m", Progress("m random", "forward", 3000, 9000, device_bytes=2_500_000_000))
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(reporter._render())
    console.file.close()
    line = next(text for text in console.export_text().splitlines() if "m random" in text)
    assert re.split(r"\s{2,}", line.strip()) == [
        "m random", "forward", "3,000 of 9,000 tokens", "200 tokens/s", "2.5 GB", "30 s"
    ]  # fmt: skip


def test_events_are_one_json_object_a_line(capsys, clock, jobs):
    log = EventLog(4)
    with log:
        log.run_started("run-1", 2)
        log.model_started(jobs[0], 1, ["host abc"], 0.25)
        for tenth in range(25):
            log.progress("m000", Progress("m000 random", "forward", tenth + 1, 100))
            clock[0] += 0.1
        log.retry(jobs[0].reads[0], "it died", 2, "half the batch")
        log.finished(failed_read(jobs[0].reads[0], "run-1", 2, "it died"))
        log.gone("m000")
        log.run_ended("finished", {"ok": 0, "failed": 1})
    captured = capsys.readouterr()
    assert captured.out == ""
    events = [json.loads(line) for line in captured.err.splitlines()]
    assert {event["run_id"] for event in events} == {"run-1"}
    names = [event["event"] for event in events]
    assert names.count("progress") == 3, "at most one a second"
    assert [n for n in names if n != "progress"] == [
        "run_started", "model_started", "retry", "read_finished", "model_ended", "run_ended",
    ]  # fmt: skip
    by_name = {event["event"]: event for event in events}
    assert by_name["retry"]["changed"] == "half the batch"
    finished = by_name["read_finished"]
    assert (finished["status"], finished["attempt"], finished["error"]) == ("failed", 2, "it died")


def test_the_record_is_written_at_the_start_and_at_the_end(tmp_path, jobs, monkeypatch):
    monkeypatch.setattr("sys.argv", ["deadbench", "run", "https://host/m?token=abc", "--out", "out"])
    store, said = ResultStore(str(tmp_path / "out")), []
    record = RunRecord(store, "run-1", jobs, said.append)
    path = tmp_path / "out" / "runs" / "run-1" / "run.json"
    record.started("auto", [{"name": "host", "devices": 4, "cpus": 8.0}])
    first = json.loads(path.read_text())
    assert (first["status"], first["finished_at"]) == ("running", None)
    assert {read["status"] for read in first["reads"]} == {"planned"}
    assert first["command"] == "deadbench run https://host/m --out out"
    record.placed(jobs[0], 1, ["host"], 0.25)
    record.finished(failed_read(jobs[0].reads[0], "run-1", 2, "401 of https://me:pw@host/x"))
    record.ended("interrupted", KeyboardInterrupt())
    last = json.loads(path.read_text())
    assert (last["status"], last["error"]) == ("interrupted", None)
    assert last["finished_at"] >= last["started_at"]
    assert last["placements"][0] | {"started_at": 0} == {
        "model": "m000", "attempt": 1, "nodes": ["host"], "devices": 0.25, "started_at": 0,
    }  # fmt: skip
    failed = [read for read in last["reads"] if read["status"] == "failed"]
    assert [(read["model"], read["attempt"], read["error"]) for read in failed] == [
        ("m000", 2, "401 of https://host/x")
    ]
    assert last["versions"]["ray"] == installed_versions()["ray"]
    assert said == []
    assert store.finished() == set(), "readers of the tables do not see it"


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path, jobs, monkeypatch):
    store, said = ResultStore(str(tmp_path / "out")), []
    monkeypatch.setattr(store, "write_text", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    RunRecord(store, "run-1", jobs, said.append).started("local", [])
    assert said == ["the run record cannot be written (disk is full)"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://user:secret@host/a", "https://host/a"),
        ("s3://b/k?X-Amz-Signature=0af&jwt=1", "s3://b/k"),
        ("--hf-token abcdef --tokens 100", "--hf-token '***' --tokens 100"),
        ("HF_TOKEN=abc deadbench", "'HF_TOKEN=***' deadbench"),
        ("model hf_abcdefghijklmnop", "model '***'"),
        ("deadbench run /data/hf_checkpoints/m", "deadbench run /data/hf_checkpoints/m"),
        ("deadbench run gpt2 --out s3://bucket/x", "deadbench run gpt2 --out s3://bucket/x"),
    ],
)
def test_secrets_are_taken_out(given, kept):
    assert shown_command(given.split()) == kept
