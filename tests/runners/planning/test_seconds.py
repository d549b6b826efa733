"""Projected seconds: against arithmetic by hand, and against what stored reads of the quick suite took."""

import json
from dataclasses import replace

import polars as pl
import pytest

from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.planning.hardware import parse_cluster, this_machine
from deadbench.runners.planning.plan import make_plan
from deadbench.runners.planning.seconds import Rates, Work, projected, rates_file, rates_of
from deadbench.runners.planning.sizes import measure
from deadbench.suite.architectures.build import build_config
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT
from tests.runners.planning.test_plan import neox

GPU = Rates("H200", 15e10, 8e14, 6e13, 6e13, 2e10)
CPU = Rates("cpu", 0.0, 1e11, 1e11, 5e10, 1e9)
WORK = Work("trained", 8 * 4096, 8 * 4096, 16e9, 33, 4096, 0.0, 16e9, "bfloat16", 1)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Keeps the rates that it is given, as `doctor` would."""
    monkeypatch.setenv("DEADBENCH_CACHE", str(tmp_path / "cache" / "checkpoints"))

    def keep(*rates):
        rates_file().parent.mkdir(parents=True, exist_ok=True)
        rates_file().write_text(json.dumps([vars(each) for each in rates]))

    return keep


def test_seconds_are_arithmetic():
    found = projected(WORK, GPU)
    assert found.forward == pytest.approx(16e9 * 8 * 4096 / 4e14)
    grams = 34 * 9 / 8 * 4096**2 * 8 * 4096 / 3e13
    factors = 3 / 3 + 2 * 4 / 3 + 2 * 10 / 3
    assert found.spectra == pytest.approx(grams + 34 * ((9 + factors) * 4096**3 / 3e12 + 70 * 4096 * 1e-7))
    assert found.load == pytest.approx(16 + 16e9 / 2e10), "from a disk of 1 GB/s, then to the GPU"
    assert (found.total, found.most) == (found.load + found.forward + found.spectra, "load")
    on_cpu = projected(WORK, CPU)
    assert on_cpu.load == 16
    assert on_cpu.spectra == pytest.approx(34 * (9 / 8 * 4096**2 * 8 * 4096 / 2.5e10 + (9 + factors) * 4096**3 / 2e10))
    drawn = projected(replace(WORK, read="random"), GPU)
    assert drawn.spectra == pytest.approx(grams + 34 * ((9 + 1 + 4 / 3) * 4096**3 / 3e12 + 70 * 4096 * 1e-7))
    assert (found.loaded, found.most_once_loaded) == (found.forward + found.spectra, "spectra")


def test_passes_ranks_dtypes_and_drawn_weights_count():
    once = projected(WORK, GPU)
    twice = projected(replace(WORK, passed_tokens=2 * WORK.passed_tokens), GPU)
    assert (twice.forward, twice.spectra) == (2 * once.forward, once.spectra)
    shared = projected(replace(WORK, devices=4), GPU)
    assert (shared.load, 4 * shared.forward, 4 * shared.spectra) == (once.load, once.forward, once.spectra)
    assert projected(replace(WORK, dtype="float32"), GPU).forward == pytest.approx(once.forward * 8e14 / 6e13)
    drawn = projected(replace(WORK, drawn=1e9, loaded_bytes=0.0, num_taps=0), GPU)
    assert (drawn.load, drawn.most) == (10, "load")


@pytest.mark.parametrize(
    ("model", "shape", "more", "aim"),
    [("llama-3.1-8b", "1x141GB", [], 15), (ROOT / "examples" / "llama-70b", "8x141GB", ["--tensor-parallel", 8], 150)],
)
def test_large_models_are_within_the_aims_once_they_are_loaded(deadbench, model, shape, more, aim):
    """By a command that the page on costs shows, from data sheets: one more decomposition of a tap breaks the first."""
    asked = ["plan", model, "--reads", "random", "--input", "tokens:random", "--assume", shape, *more, "--json"]
    (row,) = json.loads(deadbench(*asked)[1])["reads"]
    assert (row["gpus"] >= 1 or row["passes"] == 1, row["most"]) == (True, "load")
    once_loaded = row["forward_seconds"] + row["spectrum_seconds"]
    assert once_loaded < aim
    assert once_loaded + row["load_seconds"] == pytest.approx(row["seconds"])
    D, taps, devices = (4096, 33, 1) if aim == 15 else (8192, 81, 8)
    tokens, flop = 8 * D, 2 * (7.5e9 if aim == 15 else 69.5e9)
    forward = flop * tokens * row["passes"] / (0.5 * 989e12) / devices
    assert row["forward_seconds"] == pytest.approx(forward, rel=0.1), "attention's own products are not counted"
    grams = (taps + 1) * 9 / 8 * D**2 * tokens / (0.5 * 67e12)
    ends = (taps + 1) * ((9 + 1 + 4 / 3) * D**3 / (0.05 * 67e12) + 70 * D * 1e-7)
    assert row["spectrum_seconds"] == pytest.approx((grams + ends) / devices)


def test_flop_are_counted_in_the_forward_pass():
    size = measure(build_config(neox(64, 3, 4, 500)), 256)
    assert size.flop_per_token == 2 * 3 * 12 * 64**2, "products alone, without the embedding"


def test_kept_rates_come_before_those_of_data_sheets(kept):
    assert rates_of(parse_cluster("8x141GB"))[1] == "built-in rates of an H200; deadbench doctor measures your own"
    assert rates_of(parse_cluster("1x24GB"))[0].device == "an A10"
    assert rates_of(parse_cluster("0x24GB"))[0].device == "two CPU cores"
    kept(CPU, GPU)
    assert rates_of(parse_cluster("8x141GB")) == (GPU, "rates of H200, which deadbench doctor measured")
    assert rates_of(parse_cluster("1x24GB"))[0].device == "an A10", "another GPU's say nothing"
    assert rates_of(this_machine(most_gpus=0))[0] == CPU
    assert rates_of(parse_cluster("0x24GB"))[0].device == "two CPU cores", "who knows whose CPU"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[3]",
        '[{"device": "cpu"}]',
        json.dumps([vars(CPU) | {"float64": "x"}]),
        json.dumps([vars(CPU) | {"float64": 0}]),
        json.dumps([vars(CPU) | {"float64": 10**400}]),
        json.dumps([vars(CPU) | {"float64": float("inf")}]),
        json.dumps([vars(CPU) | {"memory": float("nan")}]),
        *(json.dumps([vars(CPU) | {"device": name}]) for name in ([], None, 3, "", "a\x1b[2J", "a" * 1000)),
        json.dumps([vars(CPU) | {"more": 1}]),
        "[" * 100_000,
    ],
)
def test_rates_that_cannot_be_read_are_none(kept, text):
    kept()
    rates_file().write_text(text)
    assert rates_of(this_machine(most_gpus=0))[0].device == "two CPU cores"


def test_a_plan_has_the_seconds_of_what_runs_and_says_by_which_rates(deadbench, kept, tmp_path):
    path = tmp_path / "models.yaml"
    models = [{"id": "m", "input": "tokens:random", "config": neox(64, 3, 4, 500)}]
    path.write_text(json.dumps({"protocols": {"standard": {}}, "suites": {}, "models": models}))
    asked = ["plan", "m", "--registry", path, "--reads", "parameters,random"]
    told = json.loads(deadbench(*asked, "--assume", "1x141GB", "--json")[1])
    assert [row["seconds"] is None for row in told["reads"]] == [True, False]
    assert told["rates"].startswith("built-in rates of an H200")
    kept(GPU)
    _, out, _ = deadbench(*asked, "--assume", "1x141GB")
    assert "0 s, " in out
    assert (
        out.splitlines()[-1] == "time: projected from counted work and rates of H200, which deadbench doctor measured"
    )
    assert "time:" not in deadbench("plan", "m", "--registry", path, "--reads", "parameters")[1]


@pytest.mark.slow
def test_stored_reads_took_what_would_be_projected_within_a_factor_of_two(kept):
    """The four published models of the quick suite, stored by two busy cores whose rates one number describes."""
    kept(Rates("cpu", 0.0, 5.5e10, 5.5e10, 5e10, 1e9))
    stored = pl.read_parquet(ROOT / "tests" / "data" / "quick" / "reads" / "*.parquet")
    stored = stored.filter((pl.col("read") == "random") & (pl.col("hidden_size") > 500))
    jobs = build_jobs(
        load_registry(ROOT / "models.yaml"), ROOT / "models.yaml", stored["model"].to_list(), None, ["random"],
        Overrides(),
    )  # fmt: skip
    cluster, rows = this_machine(most_gpus=0), {row["model"]: row for row in stored.to_dicts()}
    assert len(rows) == 4
    for row in make_plan(jobs, cluster):
        measured = rows[row.model]
        took = sum(measured[f"{step}_seconds"] for step in ("load", "forward", "spectrum"))
        assert 0.5 <= row.seconds / took <= 2, (row.model, row.seconds, took)
        assert row.most == "forward"
