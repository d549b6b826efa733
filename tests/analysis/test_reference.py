"""The result set that comes with deadbench says of the paper's models what its page says, at their own size."""

import json
import re

import polars as pl
import pytest

from deadbench.analysis.results import ResultsError, scan
from deadbench.suite.registry.loading import load_registry
from deadbench.suite.storage import REFERENCE
from tests.conftest import ROOT

STORED = ROOT / "suite" / "data" / "reference"
REGISTRY = load_registry(ROOT / "models.yaml")
PAPER = {model.id: model for model in REGISTRY.models if model.id in REGISTRY.suites["paper"].models}


@pytest.fixture(scope="module")
def rows():
    text = pl.col("model", "family", "read", "dtype", "run_id", "status").cast(pl.String)
    return scan(REFERENCE).with_columns(text).collect()


@pytest.fixture(scope="module")
def random(rows):
    return {row["model"]: row for row in rows.filter(pl.col("read") == "random").to_dicts()}


def test_nine_layernorm_models_have_the_kernel_and_five_rmsnorm_models_do_not(random):
    found = {
        name: [random[model.id]["alignment"] for model in PAPER.values() if model.family == name]
        for name in ("layernorm", "rmsnorm")
    }
    assert [len(each) for each in found.values()] == [9, 5]
    assert min(found["layernorm"]) >= 0.99995
    assert max(found["rmsnorm"]) < 0.1
    assert all(random[name]["family"] == model.family for name, model in PAPER.items())


@pytest.mark.parametrize("name", PAPER)
def test_a_model_was_read_at_its_true_dimensions(random, name):
    row, config = random[name], PAPER[name].config
    text = config.get("text_config", config)
    assert row["num_parameters"] == PAPER[name].parameters
    assert row["hidden_size"] == text.get("hidden_size", text.get("n_embd"))
    assert row["num_blocks"] == text.get("num_hidden_layers", text.get("n_layer"))
    assert row["num_tokens"] >= row["hidden_size"] + 512


def test_the_page_has_the_stored_numbers(random):
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    shown = {cells[0]: cells for cells in (re.split(r" *\| *", line)[1:-1] for line in page.splitlines()) if cells}
    for name in PAPER:
        row = random[name]
        seconds = row["load_seconds"] + row["forward_seconds"] + row["spectrum_seconds"]
        assert shown[name] == [
            name, row["family"], f"{row['num_parameters'] / 1e9:.2f} B",
            *(str(row[column]) for column in ("num_blocks", "hidden_size", "num_tokens", "dtype")),
            f"{row['alignment']:.4f}", f"{row['depth']:.2f}",
            f"{row['depth_as_executed']:.2f}", f"{seconds / 60:.1f}", f"{row['peak_host_bytes'] / 1e9:.1f}",
        ]  # fmt: skip


def test_each_row_has_its_command_and_no_place_of_the_machine_that_made_it(rows):
    assert set(rows["status"]) == {"ok"}
    records = {path.parent.name: path.read_text(encoding="utf-8") for path in STORED.glob("runs/*/run.json")}
    assert set(rows["run_id"]) == set(records)
    assert all(json.loads(record)["command"].startswith("deadbench run ") for record in records.values())
    told = rows.select(pl.col("source", "input", "error").cast(pl.String))
    places = re.compile(r'(^|[" ])/\w')
    assert not [value for column in told for value in column if value and places.search(value)]
    assert not [name for name, record in records.items() if places.search(record)]


def test_a_folder_that_is_called_so_is_another(rows, tmp_path, monkeypatch):
    (tmp_path / "reference" / "reads").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert scan(REFERENCE).collect().height == rows.height
    with pytest.raises(ResultsError, match=r"\./reference"):
        scan("./reference").collect()


def test_the_set_is_small(rows):
    assert sum(path.stat().st_size for path in STORED.rglob("*") if path.is_file()) < 5_000_000
    assert rows.height > 70
