"""`deadbench reproduce`: the stored command again, and the two rows beside each other."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.conftest import ROOT, save_tiny

STORED = ROOT / "suite" / "data" / "reference"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A series of two checkpoints."""
    base = tmp_path_factory.mktemp("reproduce")
    for step in (10, 20):
        save_tiny(base / "run" / f"step{step}", seed=step, scales=np.linspace(0.5, 1.5, 16))
    return base


@pytest.fixture
def stored(base, tmp_path, monkeypatch, deadbench):
    """It and a result set of it, in the folder that the command is given in."""
    shutil.copytree(base / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    arguments = ("--address", "none", "--out", "out", "--input", "tokens:random", "--reads", "parameters,trained")
    assert deadbench("run", "run", *arguments)[0] == 0
    return tmp_path


def told(deadbench, *arguments):
    code, out, err = deadbench("reproduce", "out", "run", "--json", *arguments)
    return code, json.loads(out), err


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_row_to_the_bit(stored, deadbench):
    code, document, err = told(deadbench, "--revision", "step20", "--out", "again")
    assert code == 0
    rows = document["reproduce"]
    assert {row["revision"] for row in rows} == {"step20"}
    assert {row["read"] for row in rows} == {"parameters", "trained"}
    assert all(row["equal"] and row["stored"] == row["now"] and row["difference"] == 0 for row in rows)
    assert "depth" in {row["metric"] for row in rows}
    assert document["verdict"] == {
        "run_id": document["verdict"]["run_id"],
        "out": "again",
        "equal": True,
        "versions": {},
    }
    assert f"{len(rows)} of {len(rows)} values equal to the bit, 0 differ; rows in again" in err
    made = pl.read_parquet("again/reads/*.parquet")
    assert sorted(made.select("revision", "read").rows()) == [("step20", "parameters"), ("step20", "trained")]
    code, _, err = deadbench("reproduce", "out", "run", "--out", "again")
    assert code == 2
    assert "--out again: is there already; give a new folder" in err


@pytest.mark.slow
def test_another_checkpoint_under_the_name_differs(stored, deadbench):
    save_tiny(stored / "run" / "step20", seed=9, scales=np.linspace(0.1, 1.5, 16))
    code, document, _ = told(deadbench, "--read", "parameters")
    assert code == 1
    verdicts = {(row["revision"], row["metric"]): row["verdict"] for row in document["reproduce"]}
    assert verdicts["step20", "scale_harmonic"] == "differs"
    assert verdicts["step20", "num_parameters"] == "equal"
    assert {verdict for (revision, _), verdict in verdicts.items() if revision == "step10"} == {"equal"}
    shutil.rmtree(stored / "run" / "step20")
    code, _, err = deadbench("reproduce", "out", "run", "--revision", "step20")
    assert code == 2
    assert "its command makes no such row in this folder" in err


@pytest.mark.slow
def test_versions_that_differ_are_told(stored, deadbench, monkeypatch):
    now = {"deadbench": "0.1.0", "torch": "9.9"}
    monkeypatch.setattr("deadbench.runners.jobs.events.versions", lambda: json.dumps(now))
    _, document, err = told(deadbench, "--read", "parameters", "--revision", "step10")
    assert document["verdict"]["versions"]["torch"][1] == "9.9"
    assert "torch: " in err
    assert "deadbench" not in document["verdict"]["versions"]


@pytest.mark.slow
def test_a_command_that_cannot_or_must_not_be_given_again_is_one_line(stored, deadbench):
    (record,) = Path("out/runs").glob("*/run.json")
    facts = json.loads(record.read_text())
    for command, message in (
        (
            "/bin/deadbench run run --input 'hf:x?token=***'",
            "secrets were taken out of its command; give it again yourself",
        ),
        ("pytest --deadbench models.yaml", "its command is no `deadbench run` (pytest --deadbench models.yaml)"),
        ("deadbench watch run --out out", "its command is no `deadbench run`"),
        ("deadbench run --model evil:factory", "its command runs code of its folder; give it again yourself"),
        ("deadbench run run --nonsense", "this version does not understand its command"),
        ("deadbench run run --out 'x", "no record of a run"),
        (None, "no record of a run"),
        ("deadbench run run --address far:1", "was on the cluster far:1; give --address far:1 to join it, or none"),
        ("deadbench run run; touch injected", "no such directory"),
    ):
        record.write_text(json.dumps(facts | {"command": command}))
        code, out, err = deadbench("reproduce", "out", "run")
        assert (code, out) == (2, ""), command
        assert message in err
        assert len(err.splitlines()) == 1
    assert not Path("injected").exists()
    record.write_text("[]")
    assert "no record of a run" in deadbench("reproduce", "out", "run")[2]
    record.unlink()
    assert "rows of deadbench.measure, callbacks and pytest have no command" in deadbench("reproduce", "out", "run")[2]
    assert "'other' has no read in out; choose run" in deadbench("reproduce", "out", "other")[2]
    assert "no finished read of step9" in deadbench("reproduce", "out", "run", "--revision", "step9")[2]


@pytest.mark.slow
def test_a_command_of_a_whole_suite_is_given_again_for_one_model(base, tmp_path, monkeypatch, deadbench):
    monkeypatch.chdir(tmp_path)
    models = "".join(
        f"  - {{id: m{n}, source: {base}/run/step{n}, dtype: float32, input: 'tokens:random'}}\n" for n in (10, 20)
    )
    Path("models.yaml").write_text(
        "protocols:\n  standard: {tokens: 8D}\n  tiny: {tokens: 4D}\n"
        "suites:\n  quick: {protocol: tiny, models: [m10, m20], reads: [parameters]}\n"
        f"models:\n{models}"
    )
    assert deadbench("run", "--address", "none", "--out", "out")[0] == 0
    code, out, _ = deadbench("reproduce", "out", "m20", "--json", "--out", "again")
    assert code == 0
    assert json.loads(out)["verdict"]["equal"]
    assert pl.read_parquet("again/reads/*.parquet").select("model", "protocol").rows() == [("m20", "tiny")]


@pytest.mark.slow
def test_a_row_that_comes_with_deadbench_is_given_again(tmp_path, monkeypatch, deadbench):
    """Of another machine, whose rounding the kernel's eigenvalue is; what is not rounding is equal."""
    monkeypatch.chdir(tmp_path)
    before = STORED.stat().st_mtime_ns
    assert (
        "has no read in reference; choose pythia-1.4b, pythia-160m\n"
        in deadbench("reproduce", "reference", "Pythia")[2]
    )
    assert "choose gpt2\n" in deadbench("reproduce", "reference", "gtp2")[2]
    code, _, err = deadbench("run", "twin-layernorm", "--out", "reference")
    assert (code, "give another, or ./reference" in err) == (2, True)
    code, out, err = deadbench("reproduce", "reference", "twin-layernorm", "--read", "random", "--json")
    assert code in (0, 1), err
    found = {row["metric"]: (row["stored"], row["now"]) for row in json.loads(out)["reproduce"]}
    assert found["alignment"] == pytest.approx((1.0, 1.0), abs=1e-6)
    assert found["depth"][1] == pytest.approx(found["depth"][0], abs=0.7)
    assert not (tmp_path / "reference").exists()
    assert STORED.stat().st_mtime_ns == before, "it may be where nobody may write"
