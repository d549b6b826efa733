"""Jobs of Ray's that are followed, against a client of the tests' own; `test_submission.py` has a real one."""

import asyncio
from types import SimpleNamespace

import pytest

from deadbench.runners.cluster import bounded_client, submitted
from deadbench.runners.cluster.joining import JoinError
from deadbench.runners.cluster.submitted import Jobs

RUN = "python -m deadbench run --suite quick --address auto --out s3://BUCKET/results"
DASHBOARD = "http://127.0.0.1:8265"


def job(name, status="RUNNING", command=RUN, started=1, kind="SUBMISSION", exit_code=None):
    return SimpleNamespace(
        submission_id=name, type=kind, status=status, entrypoint=command, start_time=started, driver_exit_code=exit_code
    )


class Client:
    """Says what it is told, and breaks its connection where a chunk is an error."""

    def __init__(self, jobs, connections=(), infos=()):
        self.jobs, self.connections, self.infos = jobs, list(connections), list(infos)

    def list_jobs(self):
        return self.jobs

    def get_job_info(self, name):
        return self.infos.pop(0) if len(self.infos) > 1 else self.infos[0]

    async def tail_job_logs(self, name):
        for chunk in self.connections.pop(0) if self.connections else ():
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.setattr(submitted.time, "sleep", lambda seconds: None)

    def made(*args, **kwargs):
        monkeypatch.setattr(bounded_client, "client_class", lambda: lambda address: Client(*args, **kwargs))
        return Jobs(DASHBOARD)

    return made


def test_the_newest_of_ours_that_goes_on_is_meant(jobs):
    listed = [
        job("old", "SUCCEEDED", started=9), job("a", started=2), job("b", started=3), job("theirs", "RUNNING", "x", 99),
        job(None, started=50, kind="DRIVER"),
    ]  # fmt: skip
    assert jobs(listed).latest().id == "b", "submitted before joined: it has a log"
    assert jobs(listed).latest("old").id == "old"
    assert jobs([listed[0], listed[4]]).latest().id is None
    assert jobs([listed[0], job("older", "FAILED")]).latest().id == "old"


@pytest.mark.parametrize(
    ("command", "out"),
    [(RUN, "s3://BUCKET/results"), ("deadbench run --out=/srv/a", "/srv/a"), ("deadbench run", None),
     ("sh -c 'deadbench run --out a'", None), ("sh -c 'deadbench run", None)],
)  # fmt: skip
def test_the_result_set_is_the_one_of_the_command(jobs, command, out):
    assert jobs([job("a", command=command)]).latest().out == out


def test_a_connection_that_breaks_is_made_again_and_nothing_is_printed_twice(jobs):
    listed = [job("a")]
    connections = [["one\ntw", OSError("reset")], ["one", "\ntwo\nth", "ree\n"], []]
    asked = jobs(listed, connections, [job("a"), job("a", "FAILED", exit_code=1)])
    written, said = [], []
    ended = asked.follow(asked.latest(), written.append, said.append)
    assert "".join(written) == "one\ntwo\nthree\n"
    assert said == [f"{DASHBOARD}: job a cannot be followed (OSError: reset); asked again for 600 s"]
    assert (ended.over, ended.code()) == (True, 1)


@pytest.mark.parametrize(
    ("status", "exit_code", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("FAILED", 0, 1), ("STOPPED", None, 130)],
)
def test_the_exit_code_is_the_commands_own(jobs, status, exit_code, code):
    assert jobs([job("a", status, exit_code=exit_code)]).latest().code() == code


def test_a_head_that_does_not_come_back_is_one_line(jobs, monkeypatch):
    asked, said = jobs([job("a")], [[OSError("refused")]] * 3), []
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr(submitted.time, "monotonic", lambda: next(clock))
    with pytest.raises(JoinError, match=r"job a cannot be followed \(OSError: refused\)"):
        asked.follow(asked.latest(), print, said.append)
    assert len(said) == 1, "once, not at every try"


def test_a_job_that_ends_without_a_word_ends(jobs, monkeypatch):
    monkeypatch.setattr(submitted, "_QUIET_SECONDS", 0.01)
    asked = jobs([job("a")], [], [job("a"), job("a", "SUCCEEDED")])

    async def silent(name):
        await asyncio.sleep(600)
        yield ""

    asked._client.tail_job_logs = silent
    assert asked.follow(asked.latest(), print, print).code() == 0


def test_where_there_is_no_such_job_it_is_said_which_there_are(jobs):
    with pytest.raises(JoinError, match="no job of deadbench's is known there; give the --out"):
        jobs([job("theirs", command="python train.py")]).latest()
    with pytest.raises(JoinError, match="no job 'b' was submitted; there are a"):
        jobs([job("a")]).latest("b")


def test_the_named_address_is_asked_whatever_the_environment_says(monkeypatch):
    import os

    monkeypatch.setenv("RAY_ADDRESS", "http://other:1")
    seen = []
    monkeypatch.setattr(
        bounded_client, "client_class", lambda: lambda address: seen.append((address, os.environ.get("RAY_ADDRESS")))
    )
    Jobs(DASHBOARD)
    assert seen == [(DASHBOARD, None)]
    assert os.environ["RAY_ADDRESS"] == "http://other:1"
