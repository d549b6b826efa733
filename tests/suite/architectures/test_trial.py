"""What a stranger's configuration may cost: a trial elsewhere first, and no connection."""

import itertools
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from deadbench.suite.architectures import trial
from deadbench.suite.architectures.build import build_config
from deadbench.suite.architectures.no_network import nothing_fetched
from deadbench.suite.errors import ArchitectureError

NARROW = {"model_type": "gpt2", "n_embd": 4, "n_head": 1, "vocab_size": 8, "n_positions": 4}


@pytest.mark.subprocess
@pytest.mark.slow
def test_what_takes_too_long_or_too_much_is_one_line_and_the_others_go_on(monkeypatch):
    trials = trial._Trials()
    monkeypatch.setattr(trial, "_process", lambda: trials)
    monkeypatch.setattr(trial, "_CPU_SECONDS", 6)  # what passes takes 2 alone, 4 beside other work
    monkeypatch.setattr(trial, "_MEMORY_BYTES", 2**30)
    monkeypatch.setattr(trial, "_ANSWERS", {})
    try:
        assert build_config(NARROW | {"n_layer": 150}).n_layer == 150  # which passes its trial
        with pytest.raises(ArchitectureError, match=r"more than 6 s of CPU \(n_layer is 90000\)"):
            build_config(NARROW | {"n_layer": 90_000})
        first, asked = trials._running, len(trial._ANSWERS)
        with pytest.raises(ArchitectureError, match="more than 6 s of CPU"):
            build_config(NARROW | {"n_layer": 90_000})
        assert (trials._running, len(trial._ANSWERS)) == (first, asked), "told again without a second trial"
    finally:
        trials.end()


def test_the_memory_and_the_time_of_a_trial_are_watched(monkeypatch):
    class Silent:
        pid, stdout = 0, open("/dev/null", "rb")  # noqa: SIM115

    monkeypatch.setattr(trial.select, "select", lambda *_: ([], [], []))
    monkeypatch.setattr(trial, "_resident", lambda running: 5 * 2**30)
    trials = trial._Trials()
    with Silent.stdout, pytest.raises(trial._LimitError, match="1.25 GB of memory"):
        trials._line(Silent, 60.0, 2 * 2**30)
    with pytest.raises(trial._LimitError, match="-1 s"):
        trials._line(Silent, -1.0)


@pytest.mark.subprocess
@pytest.mark.parametrize(("doing", "told"), [("while True: pass", "12 s"), ("import time; time.sleep(60)", "4 s")])
def test_a_trial_that_other_work_starves_has_longer_and_one_that_waits_has_not(monkeypatch, doing, told):
    monkeypatch.setattr(trial, "_STARVED", 3)
    passed = itertools.count()
    monkeypatch.setattr(trial.time, "monotonic", lambda: float(next(passed)))  # a second a look
    with subprocess.Popen([sys.executable, "-c", doing], stdout=subprocess.PIPE) as running:
        while doing.startswith("import") and psutil.Process(running.pid).status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)
        with pytest.raises(trial._LimitError):
            trial._Trials()._line(running, 4.0)
        running.kill()
    assert f"{next(passed) - 2} s" == told


def test_an_ordinary_configuration_needs_no_trial(monkeypatch):
    monkeypatch.setattr(trial, "_process", lambda: pytest.fail("a process was started"))
    assert build_config(NARROW | {"n_layer": 2}).n_layer == 2


def test_nothing_is_fetched_for_a_configuration_and_other_threads_go_on():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with nothing_fetched():
            with pytest.raises(PermissionError, match="nothing is fetched"):
                socket.create_connection(address)
            connected = []
            other = threading.Thread(target=lambda: connected.append(socket.create_connection(address)))
            other.start()
            other.join()
        connected[0].close()
        socket.create_connection(address).close()


def test_a_backbone_of_another_repository_is_refused(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ArchitectureError, match="transformers refuses the configuration"):
        build_config({"model_type": "detr", "backbone": "microsoft/resnet-50", "use_timm_backbone": False})
