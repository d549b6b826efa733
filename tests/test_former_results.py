"""Stored result sets, `minilm` of an earlier schema: every command reads them, and a run finds its reads done."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from deadbench.runners.driver.books import Summary
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import Overrides
from deadbench.suite.read_specs import READ_SPECS
from deadbench.suite.registry.loading import load_registry
from deadbench.suite.schema import KEY
from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # the report with all its plots

STORED = Path(__file__).parent / "data"
REGISTRY = ROOT / "models.yaml"
SETS = {"quick": "twin-layernorm", "minilm": "./all-MiniLM-L6-v2"}  # with a model whose checkpoints were read
TWINS = ["twin-layernorm", "twin-rmsnorm"]


@pytest.fixture(autouse=True)
def of_then(monkeypatch):
    """The versions of the reads that wrote the quick set."""
    for read, version in (("random", 3), ("trained", 3), ("functional", 1)):
        monkeypatch.setitem(READ_SPECS, read, replace(READ_SPECS[read], version=version))


@pytest.fixture
def lying_here(tmp_path):
    """A copy of the stored quick result set, its fingerprints of folders those of this working tree."""
    out = tmp_path / "quick"
    shutil.copytree(STORED / "quick", out)
    for job in jobs(TWINS):
        for read in job.reads:
            revision = pl.col("revision").eq_missing(pl.lit(read.revision, dtype=pl.String))
            of_read = (pl.col("model") == read.model.id) & (pl.col("read") == read.read) & revision
            rewrite(out, of_read, {"source_fingerprint": read.fingerprint})
    return out


@pytest.fixture
def executed(monkeypatch):
    """The labels of the reads that the command would have run."""
    labels = []

    def execute(jobs, store, settings, reporter, run_id):
        labels.extend(read.label() for job in jobs for read in job.reads)
        return Summary(run_id)

    monkeypatch.setattr("deadbench.runners.driver.in_process.execute", execute)
    return labels


def rewrite(out, of_rows, values):
    """Put other `values` into some rows of `reads`."""
    (file,) = (out / "reads").iterdir()
    schema = pq.read_schema(file)  # with the version in its metadata
    table = pl.read_parquet(file)
    assert not table.filter(of_rows).is_empty()
    changed = table.with_columns(
        pl.when(of_rows).then(pl.lit(value)).otherwise(pl.col(name)).cast(table.schema[name]).alias(name)
        for name, value in values.items()
    )
    pq.write_table(changed.to_arrow().cast(schema), file)


def reads(folder):
    return pl.scan_parquet(folder / "reads" / "*.parquet").collect()


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*.parquet"))


def jobs(models, kinds=None):
    return build_jobs(load_registry(REGISTRY), REGISTRY, models, "quick", kinds, Overrides())


@pytest.mark.parametrize(("name", "model"), SETS.items())
def test_the_leaderboard_has_the_depths_that_are_stored(deadbench, name, model):
    code, out, _ = deadbench("leaderboard", STORED / name, "--json")
    lines = {row["model"]: row for row in json.loads(out)["leaderboard"]}
    table = reads(STORED / name)
    assert code == 0
    assert set(lines) == set(table["model"])
    last = table.filter(model=model, read="trained").sort("checkpoint_step")[-1]
    assert lines[model]["depth"] == last["depth"].item()


@pytest.mark.parametrize(("name", "model"), SETS.items())
def test_every_other_command_reads_it(deadbench, tmp_path, name, model):
    results = STORED / name
    for command, title in (
        (["families", results], "families"),
        (["dead", results], "dead_directions"),
        (["compare", results, results, "--all"], "compare"),
        (["trend", results, "--model", model], "trend"),
    ):
        code, out, err = deadbench(*command, "--json")
        assert code == 0, err
        assert json.loads(out)[title], command
    page = tmp_path / "report.html"
    assert deadbench("report", results, "-o", page)[0] == 0
    assert model in page.read_text(encoding="utf-8")


def test_one_of_them_lacks_columns_of_now():
    assert {"depth_standard_error", "source_step"} & set(reads(STORED / "minilm").columns) == set()
    assert {"depth_standard_error", "source_step"} <= set(reads(STORED / "quick").columns)


@pytest.mark.parametrize("name", SETS)
def test_it_is_the_same_as_itself(deadbench, name):
    document = json.loads(deadbench("compare", STORED / name, STORED / name, "--all", "--json")[1])
    assert {(row["change"], row["verdict"]) for row in document["compare"]} == {(0.0, "same")}


def test_the_key_of_every_stored_read_is_that_of_the_job_that_would_read_it_now():
    wanted = [read for job in [*jobs([]), *jobs(TWINS, ["functional"])] for read in job.reads]
    table = reads(STORED / "quick")
    assert {tuple(read.key_columns().values()) for read in wanted} == set(table.select(KEY).rows())
    # Of a configuration in the registry the fingerprint is its content; of a folder, of the files as they lie there.
    inline = {read.identity() for read in wanted if read.model.config is not None}
    identities = {row[:-1] for row in table.select(*KEY, "source_fingerprint", "status").rows() if row[-1] == "ok"}
    assert len(inline) == 4
    assert inline <= identities


def test_a_run_on_it_reads_nothing_again_and_fresh_reads_all(deadbench, lying_here, executed):
    before = files(lying_here)
    code, out, _ = deadbench("run", "--suite", "quick", "--out", lying_here)
    every = sum(len(job.reads) for job in jobs([]))
    assert code == 0
    assert out == f"0 ok, 0 failed, {every} already there; results in {lying_here}\n"
    assert (executed, files(lying_here)) == ([], before)
    assert deadbench("run", "--suite", "quick", "--out", lying_here, "--fresh")[0] == 0
    assert len(executed) == every


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"status": "failed"}, True),
        ({"source_fingerprint": "another"}, True),
        ({"protocol_hash": "another"}, True),
        ({"run_id": "another", "attempt": 2, "error": "another", "protocol": "another", "dtype": "another"}, False),
    ],
)
def test_only_key_fingerprint_and_status_decide_what_is_read_again(deadbench, lying_here, executed, change, again):
    rewrite(lying_here, (pl.col("model") == "twin-rmsnorm") & (pl.col("read") == "random"), change)
    assert deadbench("run", "--suite", "quick", "--out", lying_here)[0] == 0
    assert executed == (["twin-rmsnorm random"] if again else [])


def test_a_read_whose_numbers_moved_since_is_read_again(deadbench, lying_here, executed, monkeypatch):
    monkeypatch.setitem(READ_SPECS, "random", replace(READ_SPECS["random"], version=1000))
    assert deadbench("run", "--suite", "quick", "--out", lying_here)[0] == 0
    assert set(executed) == {f"{job.model_id} random" for job in jobs([])}
