"""What a stranger's configuration may cost: a trial elsewhere first, and no connection."""

import itertools
import json
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from deadbench.suite.architectures import trial, watched
from deadbench.suite.architectures.build import build_config
from deadbench.suite.architectures.no_network import nothing_fetched
from deadbench.suite.errors import ArchitectureError, ElsewhereError, InputError
from deadbench.suite.inputs.signals import own_pictures, photo_crops

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

    monkeypatch.setattr(watched.select, "select", lambda *_: ([], [], []))
    monkeypatch.setattr(watched, "resident", lambda running: 5 * 2**30)
    with Silent.stdout, pytest.raises(watched.LimitError, match="1.25 GB of memory"):
        watched.answer(Silent, 60.0, 5 * 2**28, 2**30)
    with pytest.raises(watched.LimitError, match="-1 s"):
        watched.answer(Silent, -1.0)


@pytest.mark.subprocess
@pytest.mark.parametrize(("doing", "told"), [("while True: pass", "12 s"), ("import time; time.sleep(60)", "6 s")])
def test_a_trial_that_other_work_starves_has_longer_and_one_that_waits_has_not(monkeypatch, doing, told):
    monkeypatch.setattr(watched, "_STARVED", 3)
    monkeypatch.setattr(watched, "_IDLE_LOOKS", 3)
    passed = itertools.count()
    monkeypatch.setattr(watched.time, "monotonic", lambda: float(next(passed)))  # a second a look
    with subprocess.Popen([sys.executable, "-c", doing], stdout=subprocess.PIPE) as running:
        while doing.startswith("import") and psutil.Process(running.pid).status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)
        with pytest.raises(watched.LimitError):
            watched.answer(running, 4.0)
        running.kill()
    assert f"{next(passed) - 2} s" == told


def test_an_ordinary_configuration_needs_no_trial(monkeypatch):
    monkeypatch.setattr(trial, "_process", lambda: pytest.fail("a process was started"))
    assert build_config(NARROW | {"n_layer": 2}).n_layer == 2


def test_nothing_is_fetched_for_a_configuration_and_other_threads_go_on():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with nothing_fetched():
            with pytest.raises(ElsewhereError, match=r"to be fetched from 127\.0\.0\.1; nothing is"):
                socket.create_connection(address)
            connected = []
            other = threading.Thread(target=lambda: connected.append(socket.create_connection(address)))
            other.start()
            other.join()
        connected[0].close()
        socket.create_connection(address).close()


ELSEWHERE = "nobody/nothing"
SMALL_BERT = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAVA = {"text_config": SMALL_BERT, "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 1}}
BOTH = {"_name_or_path": ELSEWHERE, "name_or_path": ELSEWHERE, "transformers_weights": f"{ELSEWHERE}/x.safetensors"}
REFUSED = [
    {"model_type": "detr", "backbone": ELSEWHERE, "use_timm_backbone": False, "use_pretrained_backbone": True},
    {"model_type": "mask2former", "backbone": ELSEWHERE, "use_pretrained_backbone": True},
    {"model_type": "edgetam"},  # whose default names one
]
BUILT = [
    NARROW | BOTH,
    {"model_type": "llava", **{part: its | BOTH for part, its in LLAVA.items()}},
    {"model_type": "encoder-decoder", "encoder": SMALL_BERT | BOTH, "decoder": SMALL_BERT | BOTH},
    {"model_type": "timm_backbone", "backbone": "resnet18", "use_pretrained_backbone": True},
]
_LEFT: list[str] = []


def _heard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        _LEFT.append(f"{event} {arguments}")


@pytest.fixture
def left(monkeypatch):
    """What has left the process, past what refuses it: a hook of a later date hears only what passed the earlier."""
    from huggingface_hub import constants

    with nothing_fetched():
        pass
    sys.addaudithook(_heard)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _LEFT.clear()
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    assert len(_LEFT) >= 1, "the hook hears"
    _LEFT.clear()
    return _LEFT


def test_what_a_configuration_names_elsewhere_is_refused_or_left_alone(left):
    for config in REFUSED:
        with pytest.raises(ArchitectureError, match=r"to be fetched from huggingface\.co; nothing is"):
            build_config(config)
    for config in BUILT:
        assert build_config(config).model_type == config["model_type"]
    assert left == []


def test_a_picture_processor_that_names_another_repository_is_refused(left, tmp_path):
    told = {"image_processor_type": "OneFormerImageProcessor", "repo_path": ELSEWHERE, "class_info_file": "x.json"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"to be fetched from huggingface\.co"):
        own_pictures(photo_crops("image", 1, 0), tmp_path, {"pixel_values"})
    assert left == []
