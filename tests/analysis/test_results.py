import os
import shutil
from pathlib import Path

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deadbench.analysis import panics
from deadbench.analysis.leaderboard import leaderboard
from deadbench.analysis.pages.report import provenance
from deadbench.analysis.results import ResultsError, collected, latest, scan
from deadbench.analysis.trackers.curves import series
from deadbench.runners.results.reader import ResultReader
from deadbench.runners.results.store import ResultStore, StoreError
from deadbench.suite.schema import arrow_schema, to_table


def test_scan_reads_every_file_with_our_columns(result_set, read):
    location = result_set([read("a", depth=1.5), read("b", depth=None)])
    frame = scan(location).collect()
    assert frame.columns == arrow_schema("reads").names
    assert dict(zip(frame["model"], frame["depth"], strict=True)) == {"a": 1.5, "b": None}


def test_older_and_additional_columns_are_no_obstacle(result_set, read, tmp_path):
    location = result_set([read("a")])
    table = to_table("reads", [read("old", depth=2.0)]).drop_columns(["depth_limit"])
    table = table.append_column("new_column", pa.array([1])).replace_schema_metadata({"schema_version": "1"})
    pq.write_table(table, tmp_path / "results" / "reads" / "old.parquet")
    frame = scan(location).collect().filter(model="old")
    assert frame["depth"].to_list() == [2.0]
    assert frame["depth_limit"].to_list() == [None]


def test_a_folder_name_may_look_like_a_pattern_or_a_partition(result_set, read):
    location = result_set([read("a")], name="seed=1 [x]*")
    frame = scan(location).collect()
    assert frame["model"].to_list() == ["a"]
    assert frame["seed"].to_list() == [0]


def test_uri(read):
    memory = fsspec.filesystem("memory")
    for index, model in enumerate("ab"):
        with memory.open(f"/set/reads/{index}.parquet", "wb") as file:
            pq.write_table(to_table("reads", [read(model)]), file)
    assert sorted(scan("memory://set").collect()["model"]) == ["a", "b"]


def test_only_parquet_files_count_and_no_hidden_ones(result_set, read, tmp_path):
    location = result_set([read("a")])
    for name in (".hidden.parquet", "notes.txt"):
        (tmp_path / "results" / "reads" / name).write_text("not parquet")
    assert scan(location).collect().height == 1


def test_a_table_without_rows_is_empty_and_typed(result_set, read):
    location = result_set([read("a")])
    frame = scan(location, "norms").collect()
    assert frame.is_empty()
    assert frame.schema["scale_min"] == pl.Float64


@pytest.mark.parametrize("location", ["absent", "nosuchscheme://x"])
def test_what_is_not_there_is_said_in_one_line(location):
    with pytest.raises(ResultsError, match=location) as error:
        scan(location)
    assert "\n" not in str(error.value)


def test_a_folder_without_reads_is_no_result_set(tmp_path):
    with pytest.raises(ResultsError, match="not a result set"):
        scan(str(tmp_path))


def test_a_file_is_no_result_set(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ResultsError, match="is a file"):
        scan(str(tmp_path / "x.parquet"))


def test_unknown_table(result_set, read):
    with pytest.raises(ResultsError, match="no table 'red'; choose reads, spectra"):
        scan(result_set([read()]), "red")


def test_newer_schema(result_set, read, tmp_path):
    location = result_set([read()])
    table = to_table("reads", [read()]).replace_schema_metadata({"schema_version": "2"})
    pq.write_table(table, tmp_path / "results" / "reads" / "new.parquet")
    with pytest.raises(ResultsError, match=r"newer deadbench \(schema 2, this one reads 1\): upgrade deadbench"):
        scan(location)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all", None])
def test_torn_file_is_named(result_set, read, tmp_path, content):
    location = result_set([read()])
    whole = (tmp_path / "results" / "reads" / "0000.parquet").read_bytes()
    (tmp_path / "results" / "reads" / "torn.parquet").write_bytes(whole[:-9] if content is None else content)
    with pytest.raises(ResultsError, match=r"reads/torn\.parquet cannot be read as parquet .*; move it away"):
        scan(location)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (pa.table({"model": ["x"]}), "not a deadbench result"),
        (pa.table({"depth": ["deep"]}).replace_schema_metadata({"schema_version": "1"}), "'depth' is string"),
    ],
)
def test_a_strangers_file_is_refused(result_set, read, tmp_path, table, complaint):
    location = result_set([read()])
    pq.write_table(table, tmp_path / "results" / "reads" / "theirs.parquet")
    with pytest.raises(ResultsError, match=complaint):
        scan(location)


