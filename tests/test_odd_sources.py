"""One odd source never ends a command: whatever it makes others raise is its own row or line, and the rest goes on."""

import json
import os
import struct
from dataclasses import replace

import pytest

from deadbench.runners.census.worker import census_row
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import JobError, Overrides
from deadbench.runners.planning.assign import place_jobs
from deadbench.runners.planning.hardware import parse_cluster
from deadbench.runners.planning.plan import make_plan
from deadbench.runners.worker.run import run_model
from deadbench.suite.checkpoints.sources import locate
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, TINY_NEOX, save_tiny

REGISTRY = ROOT / "models.yaml"
CLUSTER = parse_cluster("1x24GB")
DEEP = '{"a":' * 500 + "1" + "}" * 500


def header(told):
    """A safetensors file of a header alone."""
    raw = told if isinstance(told, bytes) else json.dumps(told).encode()
    return struct.pack("<Q", len(raw)) + raw + b"\0" * 64


def tensor(dtype="F32", shape=(16,), end=64):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, end]}


def of(config=None, weights=None, **files):
    """What a folder holds: config.json (the tiny model's, where None), weights, further files by name."""
    text = json.dumps(TINY_NEOX) if config is None else config if isinstance(config, str) else json.dumps(config)
    held = {"config.json": text.encode()} | ({} if weights is None else {"model.safetensors": weights})
    return held | {name.replace("__", "."): raw for name, raw in files.items()}


FINAL = "gpt_neox.final_layer_norm.weight"
NAMED = {
    "300 letters": "a" * 300, "300 letters of a hub": "a/" + "b" * 300, "nobody's home": "~nouser/x",
    "half an address": "http://[/", "brackets": "http://[::1", "a port": "http://host:99999999/m", "NUL": "a\0b",
    "newline": "a\nb", "escape": "\x1b[31mred", "bidi": "m\u202eodel", "surrogate": "m\udcffodel", "empty": "",
    "no such protocol": "nope://x/y", "chained": "simplecache::http://[/",
}  # fmt: skip
FOLDERS = {
    "segformer": of({"model_type": "segformer"}),
    "pvt": of({"model_type": "pvt"}),
    "glpn": of({"model_type": "glpn"}),
    "d_fine": of({"model_type": "d_fine"}),
    "lxmert": of({"model_type": "lxmert"}),
    "a dtype of eight bits": of(TINY_NEOX | {"dtype": "float8_e4m3fn"}),
    "a dtype that is a number": of(TINY_NEOX | {"torch_dtype": 8}),
    "a dtype that is none": of(TINY_NEOX | {"dtype": "int8"}),
    "stored in int8": of(weights=header({FINAL: tensor("I8", end=16)})),
    "a dtype nobody knows": of(weights=header({FINAL: tensor("\x1b[2J")})),
    "nested": of(DEEP),
    "a nested header": of(weights=header(DEEP.encode())),
    "a surrogate in a name": of(weights=header(b'{"\\ud800": {"dtype":"F32","shape":[16],"data_offsets":[0,64]}}')),
    "a surrogate in an index": of(
        model__safetensors__index__json=b'{"weight_map": {"a": "\\ud800.safetensors"}}',
    ),
    "architectures of a number": of(TINY_NEOX | {"architectures": 3}),
    "no layers": of({"model_type": "gpt_neox", "num_hidden_layers": None}),
    "a list for a width": of(TINY_NEOX | {"hidden_size": [1, 2]}),
    "a width of zero": of(TINY_NEOX | {"hidden_size": 0}),
    "keys that are words": of({"model_type": "gpt2", "for": 1, "self": 2, "cls": 3, "kwargs": {}}),
    "no object": of("[1, 2]"),
}  # fmt: skip
ODD = [*NAMED, *FOLDERS]
LARGE = ("d_fine", "lxmert", "segformer", "glpn", "pvt")  # whose meta models take seconds to build


@pytest.fixture(scope="module")
def known():
    return load_registry(REGISTRY)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("good") / "good"))


@pytest.fixture
def odd(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if request.param in NAMED:
        return NAMED[request.param]
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, raw in FOLDERS[request.param].items():
        (folder / name).write_bytes(raw)
    return str(folder)


def told(text):
    """What is said of it is one clean line."""
    assert text
    assert text.isprintable()
    assert len(text) <= 700, text  # 300 for the error, and the name of the source where it is told beside
    assert "Traceback" not in text


def test_there_are_thirty_three_of_them():
    assert len(ODD) >= 33


@pytest.mark.parametrize(
    "odd", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in ODD], indirect=True
)
def test_a_run_has_its_reads_fail_and_makes_those_of_the_other(good, odd, known):
    names, kinds = [odd, good], ["parameters", "random"]
    jobs = build_jobs(known, REGISTRY, names, None, kinds, Overrides(input="tokens:random"))
    assert [len(job.reads) for job in jobs] == [2, 2]
    placed, remarks = place_jobs(jobs, CLUSTER)
    for remark in remarks:
        told(remark)
    parameters = replace(placed[0], reads=placed[0].reads[:1])
    (row,) = (event.row for event in run_model(parameters, "r", 1) if isinstance(event, Finished))
    assert row["status"] == "failed"
    told(row["error"])
    assert [read.error for read in placed[1].reads] == [None, None]
    plan = {(row.model, row.read): row for row in make_plan(jobs, CLUSTER)}
    assert len(plan) == 4
    assert [plan[good, kind].problem for kind in kinds] == [None, None]
    for row in plan.values():
        assert row.model.isprintable()
        if row.problem:
            told(row.problem)


@pytest.mark.parametrize("odd", ODD, indirect=True)
def test_a_census_and_classify_have_a_row_of_both(good, odd, deadbench):
    row = census_row(odd, locate(odd), "r")
    if row["status"] == "failed":
        told(row["error"])
    code, out, err = deadbench("classify", odd, good, "--json", "--allow-undetermined")
    assert "Traceback" not in err
    first, second = json.loads(out)["sources"]
    assert second["error"] is None
    if first["error"]:
        told(first["error"])
    assert code == (1 if first["error"] else 0)
    assert os.path.exists(good)


def test_the_last_source_that_fails_ends_a_run_with_its_own_line(known):
    with pytest.raises(JobError, match="no such directory") as caught:
        build_jobs(known, REGISTRY, ["~nouser/x"], None, ["parameters"], Overrides())
    told(str(caught.value))
