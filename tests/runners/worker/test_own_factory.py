"""`deadbench run --model package.module:factory`: a module of the user's own, by the whole machinery."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

import deadbench as package
from tests.conftest import ROOT

# In a user's folder whose own packages are called as our rooms are.
FACTORIES = """
import torch

from suite.gpt import Gpt


def plain():
    torch.manual_seed(0)
    return Gpt()


def fed():
    return plain(), [torch.arange(512).reshape(16, 32) % 97 for _ in range(1)]


def nothing():
    return {}


def broken():
    raise KeyError("no weights")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("suite", "runners", "analysis"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("THEIRS = True\n")
    shutil.copy(ROOT / "tests" / "runners" / "live" / "models.py", tmp_path / "suite" / "gpt.py")
    (tmp_path / "runners" / "ours.py").write_text(FACTORIES)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 97, (16, 32)))
    monkeypatch.chdir(tmp_path)
    for name in ("suite", "runners", "analysis"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return tmp_path


def run(deadbench, *arguments):
    code, out, err = deadbench("run", *arguments, "--address", "none", "--out", "out", "--json")
    return code, json.loads(out) if out else None, err


@pytest.mark.slow
def test_its_rows_are_those_that_measure_gives(folder, deadbench):
    arguments = ("--model", "runners.ours:plain", "--input", "tokens:tokens.npy")
    code, told, err = run(deadbench, *arguments)
    assert (code, told["ok"]) == (0, 2), err
    rows = pl.read_parquet("out/reads/*.parquet").sort("read").to_dicts()
    assert [(row["model"], row["read"], row["final_norm"], row["num_blocks"]) for row in rows] == [
        ("runners.ours:plain", "parameters", "ln_f", 2),
        ("runners.ours:plain", "trained", "ln_f", 2),
    ]
    import torch

    from tests.runners.live.models import Gpt

    torch.manual_seed(0)
    tokens = torch.from_numpy(np.load("tokens.npy"))
    live = package.measure(Gpt(), tokens).row
    same = ("depth", "lambda_v", "alignment", "num_tokens", "scale_harmonic", "worst_block_ratio", "num_parameters")
    assert {name: rows[1][name] for name in same} == {name: live[name] for name in same}
    assert run(deadbench, *arguments)[1]["skipped"] == 2
    with open("runners/ours.py", "a") as file:
        file.write("\n# changed\n")
    assert run(deadbench, *arguments)[1]["ok"] == 2


def test_the_plan_names_it_and_imports_nothing(folder, deadbench):
    (folder / "runners" / "ours.py").write_text("raise SystemExit('imported')")
    code, out, _ = deadbench("plan", "--model", "runners.ours:plain", "--address", "none", "--json")
    assert code == 0
    reads = json.loads(out)["reads"]
    assert [(row["model"], row["read"], row["note"]) for row in reads] == [
        ("runners.ours:plain", read, "a module of your own, not sized") for read in ("parameters", "trained")
    ]


def test_it_may_bring_its_batches(folder, deadbench):
    code, told, err = run(deadbench, "--model", "runners.ours:fed", "--reads", "trained")
    assert (code, told["ok"]) == (0, 1), err
    assert pl.read_parquet("out/reads/*.parquet")["input"].to_list() == ["batches of the factory"]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nothing", "returns a dict; return a module, or it and batches"),
        ("broken", "fails (KeyError: 'no weights')"),
        ("missing", "cannot be imported (module 'runners.ours' has no attribute 'missing')"),
        ("plain", "there is nothing to feed it; give --input tokens:FILE.npy or tokens:random, or return (module, ba"),
    ],
)
def test_what_it_cannot_do_is_a_failed_row(folder, deadbench, factory, message):
    code, told, _ = run(deadbench, "--model", f"runners.ours:{factory}", "--reads", "trained")
    assert (code, told["failed"]) == (1, 1)
    assert message in told["reads"][0]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ours"], "--model 'ours' names no factory; write it as package.module:factory"),
        (["--model", "none.such:make"], "there is no module none.such here or in Python's path"),
        (
            ["--model", "runners.ours:plain", "--reads", "random"],
            "the read 'random' cannot be made of a module; choose param",
        ),
        (["--model", "runners.ours:plain", "--input", "text"], "a module has no tokenizer; give tokens:random"),
        (["--model", "runners.ours:plain", "--engine", "streaming"], "leave out --engine, --tensor-parallel"),
        (["--model", "runners.ours:plain", "--model-type", "gpt2"], "--config and --model-type say nothing"),
        (["--model", "runners.ours:plain", "gpt2"], "is read alone; leave out gpt2"),
    ],
)
def test_what_does_not_go_with_it_is_told(folder, deadbench, arguments, message):
    code, _, err = run(deadbench, *arguments)
    assert code == 2
    assert message in err
