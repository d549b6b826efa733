"""The short round before a run: what ends it, what is only told, and of which GPUs it asks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray

from deadbench.runners.doctor import before_run, facts
from deadbench.runners.doctor.before_run import check_gpu_nodes, check_own_gpus, judged
from deadbench.runners.driver import driver, in_process
from deadbench.runners.driver.driver import DriverError, execute
from deadbench.runners.driver.in_process import execute_in_process
from deadbench.runners.driver.loop import Settings
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.results.store import ResultStore
from tests.runners.doctor.test_broken_machines import BROKEN, WELL
from tests.runners.sleepers import sleeping_jobs

FATAL = {"an old driver", "a CPU torch", "all GPUs for one rank", "fewer GPUs than were given"}
NOT_ASKED = {"another version", "one thread", "half a vLLM", "an old vLLM", "a read-only home", "no room in the cache"}


@pytest.mark.parametrize("name", BROKEN)
def test_gpus_that_torch_has_not_end_a_run_and_other_faults_are_told(name):
    change, check, told = BROKEN[name]
    fatal, doubtful = judged(replace(WELL, **change))
    assert (len(fatal), len(doubtful)) == (name in FATAL, name not in FATAL | NOT_ASKED)
    for line in fatal + doubtful:
        assert line.startswith(f"n1: {check}: ")
        assert told in line


@pytest.fixture
def nodes(monkeypatch):
    """A Ray of a head, a free node of 8 GPUs, one in part and one wholly in use; `.answers`: what tasks give."""
    gpus = {"head": (0, 0), "free": (8, 8), "part": (8, 2.5), "busy": (8, 0.5)}
    told = SimpleNamespace(answers={}, asked={}, cancelled=[])
    monkeypatch.setattr(ray, "nodes", lambda: [
        {"NodeID": name * 10, "Alive": True, "NodeManagerHostname": name, "NodeManagerAddress": f"10.0.0.{at}",
         "Resources": {"CPU": 16.0} | ({"GPU": float(all_)} if all_ else {})}
        for at, (name, (all_, _)) in enumerate(gpus.items())
    ])  # fmt: skip
    told.free = iter([{}])  # what Ray tells at first
    free = {name * 10: {"GPU": float(left)} for name, (_, left) in gpus.items()}
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: next(told.free, free))
    monkeypatch.setattr(before_run, "_SETTLED_SECONDS", 0.05)
    monkeypatch.setattr(
        "ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy", lambda node, soft: node[: len(node) // 10]
    )

    def remote(**options):
        def task(function):
            def start(*arguments):
                told.asked[options["scheduling_strategy"]] = options["num_gpus"], arguments
                return options["scheduling_strategy"]

            return SimpleNamespace(remote=start)

        return task

    def get(reference, timeout):
        found = told.answers.get(reference, replace(WELL, node=reference))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "cancel", lambda reference, force: told.cancelled.append(reference))
    return told


def test_each_node_is_asked_of_the_gpus_that_are_free_there(nodes):
    fatal, doubtful = check_gpu_nodes()
    assert (fatal, doubtful) == ([], ["busy: its GPUs are all in use, so they were not looked at"])
    assert nodes.asked == {"free": (8, (4, 8, "10.0.0.1")), "part": (2, (4, 8, "10.0.0.2"))}


def test_what_is_wrong_on_a_node_carries_its_name(nodes):
    nodes.answers = {
        "free": replace(WELL, node="free", given=8, gpus=WELL.gpus, driver="470.1"),
        "part": ray.exceptions.GetTimeoutError("x"),
    }
    fatal, doubtful = check_gpu_nodes()
    (line,) = fatal
    assert line.startswith("free: gpus: 8 GPUs were given and torch has 1 (torch 2.13.0, built for 13.0); driver 470.1")
    assert doubtful[1:] == ["part: not looked at within 30 s"]
    assert nodes.cancelled == ["part"], "it would take a GPU from the first model"


def test_a_node_that_cannot_be_looked_at_ends_nothing(nodes):
    nodes.answers = {"free": ray.exceptions.RaySystemError("gone\nmore of it")}
    fatal, doubtful = check_gpu_nodes()
    assert not fatal
    assert doubtful[1].startswith("free: cannot be looked at (")
    assert "\n" not in doubtful[1]


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(Reporter, "say", lambda self, line: lines.append(line))
    return lines


def on_ray(monkeypatch, found):
    """The driver, with a Ray that is none and a round that found this, up to where models would start."""

    class BegunError(Exception):
        pass

    def begun(*arguments, **options):
        raise BegunError

    monkeypatch.setattr(driver, "connect", lambda *_: SimpleNamespace(started_here=True, leave=lambda: None))
    monkeypatch.setattr(driver, "check_gpu_nodes", lambda: found)
    monkeypatch.setattr(driver, "HeadWatch", begun)
    return BegunError


def run_on(function, jobs, tmp_path):
    with Reporter(1) as reporter:
        function(jobs, ResultStore(str(tmp_path / "out")), Settings(), reporter, "run")


def test_a_fatal_line_ends_the_run_before_a_model_starts(monkeypatch, tmp_path, said):
    on_ray(monkeypatch, (["n1: gpus: none"], ["n1: disk: full"]))
    with pytest.raises(DriverError, match=r"^n1: gpus: none$"):
        run_on(execute, sleeping_jobs(tmp_path, 1, (1.0,)), tmp_path)


def test_another_line_is_told_and_the_run_goes_on(monkeypatch, tmp_path, said):
    begun = on_ray(monkeypatch, ([], ["n1: disk: full"]))
    with pytest.raises(begun):
        run_on(execute, sleeping_jobs(tmp_path, 1, (1.0,)), tmp_path)
    assert said == ["n1: disk: full; `deadbench doctor` says more"]


def test_reads_that_need_no_gpu_are_not_kept_from_it(monkeypatch, tmp_path, said):
    begun = on_ray(monkeypatch, (["n1: gpus: none"], []))
    (job,) = sleeping_jobs(tmp_path, 1, (1.0,))
    with pytest.raises(begun):
        run_on(execute, [replace(job, reads=tuple(replace(read, engine=None) for read in job.reads))], tmp_path)
    assert said == []


def test_without_ray_the_process_looks_at_itself_where_there_is_a_gpu(monkeypatch, tmp_path, said):
    found = replace(WELL, gpus=(), driver="470.1")
    monkeypatch.setattr(before_run, "facts", lambda: found)
    monkeypatch.setattr(before_run, "gpus_of_driver", lambda: 0)
    assert check_own_gpus() == [], "a laptop is well"
    monkeypatch.setattr(before_run, "gpus_of_driver", lambda: 1)
    monkeypatch.setattr(in_process, "_run_all", lambda *_: None)
    run_on(execute_in_process, sleeping_jobs(tmp_path, 1, (1.0,)), tmp_path)
    (line,) = said
    assert "driver 470.1 is too old for that" in line


@pytest.mark.parametrize(("shown", "count"), [(None, 2), ("", 0), ("-1", 0), ("1", 1), ("0,1,2", 2)])
def test_gpus_are_those_of_the_driver_that_the_process_is_shown(monkeypatch, tmp_path, shown, count):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(facts, "Path", lambda place: tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert facts.gpus_of_driver() == count
