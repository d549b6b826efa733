"""Results of a stranger's, with bytes changed: a frame or one line, whatever they are."""

import json
import subprocess
import sys

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from deadbench.analysis import results
from deadbench.analysis.results import ResultsError, collected, scan
from deadbench.runners.results.reader import ResultReader, StoreError
from deadbench.suite import table_pages
from deadbench.suite.schema import KEY, arrow_schema, to_table
from tests.conftest import ROOT


@pytest.fixture
def spectra(tmp_path):
    """`spectra(eigenvalues, **how)`: a result set with one spectrum, as pyarrow writes it; its location and file."""

    def write(eigenvalues, **how):
        for name, columns in (("reads", {"status": "ok"}), ("spectra", {"eigenvalues": eigenvalues})):
            (tmp_path / name).mkdir()
            table = to_table(name, [columns | {"model": "m"}]).select(["model", *columns])
            pq.write_table(table, tmp_path / name / "0.parquet", use_dictionary=False, compression="none", **how)
        return str(tmp_path), tmp_path / "spectra" / "0.parquet"

    return write


def replace(file, old, new):
    """Put `new` in the place of the first `old` that there is in a file."""
    raw = file.read_bytes()
    assert len(old) == len(new)
    assert old in raw
    file.write_bytes(raw.replace(old, new, 1))


@pytest.mark.slow
@pytest.mark.subprocess
def test_two_hundred_files_with_bytes_changed_are_a_frame_or_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "tests.analysis.hostile_results", "200"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    opened = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(opened) == 200
    whole, changed = opened[:7], opened[7:]
    assert {line for _, _, *said in whole for line in said} == {""}
    lines = [line for _, _, *said in changed for line in said if line]
    assert len(lines) > 130, "most are seen to be changed"
    assert all(line.isprintable() and len(line) < 300 and "1.parquet" in line for line in lines)
    assert any("cannot be read to its end" in line for line in lines), "and some while they are decoded"


def test_statistics_that_do_not_fit_their_column(spectra):
    """Arrow ends the process that asks for the metadata of such a column."""
    location, file = spectra([1.0])
    counts = b"\x29\x26\x02\x00\x19"  # how many values are at each of two levels of repetition: 1 and 0
    replace(file, counts, b"\x29\x16\x82\x00\x19")  # as long, and of one level
    with pytest.raises(
        ResultsError, match=r"spectra/0\.parquet cannot be read to its end \(Repetition level histogram"
    ):
        collected(scan(location, "spectra"))


def test_a_page_of_more_values_than_the_footer_has(spectra):
    """It would be read to its end, be it of two thousand million values in twenty bytes."""
    location, file = spectra([1.0] * 30)
    replace(file, b"\x2c\x15\x3c\x15", b"\x2c\x15\x3e\x15")  # 31 in the data page's header
    with pytest.raises(ResultsError, match=r"the pages of eigenvalues\.list\.element are not what the footer says"):
        scan(location, "spectra")


def test_a_page_in_another_encoding_than_the_footer_has(tmp_path, spectra):
    """Of a text that is what it adds to the one before, kilobytes are gigabytes."""
    location, _ = spectra([1.0])
    replace(tmp_path / "reads" / "0.parquet", b"\x2c\x15\x02\x15\x00", b"\x2c\x15\x02\x15\x0e")
    with pytest.raises(ResultsError, match=r"a page of model is not what the footer says, or too large"):
        scan(location)
    with pytest.raises(StoreError, match=r"reads/0\.parquet cannot be read as parquet; move it away"):
        ResultReader(location).finished()


def test_a_page_that_is_unpacked_to_more_than_any_writer_gives(spectra, monkeypatch):
    location, _ = spectra([1.0] * 1000)
    monkeypatch.setattr(table_pages, "MAX_PAGE_BYTES", 7999)
    with pytest.raises(ResultsError, match=r"a page of eigenvalues.* or too large"):
        scan(location, "spectra")


def test_a_text_that_is_no_unicode(spectra, tmp_path):
    location, _ = spectra([1.0])
    replace(tmp_path / "reads" / "0.parquet", b"\x01\x00\x00\x00m", b"\x01\x00\x00\x00\xff")
    with pytest.raises(ResultsError, match=r"reads/0\.parquet cannot be read to its end \(.*UTF8"):
        collected(scan(location).select("model"))


def test_a_version_that_is_no_number(spectra, tmp_path):
    location, _ = spectra([1.0])
    for version in ("9" * 5000, "²", b"\xff"):
        table = pa.table({"model": ["m"]}).replace_schema_metadata({"schema_version": version})
        pq.write_table(table, tmp_path / "reads" / "0.parquet")
        with pytest.raises(ResultsError, match="is not a deadbench result"):
            scan(location)


