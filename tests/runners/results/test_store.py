"""Result sets: whole files or none, opened by plain polars and pyarrow, never continued across a newer schema."""

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from deadbench.analysis.results import latest, scan
from deadbench.runners.results import reader
from deadbench.runners.results.store import ResultStore, StoreError
from deadbench.suite.schema import READS, SCHEMA_VERSION, TABLES, arrow_schema, to_table

ROW = {
    "model": "m", "revision": None, "read": "trained", "seed": 0, "protocol_hash": "p", "engine": "torch",
    "source_fingerprint": "f", "status": "ok", "depth": 13.5, "num_dead_1e6": 1, "kernel_exact": True,
    "started_at": datetime(2026, 1, 2, tzinfo=UTC),
}  # fmt: skip


def tables(**changes):
    key = {name: ROW[name] for name in ("model", "revision", "read", "seed", "protocol_hash", "engine")}
    spectrum = key | {"site": "final_norm", "eigenvalues": [2.0, 1.0, 1e-14]}
    return {"spectra": to_table("spectra", [spectrum]), "reads": to_table("reads", [ROW | changes])}


def test_rows_come_back_by_value_through_polars_and_pyarrow(tmp_path):
    ResultStore(str(tmp_path / "out")).write(tables())
    reads = pl.scan_parquet(tmp_path / "out" / "reads" / "*.parquet").collect()
    assert reads.columns == [c.name for c in READS]
    row = reads.to_dicts()[0]
    assert {name: row[name] for name in ROW} == ROW
    assert row["alignment"] is None
    spectra = ds.dataset(tmp_path / "out" / "spectra").to_table().to_pylist()
    assert spectra[0]["eigenvalues"] == [2.0, 1.0, 1e-14]


def test_every_field_carries_unit_and_meaning(tmp_path):
    ResultStore(str(tmp_path)).write(tables())
    schema = pq.read_schema(next((tmp_path / "reads").iterdir()))
    assert schema.metadata[b"schema_version"] == str(SCHEMA_VERSION).encode()
    assert schema.field("depth").metadata == {
        b"unit": b"decades",
        b"meaning": schema.field("depth").metadata[b"meaning"],
    }
    for table in TABLES:
        for field in arrow_schema(table):
            assert field.metadata[b"meaning"], f"{table}.{field.name} has no meaning"


def test_undeclared_columns_are_refused():
    with pytest.raises(ValueError, match="no column \\['dept'\\]"):
        to_table("reads", [{"dept": 1.0}])


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_row_that_replaces_another_is_the_newest_whatever_the_clock_says(hours, tmp_path):
    now = datetime.now(UTC)
    first, then = now + timedelta(hours=hours), now + timedelta(minutes=1)
    before = ResultStore(str(tmp_path))
    for model in "ab":
        before.write(tables(model=model, run_id="old", finished_at=first))
    store = ResultStore(str(tmp_path))
    store.finished()
    for model, stamp in (("a", "1"), ("a", "1"), ("c", "2")):  # the second in place of the first
        store.write(tables(model=model, run_id="new", finished_at=then), stamp)
    written = pl.scan_parquet(tmp_path / "reads" / "*.parquet")
    columns = ("run_id", "model", "finished_at")
    newest = max(then, first + timedelta(milliseconds=1))
    old, new = [("old", "a", first), ("old", "b", first)], [("new", "a", newest), ("new", "c", then)]
    assert sorted(written.select(columns).collect().rows()) == sorted(old + new)
    assert sorted(latest(written).select(columns).collect().rows()) == sorted(old[1:] + new)


def test_hidden_files_and_folders_named_like_files_are_left_out(tmp_path):
    ResultStore(str(tmp_path)).write(tables())
    for table in ("reads", "spectra"):
        (tmp_path / table / "._x.parquet").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
        (tmp_path / table / "folder.parquet").mkdir()
    assert len(ResultStore(str(tmp_path)).finished()) == 1


def test_only_ok_reads_are_finished(tmp_path):
    store = ResultStore(str(tmp_path))
    assert store.finished() == set()
    store.write(tables())
    store.write(tables(model="n", status="failed"))
    assert store.finished() == {("m", None, "trained", 0, "p", "torch", "f")}


@pytest.mark.parametrize("out", ["runs/exp::1", "a::x", "memory://runs::1/exp::1"])
def test_results_with_colons_are_where_they_were_asked_for_and_nowhere_else(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ResultStore(out).write(tables())
    if "://" not in out:
        assert len(list((tmp_path / out / "reads").glob("*.parquet"))) == 1
        assert {path.name for path in (tmp_path / out).parent.iterdir()} == {Path(out).name}
    assert len(ResultStore(out).finished()) == 1
    assert not ResultStore(out[:-1] + "2").finished()
    assert scan(out).collect()["depth"].to_list() == [13.5]


@pytest.mark.parametrize("place", ["write", "rename"])
def test_a_full_disk_leaves_nothing_half_written(place, tmp_path, monkeypatch):
    store = ResultStore(str(tmp_path))
    store.write(tables())
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    target = {"write": "deadbench.suite.storage.os.fsync", "rename": "deadbench.suite.storage.os.replace"}[place]
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(OSError, match="No space left"):
            store.write(tables(model="n"))
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before
    store.write(tables(model="n"))
    assert len(ResultStore(str(tmp_path)).finished()) == 2


def test_reads_are_written_last(tmp_path, monkeypatch):
    """A crash between the tables of one read must not leave a row without its spectrum."""
    store = ResultStore(str(tmp_path))
    written = []
    monkeypatch.setattr(store, "_write_whole", lambda path, table: written.append(path.split("/")[0]))
    store.write(
        {"reads": tables()["reads"], "norms": to_table("norms", [{"norm": "a"}]), "spectra": tables()["spectra"]}
    )
    assert written == ["norms", "spectra", "reads"]


def rewrite_version(folder, version):
    path = next((folder / "reads").iterdir())
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"schema_version": version} if version else None), path)


