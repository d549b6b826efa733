"""Directions that reads share, against a row for each pair; and thousands of reads that share one."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.analysis import shared_directions
from deadbench.analysis.results import ResultsError
from deadbench.analysis.shared_directions import PLACE, SERIES, shared

READ = st.fixed_dictionaries({
    "model": st.sampled_from(["a", "b", None]), "read": st.sampled_from(["random", "trained"]),
    "run": st.sampled_from(["x", "y", "z", None]), "seed": st.sampled_from([0, 1, None]),
    "protocol": st.sampled_from(["p", None]), "dtype": st.just("f"), "is_last": st.booleans(),
    "checkpoint_step": st.sampled_from([1, 2, None]), "revision": st.sampled_from(["r", "s", None]),
})  # fmt: skip
PIECE = st.tuples(st.integers(0, 3), st.sampled_from([0.05, 0.3, 0.6, 1.0]))
PIECES = st.lists(PIECE, min_size=1, max_size=3)
DIRECTION = st.tuples(st.integers(0, 9), st.sampled_from(["o", "z"]), st.sampled_from(["s", "t", None]), PIECES)
READS, DIRECTIONS = st.lists(READ, min_size=1, max_size=10), st.lists(DIRECTION, min_size=1, max_size=14)
TYPES = {"read_id": pl.UInt32, "seed": pl.Int64, "checkpoint_step": pl.Int64} | dict.fromkeys(
    ["model", "run", "read", "protocol", "dtype", "revision"], pl.String
)


def frames(reads, directions):
    ok = pl.DataFrame([{"read_id": place, **read} for place, read in enumerate(reads)], schema_overrides=TYPES)
    own = [
        {"direction": place, "read_id": read % len(reads), "architecture": "A", "kind": kind, "site": site,
         "coordinates": [c for c, _ in pieces], "weights": [w for _, w in pieces]}
        for place, (read, kind, site, pieces) in enumerate(directions)
    ]  # fmt: skip
    found = pl.DataFrame(own, schema_overrides={"read_id": pl.UInt32, "site": pl.String})
    return found.join(ok.select("read_id", "run", *SERIES), on="read_id", maintain_order="left"), ok


def by_pairs(found, ok):
    """The same, read by read."""
    rows = []
    for mine in found.iter_rows(named=True):
        there = {}
        for other in found.iter_rows(named=True):
            if None not in (mine["site"], other["site"]) and all(mine[name] == other[name] for name in PLACE):
                there.setdefault(other["read_id"], set()).update(other["coordinates"])
        pieces = list(zip(mine["coordinates"], mine["weights"], strict=True))
        have = [
            ok.row(read, named=True) for read, set_ in sorted(there.items())
            if sum(w for c, w in pieces if c in set_) >= 0.9 * sum(mine["weights"])
        ]  # fmt: skip
        if have:
            same = [read for read in have if all(read[name] == mine[name] for name in SERIES)]
            runs = {each["run"] for each in have if each["read"] == mine["read"] and each["is_last"]}
            rows.append({
                "direction": mine["direction"], "opened_step": same[0]["checkpoint_step"],
                "opened_revision": same[0]["revision"], "in_checkpoints": len(same),
                "in_runs": len(runs - {mine["run"], None}) if mine["run"] else 0,
                "in_random": mine["model"] is not None
                and any(each["read"] == "random" and each["model"] == mine["model"] for each in have),
            })  # fmt: skip
    return rows


@given(
    st.lists(READ, min_size=1, max_size=10),
    st.lists(DIRECTION, min_size=1, max_size=14),
    st.sampled_from([1, 30, 10**6]),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_it_is_what_each_pair_would_say(reads, directions, pairs):
    found, ok = frames(reads, directions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_directions, "_PAIRS", pairs)
        assert shared(found, ok).sort("direction").to_dicts() == by_pairs(found, ok)


def test_reads_that_all_share_one_direction_are_no_pairs(monkeypatch):
    """A file of kilobytes held so many that pairs of them were gigabytes."""
    read = {"model": None, "read": "trained", "seed": 0, "protocol": "p", "dtype": "f", "is_last": True,
            "checkpoint_step": 1, "revision": "r"}  # fmt: skip
    count = 3000
    reads = [read | {"model": str(n), "run": str(n)} for n in range(count)]
    found, ok = frames(reads, [(n, "z", "s", [(5, 1.0)]) for n in range(count)])
    joined = []
    of_polars = pl.DataFrame.join
    monkeypatch.setattr(pl.DataFrame, "join", lambda *a, **k: joined.append(of_polars(*a, **k)) or joined[-1])
    assert shared(found, ok)["in_runs"].to_list() == [count - 1] * count
    assert max(map(len, joined)) == count


def test_pairs_are_counted_and_too_many_refused(monkeypatch):
    """Of many places a direction meets the reads of its own; where each meets each there is an end to them."""
    read = {"model": "m", "run": "m", "read": "trained", "seed": 0, "protocol": "p", "dtype": "f", "is_last": True,
            "checkpoint_step": 1, "revision": "r"}  # fmt: skip
    count = 40
    monkeypatch.setattr(shared_directions, "_MOST_PAIRS", count)
    apart, ok = frames([read], [(0, "z", f"site {n}", [(5, 1.0)]) for n in range(count)])
    assert shared(apart, ok)["in_checkpoints"].to_list() == [1] * count
    together, ok = frames([read] * count, [(n, "z", "s", [(5, 0.5), (n + 9, 0.5)]) for n in range(count)])
    with pytest.raises(ResultsError, match=r"^40 different dead directions in 1,640 pairs"):
        shared(together, ok)
