"""The rows of small reads are those that were stored, to the last bit where this machine computes as that one did.

`tests/data/rows` holds them, and what the machine was that wrote them. After a change that is meant to move numbers:

    UPDATE_ROWS=1 python -m pytest tests/test_same_rows.py
"""

import json
import math
import os

import pytest

from deadbench.suite.schema import TABLES
from tests import same_rows
from tests.conftest import ROOT

REFERENCE = ROOT / "tests" / "data" / "rows"
UNITS = {(table, column.name): column.unit for table, columns in TABLES.items() for column in columns}

# On another machine: what rounding decides is compared in decades, or not at all.
DECADES, RELATIVE = 0.3, 1e-3
WITHIN = {"precision_slope": 0.1, "alignment": 0.05}
NOTHING = {"kl": 1e-28, "fisher": 1e-28, "output_change": 1e-14}  # where nothing moved, in float64
ROUNDING = 1e-8  # in the largest eigenvalue: smaller ones are what float32 leaves of a dead direction
OF_ROUNDING = ("lambda_v", "kl", "output_change", "floor", "sigma_min", "ratio", "worst_block_ratio")
UNTOLD = (
    "device", "worst_block", "bottom_coordinates", "bottom_weights", "bottom_direction", "participation",
    "dead_coordinates", "dead_weights", "containment", "depth_bottom", "lambda_control", "lambda_min", "lambda_second",
)  # fmt: skip


CASES = ["twin-layernorm", *(pytest.param(c, marks=pytest.mark.slow) for c in same_rows.CASES if c != "twin-layernorm")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory, minilm):
    """The rows of a case; read once for both comparisons."""
    found = {}

    def read(case):
        if case not in found:
            found[case] = same_rows.rows_of(case, tmp_path_factory.mktemp(case), minilm)
        return found[case]

    return read


@pytest.fixture(scope="module")
def other_machine():
    """What this machine does not share with the one that wrote the reference."""
    here, there = same_rows.machine(), json.loads((REFERENCE / "machine.json").read_text("utf-8"))
    return [f"{name}: {here.get(name)} here, {there[name]} there" for name in there if here.get(name) != there[name]]


def reference(case):
    return json.loads((REFERENCE / f"{case}.json").read_text("utf-8"))


@pytest.fixture(scope="module", autouse=bool(os.environ.get("UPDATE_ROWS")))
def written(rows):
    """The reference, written anew."""
    REFERENCE.mkdir(exist_ok=True)
    documents = {case: rows(case) for case in same_rows.CASES} | {"machine": same_rows.machine()}
    for name, document in documents.items():
        text = json.dumps(document, indent=None, separators=(",", ":"), sort_keys=True)
        (REFERENCE / f"{name}.json").write_text(text.replace('],"', '],\n"') + "\n", "utf-8")


@pytest.mark.parametrize("case", CASES)
def test_to_the_last_bit(case, rows, other_machine):
    if other_machine:
        pytest.skip("; ".join(other_machine))
    found, expected = rows(case), reference(case)
    assert {name: sorted(table) for name, table in found.items()} == {n: sorted(t) for n, t in expected.items()}
    moved = [
        f"{table}.{column}: {there} before, {here} now"
        for table, columns in expected.items()
        for column, stored in columns.items()
        for here, there in _different(found[table][column], stored)
    ]
    assert not moved, "\n".join(moved[:20])


def _different(found, stored):
    here, there = ([json.dumps(each, sort_keys=True) for each in values] for values in (found, stored))
    assert len(here) == len(there)
    return [pair for pair in zip(here, there, strict=True) if pair[0] != pair[1]]


@pytest.mark.parametrize("case", CASES)
def test_within_tolerances_on_any_machine(case, rows):
    found, expected = rows(case), reference(case)
    apart = [
        f"{table}.{column}, row {number}: {there} before, {here} now"
        for table, columns in expected.items()
        for column, stored in columns.items()
        if column not in UNTOLD
        for number, (here, there) in enumerate(zip(found[table][column], stored, strict=True))
        if not _close(table, column, here, there, _floor(table, expected, number))
    ]
    assert not apart, "\n".join(apart[:20])


def _floor(table, expected, number):
    """Below this an eigenvalue is what the accumulator makes of it: the read's own floor."""
    if table != "spectra":
        return 0.0
    key = ("revision", "read")
    of_row = tuple(expected[table][name][number] for name in key)
    reads = zip(*(expected["reads"][name] for name in (*key, "spectrum_floor")), strict=True)
    return next(floor for *which, floor in reads if tuple(which) == of_row)


def _close(table, column, here, there, floor):
    if isinstance(there, dict):  # a long list: its length and its ends
        here, there = ([*each["first"], *each["last"], each["length"]] for each in (here, there))
    if isinstance(there, list):
        if column == "eigenvalues":
            floor = max(floor, ROUNDING * there[0])
        return len(here) == len(there) and all(
            _close(table, column, a, b, floor) for a, b in zip(here, there, strict=True)
        )
    if not isinstance(there, float) or not isinstance(here, float):
        return here == there and type(here) is type(there)
    if UNITS[table, column] == "decades":
        return abs(here - there) <= DECADES
    if column in WITHIN:
        return abs(here - there) <= WITHIN[column]
    if max(abs(here), abs(there)) <= NOTHING.get(column, floor):
        return True
    if column in OF_ROUNDING:
        return here == there or (here > 0 and there > 0 and abs(math.log10(here / there)) <= DECADES)
    return abs(here - there) <= RELATIVE * abs(there)
