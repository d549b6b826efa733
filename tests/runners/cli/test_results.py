"""The commands that read result sets, on a stored quick one: formats, exit codes, files."""

import csv
import io
import json

import pytest

from deadbench.runners.results.store import ResultStore
from deadbench.suite.schema import to_table
from tests.conftest import ROOT

QUICK = ROOT / "tests" / "data" / "quick"
FIRST, LAST = f"{QUICK}@step0", f"{QUICK}@step4096"
GATE = ROOT / "examples" / "gate.yaml"


@pytest.mark.parametrize(
    ("command", "title"),
    [
        (["families", QUICK], "families"),
        (["compare", FIRST, LAST], "compare"),
        (["compare", FIRST, LAST, "--gate", GATE, "--all"], "compare"),
        (["trend", QUICK, "--model", "twin-layernorm"], "trend"),
    ],
)
def test_every_format_has_the_same_rows(deadbench, command, title):
    documents = {}
    for format in ("table", "json", "csv", "md", "html"):
        code, documents[format], _ = deadbench(*command, "--format", format)
        assert code == 0
    assert json.loads(deadbench(*command, "--json")[1]) == json.loads(documents["json"])
    rows = json.loads(documents["json"])[title]
    assert len(list(csv.DictReader(io.StringIO(documents["csv"])))) == len(rows) > 5
    assert documents["md"].count("\n| ") >= len(rows)
    assert documents["html"].lstrip().startswith("<!doctype html>")


def test_the_trend_is_in_training_order(deadbench):
    document = json.loads(deadbench("trend", QUICK, "--model", "twin-rmsnorm", "--json")[1])
    assert [row["checkpoint_step"] for row in document["trend"]] == [0, 16, 128, 512, 2048, 4096]
    assert {row["metric"] for row in document["metrics"]} >= {"depth", "lambda_v"}


def test_an_unchanged_rerun_passes_and_a_broken_gate_is_exit_1(deadbench, tmp_path, monkeypatch):
    page = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    assert deadbench("compare", QUICK, QUICK, "--gate", GATE)[:2] == (0, "")
    code, out, err = deadbench("compare", LAST, f"{QUICK}@step16", "--gate", GATE, "--json")
    document = json.loads(out)
    assert code == 1
    assert document["gate"] == {"passed": False, "num_checks": 14, "num_broken": 1, "num_cannot_tell": 0}
    assert [(row["model"], row["metric"]) for row in document["compare"]] == [("twin-layernorm", "depth")]
    assert err.splitlines() == [
        "deadbench gate: 1 of 14 checks broke",
        f"baseline {LAST}: twin-layernorm@step4096",
        f"candidate {QUICK}@step16: twin-layernorm@step16",
    ]
    passed, broke = page.read_text(encoding="utf-8").split("### ")[1:]
    assert passed.startswith("✅")
    assert broke.startswith("❌")
    assert f"- candidate {QUICK}@step16: twin-layernorm@step16" in broke


@pytest.mark.parametrize("format", ["table", "md"])
def test_no_differences_is_a_line(deadbench, format):
    code, out, err = deadbench("compare", QUICK, QUICK, "--format", format)
    assert (code, err) == (0, "no differences: 30 reads, 14 metrics compared\n")
    assert out == "" if format == "table" else "baseline" in out


def test_a_rule_that_judged_nothing_is_named(deadbench, tmp_path):
    gate = tmp_path / "gate.yaml"
    gate.write_text("metrics: {depth: {worse: lower}, peak_device_bytes: {worse: higher, relative: 0.1}}")
    _, _, err = deadbench("compare", QUICK, QUICK, "--gate", gate)
    assert f"{gate}: no read of the baseline has peak_device_bytes; it judged nothing" in err


def test_mixed_protocols_are_one_line(deadbench, tmp_path):
    import pyarrow.dataset as ds

    rows = ds.dataset(QUICK / "reads").to_table().to_pylist()
    ResultStore(str(tmp_path)).write({"reads": to_table("reads", [row | {"protocol_hash": "other"} for row in rows])})
    code, out, err = deadbench("compare", QUICK, tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "different protocols" in err


@pytest.mark.slow
def test_reports_and_plots_are_files(deadbench, tmp_path):
    code, out, _ = deadbench("report", QUICK, "-o", tmp_path / "r.html", "--plots", tmp_path / "plots")
    assert code == 0
    assert out.splitlines()[0] == str(tmp_path / "r.html")
    assert len(out.splitlines()) == 1 + len(list((tmp_path / "plots").glob("*.svg"))) == 18
    arguments = ["trend", QUICK, "--model", "twin-layernorm", "--metric", "lambda_max", "--plot", tmp_path / "t.svg"]
    code, out, _ = deadbench(*arguments)
    assert code == 0
    assert "lambda max" in out, "a metric that was asked for is a column"
    assert (tmp_path / "t.svg").read_text().startswith("<svg")
    sides = [f"{QUICK}@step16", f"{QUICK}@step4096"]
    assert deadbench("compare", *sides, "--plot", tmp_path / "c.pdf")[0] == 0
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")
    code, _, err = deadbench("compare", *sides, "--plot", tmp_path / "c.gif")
    assert (code, err.count("\n")) == (2, 1)
    assert "a plot is written as svg, png or pdf" in err


def test_a_trend_of_asked_metrics_says_what_a_mean_over_seeds_is_of(deadbench, tmp_path):
    rows = [
        {"run_id": "r", "model": f"m-seed{seed}", "revision": f"step{step}", "read": "trained", "seed": 0,
         "protocol_hash": "h", "engine": "torch", "protocol": "p", "dtype": "float32", "family": "layernorm",
         "status": "ok", "checkpoint_step": step, "depth": 12.0 + seed}
        for seed in (1, 2, 3) for step in (1, 2)
    ]  # fmt: skip
    ResultStore(str(tmp_path)).write({"reads": to_table("reads", rows)})
    for asked in ([], ["--metric", "depth"]):
        _, out, _ = deadbench("trend", tmp_path, "--model", "m-seed*", *asked)
        first, _, _ = out.partition("metrics\n")
        assert "mean ± standard deviation over up to 3 seeds" in first
        assert "num replicates" not in first
    _, out, _ = deadbench("trend", tmp_path, "--model", "m-seed1", "--metric", "depth")
    assert "seeds" not in out
