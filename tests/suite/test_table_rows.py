"""Numbers that no read comes to are null, and lists of a row that disagree are refused, before anything is computed."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.analysis.results import ResultsError, collected, scan
from deadbench.suite.schema import TABLES, arrow_schema, to_table
from deadbench.suite.table_rows import _PARALLEL, LARGEST, check_parallel, with_known_numbers

NUMBERS = st.one_of(st.none(), st.floats(), st.sampled_from([LARGEST, -1.01 * LARGEST, 1e308, 5e-324, -0.0]))
LISTS = st.none() | st.lists(NUMBERS, max_size=4)


def known(value):
    if isinstance(value, list):
        return [known(each) for each in value]
    return value if value is not None and abs(value) <= LARGEST else None


@settings(derandomize=True, deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(NUMBERS, LISTS, st.none() | st.lists(LISTS, max_size=3)), max_size=5), data=st.data())
def test_what_is_left_is_finite_and_all_else_as_it_was(rows, data):
    reals = [pa.float64(), pa.list_(pa.float64()), pa.list_(pa.list_(pa.float64()))]
    columns = [pa.array([row[place] for row in rows], type) for place, type in enumerate(reals)]
    whole = pa.RecordBatch.from_arrays([*columns, pa.array(range(len(rows)), pa.int64())], ["a", "b", "c", "n"])
    part = whole.slice(data.draw(st.integers(0, len(rows))))
    found = with_known_numbers(part)
    found.validate(full=True)
    for name in whole.schema.names:
        assert repr(found[name].to_pylist()) == repr([known(value) for value in part[name].to_pylist()])


@pytest.mark.parametrize(("table", "names"), [(table, names) for table in _PARALLEL for names in _PARALLEL[table]])
def test_parallel_lists_of_two_lengths(table, names, tmp_path):
    nested = pa.types.is_list({column.name: column for column in TABLES[table]}[names[0]].type.value_type)
    two, one = ([[[1, 2], []], [[1, 2], [1]]]) if nested else ([1, 2], [1])
    good = [dict.fromkeys(names, two), {name: [] for name in names}, {names[0]: two, names[1]: None}]
    for rows in (good, [*good, dict.fromkeys(names, two) | {names[-1]: one}]):
        for name in ("reads", table):
            (tmp_path / name).mkdir(exist_ok=True)
        pq.write_table(to_table("reads", [{"status": "ok"}]), tmp_path / "reads" / "0.parquet")
        pq.write_table(to_table(table, rows), tmp_path / table / "0.parquet")
        asked = scan(str(tmp_path), table).select(names)
        if rows is good:
            assert len(collected(asked)) == 3
        else:
            with pytest.raises(ResultsError, match=rf"{table}/0\.parquet cannot .* and {names[-1]} of a row differ"):
                collected(asked)


def test_lists_alone_and_no_rows():
    check_parallel("norms", pa.RecordBatch.from_pydict({"zero_scales": [[1.0], [1.0, math.nan]]}))
    check_parallel("samples", pa.RecordBatch.from_pylist([], schema=arrow_schema("samples")))