@pytest.mark.parametrize(
    ("version", "message"), [(str(SCHEMA_VERSION + 1), "newer deadbench"), (None, "is not a deadbench result")]
)
def test_foreign_and_newer_results_are_not_continued(version, message, tmp_path):
    ResultStore(str(tmp_path)).write(tables())
    rewrite_version(tmp_path, version)
    with pytest.raises(StoreError, match=message):
        ResultStore(str(tmp_path))


def test_torn_files_and_unwritable_places_are_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        ResultStore(str(tmp_path / "file" / "out"))
    with pytest.raises(StoreError, match="cannot be written"):
        ResultStore("/proc/deadbench")
    with pytest.raises(StoreError, match="--out nosuch://x"):
        ResultStore("nosuch://x")
    ResultStore(str(tmp_path / "out")).write(tables())
    path = next((tmp_path / "out" / "reads").iterdir())
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StoreError, match="cannot be read as parquet"):
        ResultStore(str(tmp_path / "out"))


def test_the_contracts_columns_are_all_there():
    """The outside contract, frozen: names may be added, none may go."""
    contract = json.loads(CONTRACT)
    for table, names in contract.items():
        missing = set(names.split()) - {c.name for c in TABLES[table]}
        assert not missing, f"{table} lacks {missing}"


CONTRACT = """{
"reads": "run_id model source revision checkpoint_step read seed modality input num_tokens num_distinct_inputs protocol_hash family family_expected final_norm final_norm_tensor placement scale has_bias eps hidden_size num_blocks num_parameters num_zero_scales scale_harmonic predicted_dim depth_predicted alignment containment lambda_v lambda_min lambda_second lambda_mean lambda_max depth depth_bottom num_dead_1e4 num_dead_1e6 num_dead_1e8 num_dead_1e10 spectrum_method spectrum_floor depth_as_executed depth_exact precision_slope kernel_exact blocks_preserved worst_block worst_block_ratio engine tensor_parallel device dtype load_seconds forward_seconds spectrum_seconds peak_device_bytes peak_host_bytes versions started_at finished_at attempt status error",
"spectra": "site eigenvalues",
"blocks": "block sigma_min sigma_median sigma_max ratio floor state rank_limited preserved bottom_coordinates bottom_weights participation",
"norms": "norm family role scale_min scale_median scale_max scale_harmonic num_zero_scales dead_parameters"
}"""  # noqa: E501


def test_what_killed_writers_left_is_swept_and_what_is_written_now_is_not(tmp_path):
    store = ResultStore(str(tmp_path / "out"))
    store.write_text("runs/a/run.json", "{}")
    kept, gone = [], []
    for name in ("_tmp/0123", ".deadbench-01234567"):
        for age, listed in ((90_000, gone), (80_000, kept)):
            path = tmp_path / "out" / f"{name}-{age}"
            path.write_bytes(b"torn")
            os.utime(path, (time.time() - age,) * 2)
            listed.append(path)
    (tmp_path / "elsewhere").write_text("mine")
    link = tmp_path / "out" / "_tmp" / "link"
    link.symlink_to(tmp_path / "elsewhere")
    os.utime(link, (0, 0), follow_symlinks=False)
    ResultStore(str(tmp_path / "out"))
    assert all(path.exists() for path in [*kept, link])
    assert not any(path.exists() for path in gone)
    assert store.read_text("runs/a/run.json") == "{}"


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize(
    ("limit", "text", "told"),
    [
        ("_DOCUMENT_BYTES", "x" * 101, r"more than 100 bytes"),
        ("MAX_OBJECTS", "[{}" * 51, r"more than [\d,]+ bytes or 100 lists; no run writes that: move it away"),
    ],
)
def test_a_document_larger_than_any_is_one_line(tmp_path, monkeypatch, place, limit, text, told):
    store = ResultStore(str(tmp_path / "out") if place == "local" else f"memory://{tmp_path.name}")
    monkeypatch.setattr(reader, limit, 100)
    store.write_text("runs/a/run.json", text[:99])
    assert store.read_text("runs/a/run.json") == text[:99]
    store.write_text("runs/a/run.json", text)
    with pytest.raises(StoreError, match=rf"run.json.*{told}"):
        store.read_text("runs/a/run.json")


def test_a_document_that_is_a_pipe_is_not_waited_for(tmp_path):
    store = ResultStore(str(tmp_path / "out"))
    (tmp_path / "out" / "runs" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "out" / "runs" / "a" / "run.json")
    with pytest.raises(StoreError, match=r"run.json cannot be read \(not a regular file\)"):
        store.read_text("runs/a/run.json")
