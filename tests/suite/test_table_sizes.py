"""What a file of results comes to is known before it is read: never less than it is, never gigabytes to find it."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.analysis import results
from deadbench.analysis.results import ResultsError, collected, scan
from deadbench.runners.results.store import ResultStore, StoreError
from deadbench.suite import table_sizes
from deadbench.suite.schema import TABLES, arrow_schema, to_table
from deadbench.suite.table_pages import PagesError, groups_of
from deadbench.suite.table_sizes import FileSize, size_of, too_large


def repeated(value, count, kind=None):
    """A column of one value, stored once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value], kind))


def lists(values, of):
    return pa.ListArray.from_arrays(pa.array(np.arange(len(values) // of + 1, dtype=np.int32) * of), values)


def written(columns, target=None, **how):
    """A file of these columns as parquet has them, without what Arrow would say beside."""
    target = io.BytesIO() if target is None else target
    with pq.ParquetWriter(target, pa.table(columns).schema, compression="zstd", store_schema=False, **how) as file:
        file.write_table(pa.table(columns))
        file.add_key_value_metadata({"schema_version": "1"})
    return target


def size(file):
    return size_of(file, "spectra")


def saved(folder, table="reads", **columns):
    """A result set of one file with these columns, the others null."""
    count = len(next(iter(columns.values())))
    known = {field.name: pa.nulls(count, field.type) for field in arrow_schema(table)}
    (folder / table).mkdir(parents=True, exist_ok=True)
    written(known | columns, folder / table / "0.parquet")
    return str(folder)


@pytest.mark.parametrize(
    "column",
    [
        repeated("x" * 1_000_000, 100_000),
        lists(repeated("x" * 1_000_000, 100_000), 20),
        lists(lists(repeated("x" * 1_000_000, 100_000), 20), 5),
        repeated(b"x" * 1_000_000, 100_000),
    ],
    ids=["text", "lists of it", "lists of lists", "bytes"],
)
def test_one_long_string_in_many_cells(column):
    file = written({"error": column})
    assert len(file.getvalue()) < 10_000
    before = pa.total_allocated_bytes()
    found = size(file)
    assert found.values > table_sizes.MAX_BYTES
    assert found.stored == len(file.getvalue())
    assert pa.total_allocated_bytes() - before < 50_000_000
    assert "no run writes that: move it away" in too_large("reads", {"0.parquet": found})


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_other_ways_to_store_it(encoding):
    file = written({"error": ["x" * 10_000] * 300}, use_dictionary=False, column_encoding={"error": encoding})
    assert size(file).values >= 3_000_000


def test_numbers_that_are_all_alike(monkeypatch):
    file = written({"eigenvalues": lists(pa.array(np.zeros(1_000_000)), 1000)})
    assert size(file) == FileSize(1000, len(file.getvalue()), 8_000_000)
    monkeypatch.setattr(table_sizes, "_LITTLE", 2**20)
    assert "stand for more than" in too_large("spectra", {"0.parquet": size(file)})


TEXTS = st.lists(st.none() | st.text("ab", max_size=5) | st.just("long" * 100), min_size=1, max_size=60)


@given(st.lists(TEXTS, min_size=1, max_size=3), st.booleans(), st.booleans(), st.integers(1, 40))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_what_is_counted_is_what_is_there(columns, dictionary, nested, rows):
    count = min(map(len, columns))
    made = {str(place): pa.array(column[:count], pa.string()) for place, column in enumerate(columns)}
    if nested:
        made = {name: pa.array([each.to_pylist()] * count, pa.list_(pa.string())) for name, each in made.items()}
    file = written(made, use_dictionary=dictionary)
    letters = sum(len(text or "") for column in made.values() for each in column.to_pylist()
                  for text in (each if nested else [each]))  # fmt: skip
    assert letters <= size(file).values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_sizes, "_EXPANSION", 0)  # count all
        patch.setattr(table_sizes, "_BATCH_ROWS", rows)
        certain = table_sizes._of_groups(groups_of(file))[0]
        counted = (size(file).values - certain) / table_sizes._COPIES
        assert counted == letters if dictionary else counted >= letters  # a page that is plain has what it has


def test_a_files_rows_are_those_of_its_groups(tmp_path):
    """The number that stands for the whole file is nobody's to go by."""
    raw = written({"seed": pa.array(np.zeros(100_000, np.int64))}).getvalue()
    whole, less = b"\xc0\x9a\x0c", b"\xa0\x9c\x01"  # 100 000 and 10 000, as thrift has them
    footer = raw[-8 - int.from_bytes(raw[-8:-4], "little") : -8]
    lying = io.BytesIO(raw.replace(footer, footer.replace(whole, less, 1)))
    assert pq.read_metadata(lying).num_rows == 10_000
    assert size(lying).rows == pq.read_table(lying).num_rows == 100_000
    last = footer.rpartition(whole)  # the rows of the group, and a column's values stay
    torn = io.BytesIO(raw.replace(footer, less.join((last[0], last[2]))))
    with pytest.raises(PagesError, match="100000 values of seed in 10000 rows"):
        size(torn)


def test_every_reader_of_results_refuses_it(tmp_path):
    place = saved(tmp_path / "bomb", model=repeated("x" * 1_000_000, 5000), status=repeated("ok", 5000))
    with pytest.raises(ResultsError, match=r"bomb: reads has [\d,]+ bytes that stand for more than 67,108,864, most "):
        scan(place)
    with pytest.raises(StoreError, match=r"bomb: reads has .* in .*0.parquet; no run writes that: move it away"):
        ResultStore(place).finished()
    good = to_table("reads", [{"model": "m", "status": "ok"}])
    (tmp_path / "good").mkdir()
    ResultStore(str(tmp_path / "good")).write({"reads": good})
    assert collected(scan(str(tmp_path / "good")))["model"].to_list() == ["m"]


def test_many_files_of_little_are_much_together():
    one = FileSize(10, 30_000, 10**6)
    assert too_large("reads", {str(n): one for n in range(1000)}) is None
    large = {str(n): one for n in range(1100)}
    assert too_large("spectra", large) is None
    few = {str(n): one._replace(stored=10) for n in range(100)}
    for table in TABLES:
        assert f"{table} has 1,000 bytes that stand for more than 67,108,864, most" in str(too_large(table, few))
        assert too_large(table, dict(list(few.items())[:60])) is None
    assert "reads has 33,000,000 bytes that stand for more than 1,073,741,824, most" in str(too_large("reads", large))
    assert too_large("reads", {}) is None
    assert "more than 500,000; no run writes so many" in too_large("reads", {"a": FileSize(500_001)})


def test_a_hundred_thousand_reads_in_files_of_a_hundred_are_no_more_than_they_are():
    """The footers of so small files tell of each row all texts of its file, tenfold what it has."""
    file = str(Path(results.__file__).parents[1] / "suite" / "data" / "reference" / "reads" / "reference.parquet")
    found = size_of(file, "reads")
    rows = pq.read_table(file)
    assert rows.nbytes <= found.values <= 4 * rows.nbytes
    assert too_large("reads", {str(n): found for n in range(100_000 // found.rows + 1)}) is None


def test_a_column_whose_name_is_no_text_is_one_line(tmp_path):
    place = saved(tmp_path, model=pa.array(["model"] * 3), status=pa.array(["ok"] * 3))
    file = tmp_path / "reads" / "0.parquet"
    file.write_bytes(file.read_bytes().replace(b"revision", b"\xff" * 8))
    with pytest.raises(ResultsError, match="0.parquet cannot be read as parquet"):
        scan(place)
    with pytest.raises(StoreError, match="0.parquet cannot be read as parquet"):
        ResultStore(place).finished()


def test_a_large_file_among_many_small_ones_comes_in_frames_of_its_own(tmp_path, monkeypatch):
    """How many rows are a frame is its file's, whatever the mean of the table's."""
    monkeypatch.setattr(results, "_KEPT_BYTES", 0)
    monkeypatch.setattr(results, "_FRAME_BYTES", 100_000)
    monkeypatch.setattr(results, "_with_short_texts", lambda batch: sizes.append(batch.nbytes) or batch)
    sizes = []
    (tmp_path / "reads").mkdir()
    for number, (count, text) in enumerate([(3000, "x"), (200, "y" * 8000), (3000, "z")]):
        known = {field.name: pa.nulls(count, field.type) for field in arrow_schema("reads")}
        written(known | {"error": pa.array([text] * count)}, tmp_path / "reads" / f"{number}.parquet")
    found = collected(scan(str(tmp_path)).select("error"))["error"]
    assert found.to_list() == ["x"] * 3000 + ["y" * 8000] * 200 + ["z"] * 3000
    assert max(sizes) <= 200_000


@pytest.mark.parametrize("long", [False, True])
def test_lists_of_texts_in_several_groups_of_rows_are_counted_or_bounded(long):
    """Arrow decodes no lists of a dictionary that changes: within a group it does where texts are too many for one."""
    texts = [[f"{number:08d}" * 60] for number in range(4000)] if long else [[f"text {n % 7}"] for n in range(4000)]
    table = pa.table({"read": pa.array(["a"] * 4000), "flags": pa.array(texts)})
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", row_group_size=4000 if long else 900, data_page_size=2000)
    size = size_of(file, "reads")
    letters = sum(len(text) for (text,) in texts)
    assert size.rows == 4000
    assert size.values >= (letters if long else 2 * 7 * 6)
