"""What holds of every comparison, gate, series and leaderboard, whatever is in it."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from deadbench.analysis.compare import METRICS, compare
from deadbench.analysis.gate import Gate, broken, judge
from deadbench.analysis.leaderboard import GROUP, leaderboard
from deadbench.analysis.results import ResultsError
from deadbench.analysis.trend import change_point, first_failing
from deadbench.suite.schema import to_table
from tests.analysis.conftest import _read

quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
unhurried = settings(deadline=None)
SWAPPED = {metric: scale for metric, scale in METRICS.items() if scale != "relative"}  # of either side's magnitude
DECADES = st.floats(0, 20, allow_subnormal=False)
VALUES = {
    "depth": DECADES, "depth_exact": DECADES, "lambda_v": st.floats(1e-15, 1.0), "alignment": st.floats(0, 1),
    "num_learned": st.integers(0, 9), "num_dead_1e6": st.integers(0, 9), "kernel_exact": st.booleans(),
    "blocks_preserved": st.booleans(), "worst_block_ratio": st.floats(0.1, 2),
}  # fmt: skip
MEASURED = st.fixed_dictionaries({name: st.none() | values for name, values in VALUES.items()})
SIDES = st.lists(st.tuples(MEASURED, MEASURED), min_size=2, max_size=6)


def frame(rows):
    return pl.DataFrame(pl.from_arrow(to_table("reads", rows))).lazy()


def both(sides, **columns):
    """Baseline and candidate of the same models, by as many tokens."""
    return [
        frame([_read(f"m{n}", num_tokens=4000, **columns, **pair[side]) for n, pair in enumerate(sides)])
        for side in (0, 1)
    ]


def by_pair(table):
    return {(row["model"], row["metric"]): row for row in table.to_dicts()}


@quick
@given(SIDES)
def test_to_swap_the_sides_of_a_comparison_is_to_negate_every_change(sides):
    baseline, candidate = both(sides)
    there, back = by_pair(compare(baseline, candidate, SWAPPED)), by_pair(compare(candidate, baseline, SWAPPED))
    for (model, metric), row in there.items():
        values = [pair[metric] for pair in sides[int(model[1:])]]
        if row["candidate"] is None:
            assert (row["verdict"], row["change"]) == ("lost", None)
            assert (model, metric) not in back, "what the other side's baseline has not is no row of it"
            continue
        other = back[model, metric]
        assert (row["baseline"], row["candidate"]) == (other["candidate"], other["baseline"])
        assert row["change"] == pytest.approx(-other["change"], abs=1e-12)
        assert row["verdict"] == other["verdict"], values
        assert row["noise"] == other["noise"]
    known = [(f"m{n}", m) for n, pair in enumerate(sides) for m in SWAPPED if pair[0].get(m) is not None]
    assert set(there) == set(known)


@quick
@given(SIDES, st.data())
def test_a_relative_change_changes_its_sign_with_the_sides(sides, data):
    metric = data.draw(st.sampled_from(["depth_exact", "lambda_v", "worst_block_ratio"]))
    baseline, candidate = both(sides)
    there, back = (
        by_pair(compare(*each, {metric: "relative"})) for each in ((baseline, candidate), (candidate, baseline))
    )
    for pair in there.keys() & back.keys():
        before, after = there[pair]["baseline"], there[pair]["candidate"]
        changes = there[pair]["change"], back[pair]["change"]
        if before and after and all(map(math.isfinite, changes)):  # of numbers that are next to none it is not
            assert changes[0] * before == pytest.approx(-changes[1] * after, abs=1e-12)


@quick
@given(SIDES, st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)))
def test_a_read_is_missing_from_one_side_alone(sides, of_baseline, of_candidate):
    """With a second read of each model, so that names always tell which is which."""
    names = [f"m{n}" for n in range(len(sides))]
    left = [name for n, name in enumerate(names) if n not in of_baseline]
    right = [name for n, name in enumerate(names) if n not in of_candidate]
    every = [_read(name, "random", depth=1.0) for name in names]
    baseline, candidate = (frame(every + [_read(name, depth=1.0) for name in side]) for side in (left, right))
    for here, there, table in ((left, right, (baseline, candidate)), (right, left, (candidate, baseline))):
        found = compare(*table, {"depth": "decades"}).filter(pl.col("verdict").cast(pl.String) == "missing")
        assert found["model"].to_list() == sorted(set(here) - set(there))
        assert set(found["read"].cast(pl.String)) <= {"trained"}


BOUNDS = st.lists(st.floats(0, 30), min_size=2, max_size=2).map(sorted)


def breaks(comparison, gate):
    found = broken(judge(comparison, gate))
    return set(found.select("model", "read", "metric", "verdict").rows())


@quick
@given(SIDES, st.sampled_from(["absolute", "relative", "decades"]), BOUNDS, st.data())
def test_a_wider_bound_never_breaks_more(sides, kind, bounds, data):
    metric = data.draw(st.sampled_from(["depth", "lambda_v", "worst_block_ratio"]))
    worse = data.draw(st.sampled_from(["lower", "higher", "changed"]))
    noise = data.draw(st.sampled_from([0.0, 2.0]))
    always = {"num_tokens": {"worse": "changed"}}  # a gate must judge something
    narrow, wide = (
        Gate.model_validate({"noise": noise, "metrics": always | {metric: {"worse": worse, kind: bound}}})
        for bound in bounds
    )
    comparison = compare(*both(sides), narrow.scales())
    assert breaks(comparison, wide) <= breaks(comparison, narrow)


@quick
@given(SIDES, BOUNDS, st.floats(0, 0.01))
def test_more_noise_borne_never_breaks_more(sides, noises, bound):
    metrics = {"depth": {"worse": "changed", "decades": bound}, "num_tokens": {"worse": "changed"}}
    narrow, wide = (Gate.model_validate({"noise": noise, "metrics": metrics}) for noise in noises)
    comparison = compare(*both(sides, depth_standard_error=0.3), narrow.scales())
    assert breaks(comparison, wide) <= breaks(comparison, narrow)


@quick
@given(SIDES, st.sampled_from(["lower", "higher"]))
def test_what_breaks_either_way_breaks_where_any_change_does(sides, worse):
    always = {"num_tokens": {"worse": "changed"}}
    one, any_way = (
        Gate.model_validate({"metrics": always | {"depth": {"worse": way, "decades": 0.1}}})
        for way in (worse, "changed")
    )
    comparison = compare(*both(sides), one.scales())
    assert breaks(comparison, one) <= breaks(comparison, any_way)


SEEDS, LENGTHS = st.integers(0, 10**6), st.integers(4, 60)


def noisy(seed, length, step=0.0, place=0):
    values_T = np.random.default_rng(seed).normal(size=length)
    values_T[place:] += step
    return values_T


@unhurried
@given(SEEDS, LENGTHS, st.floats(-12, 12), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.data())
def test_a_change_point_does_not_move_with_origin_and_unit(seed, length, step, shift, unit, data):
    values_T = noisy(seed, length, step, data.draw(st.integers(1, length - 1)))
    assert change_point(values_T * unit + shift) == change_point(values_T)
    assert change_point(-values_T) == change_point(values_T)


@unhurried
@given(SEEDS, st.integers(8, 60), st.sampled_from([-14.0, 14.0]), st.data())
def test_a_planted_step_is_found_where_it_is(seed, length, step, data):
    place = data.draw(st.integers(1, length - 1))
    assert change_point(noisy(seed, length, step, place)) == place


@unhurried
@given(st.integers(0, 300), st.integers(0, 300))
def test_bisection_finds_what_a_search_from_the_front_does(passing, failing):
    """The first is the baseline, and taken to pass."""
    series = [f"step{number}" for number in range(1 + passing + failing)]
    bad = set(series[1 + passing :])
    expected = next((each for each in series[1:] if each in bad), None)
    assert first_failing(series, bad.__contains__) == expected


LINES = st.lists(
    st.tuples(
        st.sampled_from("abcde"), st.sampled_from(["random", "trained", "parameters"]), st.integers(0, 2),
        st.sampled_from(["standard", "quick"]), st.none() | st.sampled_from([1.0, 2.0, 13.5]),
        st.sampled_from(["ok", "ok", "failed"]),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@quick
@given(LINES, st.randoms(use_true_random=False), st.sampled_from(["depth", "model", "num_parameters"]))
def test_the_leaderboard_does_not_depend_on_the_order_of_the_rows(lines, random, sort):
    rows = [
        _read(model, read, minute=minute, seed=seed, protocol=protocol, status=status)
        | ({"error": "no memory"} if status == "failed" else {"depth": depth, "num_parameters": 10 + seed})
        for minute, (model, read, seed, protocol, depth, status) in enumerate(lines)
    ]
    shuffled = random.sample(rows, len(rows))
    try:
        expected = leaderboard(frame(rows), sort=sort)
    except ResultsError:
        with pytest.raises(ResultsError):
            leaderboard(frame(shuffled), sort=sort)
        return
    assert_frame_equal(leaderboard(frame(shuffled), sort=sort), expected, check_exact=False, abs_tol=1e-12)
    for _, group in expected.filter(pl.col("rank").is_not_null()).group_by(GROUP):
        ranks = sorted(group["rank"].to_list())
        assert all(rank == 1 + sum(each < rank for each in ranks) for rank in ranks)
        assert sort == "model" or group["rank"].to_list() == ranks


def test_these_properties_are_of_changes_in_decades_too():
    """That the swap above is not of zeros alone."""
    low, high = ({"lambda_v": 1e-13}, {"lambda_v": 1e-11})
    (row,) = compare(*both([(low, high)]), {"lambda_v": "decades"}).to_dicts()
    assert row["change"] == pytest.approx(math.log10(100))
