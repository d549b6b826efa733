"""`deadbench doctor` on this machine, and on a Ray that says it has a GPU."""

import json
import re
import subprocess
import sys

import pytest
import torch

from deadbench.runners.doctor import examine, one_process, rates
from deadbench.runners.doctor.lines import Line
from deadbench.runners.doctor.one_process import Examined
from deadbench.runners.doctor.rates import keep, measured
from deadbench.runners.planning.seconds import Rates, stored
from tests.conftest import TWINS

RATES = Rates("H200", 15e10, 8e14, 6e13, 6e13, 2e10)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DEADBENCH_CACHE", str(tmp_path / "cache" / "checkpoints"))
    return tmp_path / "cache" / "rates.json"


@pytest.mark.slow
@pytest.mark.subprocess
def test_this_machine_is_well_and_every_step_ran(deadbench, kept, monkeypatch):
    monkeypatch.setattr(one_process, "vllm_start", lambda gpus: "started by another test")
    monkeypatch.setattr(one_process, "vllm_state_space", lambda: "as is this")
    code, out, _ = deadbench("doctor", "--json")
    found = json.loads(out)
    wrong = [line for line in found["lines"] if line["verdict"] == "wrong"]
    assert (code, found["well"], wrong) == (0, True, []), wrong
    lines = {line["check"]: line for line in found["lines"]}
    assert {"versions", "memory", "eigh", "cholesky", "qr", "triangular solve", "rates", "twin"} <= {*lines}
    assert lines["twin"]["told"].endswith("by torch and streaming")
    if not torch.cuda.is_available():
        assert lines["reduce"]["told"].startswith("2 ranks here sum at ")
        assert lines["tensor parallel"]["told"].endswith("by 2 ranks")
        assert lines["killed rank"]["verdict"] == "ok"
    assert lines["state space"]["told"].endswith("hybrid of Mamba and attention, by torch and streaming")
    if sys.platform == "linux":
        peak, planned = map(int, re.findall(r"\d+(?= of| MB)", lines["planned memory"]["told"])[:2])
        assert 0.5 * planned < peak, "and not nothing, as where a peak is that of before"
    assert list(stored()) == ["cpu"]


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("skipped", 0), ("wrong", 1)])
def test_the_exit_code_is_1_where_a_line_is_wrong(deadbench, monkeypatch, verdict, code):
    monkeypatch.setattr(examine, "examine_process", lambda: Examined((Line("n1", "disk", verdict, "so"),), None))
    found, out, _ = deadbench("doctor")
    assert found == code
    assert out.splitlines()[0].split() == [{"ok": "ok", "skipped": "-", "wrong": "WRONG"}[verdict], "n1", "disk:", "so"]
    assert out.splitlines()[-1] == ("1 of 1 are wrong" if code else "all is well")


def test_a_torch_that_cannot_be_imported_is_a_red_line_and_one_document(deadbench, monkeypatch):
    monkeypatch.setitem(sys.modules, "deadbench.runners.doctor.examine", None)
    code, out, _ = deadbench("doctor", "--json")
    (line,) = json.loads(out)["lines"]
    assert (code, line["check"], line["verdict"]) == (1, "imports", "wrong")
    assert "install it anew" in line["told"]


def test_rates_that_cannot_be_kept_are_a_red_line(deadbench, kept, monkeypatch):
    kept.parent.touch()
    monkeypatch.setattr(examine, "examine_process", lambda: Examined((), RATES))
    code, out, _ = deadbench("doctor", "--address", "none", "--json")
    (line,) = (line for line in json.loads(out)["lines"] if line["verdict"] == "wrong")
    assert (code, line["check"]) == (1, "rates kept")
    assert "set DEADBENCH_CACHE to a folder of your own" in line["told"]


def test_rates_are_kept_beside_those_of_other_devices(kept):
    assert keep([RATES]) == kept
    keep([Rates("cpu", 0.0, 1.0, 2.0, 2.0, 3.0)])
    assert stored() == {"H200": RATES, "cpu": Rates("cpu", 0.0, 1.0, 2.0, 2.0, 3.0)}
    kept.write_text("[{}]")
    assert stored() == {}, "what cannot be read is measured again"


def test_rates_are_of_what_was_timed(monkeypatch):
    clock = iter(x * 0.03 for x in range(1000))
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    found = measured(torch.device("cpu"))
    assert found.float64 == pytest.approx(found.bfloat16)
    assert found.float32 == pytest.approx(found.bfloat16)
    assert found.copies == pytest.approx(2**24 / (2 * 512**3 / found.float64))


ON_RAY = """
import ray
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=100 * 2**20,
         logging_level="ERROR", log_to_driver=False)
from deadbench.runners.doctor import examine, over_ray
def examined(*given, **also):
    from deadbench.runners.doctor import one_process
    one_process.vllm_start = lambda gpus: "started by another test"
    one_process.vllm_state_space = lambda: "as is this"
    return one_process.examine_process(*given, **also)
over_ray.examine_process = examined
for line in examine.examine_here("local"):
    print(line.check, line.verdict, line.told, sep="|")
from deadbench.runners.engines.device import pick_device
try:
    ray.get(ray.remote(num_gpus=1)(pick_device).remote())
except Exception as error:
    print("an actor", "failed", str(error).strip().splitlines()[-1], sep="|")
import sys
from deadbench.runners.cli.main import main
sys.argv = ["deadbench", "run", sys.argv[1], "--reads", "trained", "--address", "local", "--out", sys.argv[2]]
main()
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and Ray is right")
def test_a_gpu_that_ray_has_and_torch_has_not_is_found_and_not_computed_without(tmp_path):
    out = tmp_path / "results"
    command = [sys.executable, "-c", ON_RAY, TWINS / "layernorm" / "step4096", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    told = {line.split("|")[0]: line.split("|")[1:] for line in done.stdout.splitlines()}
    assert told["gpus"][0] == "wrong"
    assert told["gpus"][1].startswith("1 GPUs were given and torch has 0")
    assert told["eigh"][0] == told["network"][0] == "ok"
    assert "Ray gave this process 1 GPUs and torch has 0" in told["an actor"][1]
    assert [check for check, (verdict, *_) in told.items() if verdict == "wrong"][:1] == ["gpus"]
    assert done.returncode == 2, done.stderr
    assert ": gpus: 1 GPUs were given and torch has 0" in done.stderr.strip().splitlines()[-1], done.stderr
    assert not [*out.glob("reads/*.parquet")], "no model was begun"
