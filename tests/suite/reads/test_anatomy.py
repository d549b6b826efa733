"""What is kept of an architecture gives the same rows as the architecture itself, and only for what it was kept of."""

import os
import subprocess
import sys
from dataclasses import replace

import polars as pl
import pytest

from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.worker.run import run_model
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.reads.anatomy import keep_anatomy, kept_anatomy
from deadbench.suite.reads.norms_table import norms_stored, published_anatomy
from deadbench.suite.reads.parameters import read_parameters
from deadbench.suite.registry.loading import load_registry, own_registry
from tests.conftest import ROOT, TWINS

TWIN = TWINS / "layernorm" / "step4096"


@pytest.fixture(scope="module")
def twin():
    """(checkpoint, its parameters' read, the anatomy of its architecture)."""
    checkpoint = Checkpoint(str(TWIN))
    read = read_parameters(checkpoint)
    return checkpoint, read, published_anatomy(checkpoint.config(), read)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEADBENCH_CACHE", str(tmp_path))
    return tmp_path / "anatomies"


def test_what_is_kept_gives_the_same_rows(twin, cache):
    checkpoint, read, anatomy = twin
    assert anatomy.maps.reads
    assert anatomy.maps.writes
    keep_anatomy("config", read.entries, anatomy)
    kept = kept_anatomy("config", read.entries)
    rows = [row for row, _ in norms_stored(anatomy, checkpoint, read)]
    assert [row for row, _ in norms_stored(kept, checkpoint, read)] == rows
    assert sum(row["dead_parameters"] for row in rows) > 0
    assert replace(kept, norms=()) == replace(anatomy, norms=())


def test_it_is_kept_for_this_configuration_and_these_tensors_alone(twin, cache, monkeypatch):
    _, read, anatomy = twin
    keep_anatomy("config", read.entries, anatomy)
    assert kept_anatomy("another", read.entries) is None
    fewer = dict(list(read.entries.items())[1:])
    assert kept_anatomy("config", fewer) is None
    name, entry = next(iter(read.entries.items()))
    assert kept_anatomy("config", read.entries | {name: replace(entry, shape=(3,))}) is None
    assert kept_anatomy("config", read.entries) is not None
    monkeypatch.setattr("deadbench.suite.reads.anatomy.metadata.version", lambda package: "0")
    assert kept_anatomy("config", read.entries) is None


def test_a_torn_file_and_a_closed_folder_say_nothing(twin, cache):
    _, read, anatomy = twin
    keep_anatomy("config", read.entries, anatomy)
    (file,) = cache.iterdir()
    file.write_text(file.read_text()[:-9])
    assert kept_anatomy("config", read.entries) is None
    file.unlink()
    cache.rmdir()
    cache.write_text("a file where the folder would be")
    keep_anatomy("config", read.entries, anatomy)
    assert kept_anatomy("config", read.entries) is None


@pytest.mark.subprocess
def test_the_second_read_of_a_configuration_needs_neither_torch_nor_ray(tmp_path):
    path = own_registry()
    (job,) = build_jobs(load_registry(path), path, [str(TWIN)], None, ["parameters"], Overrides())
    (event,) = [each for each in run_model(job, "run", 1) if isinstance(each, Finished)]
    script = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'ray', 'polars'))\n"
        "sys.argv[0] = 'deadbench'\n"
        "from deadbench.runners.cli.main import main; main()"
    )
    out = str(tmp_path / "out")
    command = [
        sys.executable,
        "-c",
        script,
        "run",
        str(TWIN),
        "--reads",
        "parameters",
        "--address",
        "none",
        "--out",
        out,
    ]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left_out = ["run_id", "started_at", "finished_at", "peak_host_bytes"]
    (row,) = pl.read_parquet(f"{out}/reads/*.parquet").drop(left_out).to_dicts()
    assert row == {name: value for name, value in event.row.items() if name not in left_out}
    norms = pl.read_parquet(f"{out}/norms/*.parquet").drop("run_id").to_dicts()
    assert norms == pl.from_arrow(event.tables["norms"]).drop("run_id").to_dicts()