def test_latest_takes_the_newest_ok_row_of_a_key(frame, read):
    rows = [
        read("a", depth=1.0, minute=0),
        read("a", depth=2.0, minute=1),
        read("a", status="failed", error="later failure", minute=2),
        read("b", status="failed", error="first", minute=0),
        read("b", status="failed", error="second", minute=1),
        read("c", status="failed", error="then ok", minute=0),
        read("c", depth=3.0, minute=1),
    ]
    kept = latest(frame(rows)).sort("model").collect()
    assert kept.select("model", "status", "depth", "error").rows() == [
        ("a", "ok", 2.0, None),
        ("b", "failed", None, "second"),
        ("c", "ok", 3.0, None),
    ]


def test_null_is_a_value_of_a_key(frame, read):
    rows = [
        read("a", "parameters", minute=0, num_zero_scales=1),
        read("a", "parameters", minute=1, num_zero_scales=2),
        read("a", "parameters", minute=0, num_zero_scales=3, revision="step1"),
    ]
    assert sorted(latest(frame(rows)).collect()["num_zero_scales"]) == [2, 3]


def test_nothing_infinite_comes_out(frame, read):
    kept = latest(frame([read(depth=float("inf"), alignment=float("nan"), lambda_v=1.0)])).collect()
    assert kept.select("depth", "alignment", "lambda_v").rows() == [(None, None, 1.0)]


@pytest.mark.parametrize("instant", [2**62, -(2**62), 253_402_300_800_000_000, -62_135_596_800_000_001])
def test_a_time_past_the_calendar_is_none(result_set, read, tmp_path, instant):
    location = result_set([read("odd"), read("m")])
    file = tmp_path / "results" / "reads" / "0000.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("finished_at")
    moved = pa.array([instant], pa.int64()).cast(table.schema.field(place).type)
    pq.write_table(table.set_column(place, table.schema.field(place), moved), file)
    known = dict(collected(scan(location).select("model", "finished_at")).rows())
    assert known["odd"] is None
    assert known["m"] is not None
    assert "2026-11-01" in provenance([location], scan(location))["dates"]
    assert series(scan(location).with_columns(depth=pl.lit(1.0)))[0].points


def test_a_file_of_more_rows_than_any_run_writes_is_refused_by_its_footer(result_set, read, monkeypatch):
    location = result_set([read("a")])
    store = ResultStore(location)
    monkeypatch.setattr("deadbench.suite.table_sizes.MAX_READS", 0)
    with pytest.raises(ResultsError, match=r"reads has 1 rows, 1 of them in 0000\.parquet, more than 0; no run"):
        scan(location)
    for opens in (lambda: ResultStore(location), store.finished, ResultReader(location).come):
        with pytest.raises(StoreError, match=r"reads has 1 rows, 1 of them in .*0000\.parquet, more than 0; no run"):
            opens()


def test_rows_of_all_files_count_and_a_file_that_comes_during_a_run_is_not_held(result_set, read, monkeypatch):
    location = result_set([read("a"), read("b")])
    store, path = ResultStore(location), Path(location) / "reads" / "0000.parquet"
    monkeypatch.setattr("deadbench.suite.table_sizes.MAX_READS", 3)
    assert store.come() == []
    shutil.copy(path, path.with_name("0002.parquet"))
    assert len(store.come()) == 1
    shutil.copy(path, path.with_name("0003.parquet"))
    monkeypatch.setattr(pq, "read_table", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(StoreError, match=r"reads has 4 rows, 1 of them in .*more than 3"):
        store.come()
    path.with_name("0003.parquet").unlink()
    assert store.come() == []


@pytest.mark.parametrize("hidden", [True, False])
def test_what_polars_says_of_its_panic_is_not_told_by_the_command_and_other_words_are(
    result_set, read, monkeypatch, capfd, hidden
):
    frame = scan(result_set([read()]))
    made = pl.collect_all
    monkeypatch.setattr(panics, "hidden", hidden)  # as the command line has it; a process of another's keeps its own

    def torn(frames, panic):
        os.write(2, b"words of another\n")
        if panic:
            raise pl.exceptions.PanicException("index out of bounds\nstack backtrace:")
        return made(frames)

    monkeypatch.setattr(pl, "collect_all", lambda frames: torn(frames, panic=False))
    assert collected(frame).height == 1
    assert capfd.readouterr().err == "words of another\n"
    monkeypatch.setattr(pl, "collect_all", lambda frames: torn(frames, panic=True))
    with pytest.raises(ResultsError, match=r"cannot be read to its end \(index out of bounds stack backtrace:\)"):
        collected(frame)
    assert capfd.readouterr().err == ("" if hidden else "words of another\n")


def test_the_stderr_of_a_process_of_anothers_stays_as_it_is(result_set, read, monkeypatch):
    with monkeypatch.context() as within:
        within.setattr(panics, "hidden", False)  # as it is where no command was given before
        within.setattr(os, "dup2", lambda *_: pytest.fail("a descriptor was taken"))
        assert leaderboard(scan(result_set([read()]))).height == 1


def test_the_command_line_alone_hides_panics(deadbench):
    deadbench("glossary", "--debug")
    assert not panics.hidden
    deadbench("glossary")
    assert panics.hidden