def test_names_of_a_hundred_thousand_letters_are_cut_and_stay_different(result_set, read):
    """Each table and each plot goes through all of a name, and a page has a dozen of them."""
    long = ["a" * 100_000, "a" * 99_999 + "b", "\x1b\u202e" * 50_000, "é" * 8192]
    found = collected(scan(result_set([read(name) for name in long])))["model"].to_list()
    assert found[3] == long[3], "as long as it may be"
    assert len(set(found)) == 4
    assert [(cut[:4096], cut[4096:].partition(" letters, ")[0]) for cut in found[:3]] == [
        (name[:4096], "… (100,000") for name in long[:3]
    ]


def test_a_text_is_cut_or_not_whatever_stands_beside_it(result_set, read):
    location = result_set([read("c" * 8193), read("m")])
    assert collected(scan(location))["model"].to_list()[0].startswith("c" * 4096 + "… (8,193 letters, ")


@pytest.mark.parametrize("kept", [2**26, 0])
def test_what_polars_asks_for_is_what_it_gets(result_set, read, tmp_path, monkeypatch, kept):
    """The same rows in the same order, whether a table is decoded once or anew; of a large one only what is wanted."""
    location = result_set([read(f"m{n}", minute=n, depth=n / 2, flags=["a"] * n) for n in range(7)])
    pq.write_table(to_table("reads", [read("old")]).drop_columns(["depth"]), tmp_path / "results/reads/0003x.parquet")
    monkeypatch.setattr(results, "_KEPT_BYTES", kept)
    monkeypatch.setattr(results, "BATCH_ROWS", 3)
    decoded, batches_of = [], results.batches_of
    monkeypatch.setattr(
        results,
        "batches_of",
        lambda source, schema, rows: decoded.append(schema.names) or batches_of(source, schema, rows),
    )
    names = ["m0", "m1", "m2", "m3", "old", "m4", "m5", "m6"]
    whole = collected(scan(location))
    assert whole.schema == pl.DataFrame(pl.from_arrow(arrow_schema("reads").empty_table())).schema
    assert whole["model"].to_list() == names
    assert whole["depth"].to_list() == [0.0, 0.5, 1.0, 1.5, None, 2.0, 2.5, 3.0]
    decoded.clear()
    reads = scan(location)
    found = collected(reads.filter(pl.col("depth") > 1).select("flags", "model"))
    assert_frame_equal(found, whole.filter(pl.col("depth") > 1).select("flags", "model"))
    assert set(map(len, decoded)) == ({3} if not kept else {len(whole.columns)})
    assert collected(reads.head(5).select("model"))["model"].to_list() == names[:5]
    assert collected(reads.select(pl.len())).item() == 8
    assert collected(reads.tail(1))["model"].item() == "m6"
    assert len(decoded) == (8 if kept else len(decoded))


def test_a_read_of_no_model_is_refused(result_set, read, deadbench):
    """No check of a gate would judge it, and no command could name it."""
    location, other = result_set([read(None), read("b")]), result_set([read("b"), read("d")], name="other")
    for command in (
        ["trend", location, "--model", "b"],
        ["dead", location, "--model", "b"],
        ["reproduce", location, "b"],
        ["leaderboard", location],
        ["compare", other, location, "--gate", ROOT / "examples" / "gate.yaml"],
    ):
        code, out, err = deadbench(*command)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "reads/0000.parquet cannot be read to its end (a row has no model); move it away" in err


def test_numbers_beyond_any_are_no_trend(result_set, read, deadbench):
    rows = [read(revision=f"step{n}", checkpoint_step=n, minute=n, depth=(-1) ** n * 1e308) for n in range(9)]
    code, _, err = deadbench("trend", result_set(rows), "--model", "m", "--metric", "depth")
    assert code == 0
    assert "overflow" not in err


def test_sums_of_sequences_of_two_lengths(result_set, read, deadbench, tmp_path):
    location = result_set([read(lambda_v=1.0)])
    sums = {"num_tokens": [4] * 9, "sum_along": [0.5] * 8, "squares_along": [1.0] * 9, "squares_total": [2.0] * 9}
    (tmp_path / "results" / "samples").mkdir()
    key = {name: read().get(name) for name in ("run_id", *KEY)}
    table = to_table("samples", [key | sums | {"total_variance": 3.0}])
    pq.write_table(table, tmp_path / "results" / "samples" / "0.parquet")
    code, _, err = deadbench("compare", location, location)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "num_tokens and sum_along of a row differ in length" in err
