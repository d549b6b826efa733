"""Paired by sequence: the noise of a difference, against its true spread, its level and its power."""

import math

import numpy as np
import polars as pl
import pytest

from deadbench.analysis.compare import compare
from deadbench.analysis.gate import Gate, broken, judge
from deadbench.analysis.paired import LEAST_SEQUENCES, Samples, difference_noise, influences
from deadbench.suite.schema import KEY, to_table

SEQUENCES, LENGTH = 32, 64


def draw(seed, own=0.05, shared=0.4, factor=1.0):
    """Sums of two sides over the same sequences: what a sequence varies by is mostly common to both."""
    rng = np.random.default_rng(seed)
    common_S = np.exp(shared * rng.standard_normal(SEQUENCES))
    sides = []
    for scale in (1.0, factor):
        spread_S = np.sqrt(1e-14 * scale * common_S * np.exp(own * rng.standard_normal(SEQUENCES)))
        along_ST = spread_S[:, None] * rng.standard_normal((SEQUENCES, LENGTH))
        sums = {"sum_along": along_ST.sum(1).tolist(), "squares_along": np.square(along_ST).sum(1).tolist()}
        total = {"total_variance": 8.0, "squares_total": [8.0 * LENGTH] * SEQUENCES}
        sides.append({"site": "final_norm", "num_tokens": [LENGTH] * SEQUENCES} | sums | total)
    return sides


def lambda_of(sample):
    rows = sum(sample["num_tokens"])
    return sum(sample["squares_along"]) / rows - (sum(sample["sum_along"]) / rows) ** 2


def change(sides):
    before, after = map(lambda_of, sides)
    return math.log10(after / before)


def test_influences_are_the_derivatives_of_the_estimate():
    sample, _ = draw(0)
    found = influences(sample)
    step = 1e-6
    for place in (0, 7):
        moved = {
            name: [value * (1 + step * (index == place)) for index, value in enumerate(values)]
            for name, values in sample.items()
            if name in ("num_tokens", "sum_along", "squares_along", "squares_total")
        }
        slope = (math.log10(lambda_of(moved)) - math.log10(lambda_of(sample))) / step
        assert found.lambda_v_S[place] == pytest.approx(slope, rel=1e-4)
        assert found.depth_S[place] == pytest.approx(-slope, rel=1e-4), "every sequence has the same total variance"
    assert found.lambda_v_S.sum() == pytest.approx(0, abs=1e-12)


def test_the_paired_noise_is_the_spread_of_the_difference_and_not_that_of_two_samples():
    drawn = [draw(seed) for seed in range(200)]
    spread = np.std([change(sides) for sides in drawn])
    paired = [difference_noise(*map(influences, sides))[0] for sides in drawn]
    alone = [math.hypot(*(np.linalg.norm(influences(side).lambda_v_S) for side in sides)) for sides in drawn]
    assert np.sqrt(np.mean(np.square(paired))) == pytest.approx(spread, rel=0.15)
    assert np.median(alone) > 1.8 * np.median(paired)


def gated(reads, samples, decades=0.0):
    gate = Gate.model_validate({"metrics": {"lambda_v": {"worse": "higher", "decades": decades}}})
    return judge(compare(*reads, gate.scales(), samples), gate)


def sides_of(frame, read, *drawn):
    """Result sets of both sides, a model for each of `drawn`, and their sums by sequence."""
    reads, sums = ([], []), ([], [])
    for number, sides in enumerate(drawn):
        error = float(np.linalg.norm(influences(sides[0]).lambda_v_S))
        for place, side in enumerate(sides):
            columns = {"num_tokens": SEQUENCES * LENGTH, "lambda_v_standard_error": error}
            row = read(f"m{number}", lambda_v=lambda_of(side), **columns)
            reads[place].append(row)
            sums[place].append({name: row.get(name) for name in ("run_id", *KEY)} | side)
    tables = (pl.DataFrame(pl.from_arrow(to_table("samples", rows))).lazy() for rows in sums)
    return [frame(rows) for rows in reads], Samples(*tables)


def test_false_alarms_and_power(frame, read):
    counts = {}
    for factor in (1.0, 1.25):
        reads, samples = sides_of(frame, read, *(draw(seed, factor=factor) for seed in range(200)))
        counts[factor] = [len(broken(gated(reads, given))) for given in (samples, None)]
    alarms, power = counts[1.0][0] / 200, [count / 200 for count in counts[1.25]]
    assert alarms <= 0.05
    assert power[0] > power[1] + 0.3, power


def test_a_comparison_says_that_it_is_paired_where_the_sequences_are_the_same(frame, read):
    sides = draw(3)
    reads, samples = sides_of(frame, read, sides)
    (row,) = gated(reads, samples).iter_rows(named=True)
    assert (row["noise_from"], row["noise"]) == ("pairs", pytest.approx(difference_noise(*map(influences, sides))[0]))
    (row,) = gated(reads, None).iter_rows(named=True)
    assert row["noise_from"] == "bootstrap"


@pytest.mark.parametrize("of", ["other lengths", "few", "still"])
def test_nothing_is_paired_that_does_not_match(frame, read, of):
    before, after = draw(4)
    if of == "other lengths":
        after["num_tokens"] = [LENGTH - 1, *after["num_tokens"][1:]]
    elif of == "few":
        for side in (before, after):
            side |= {name: side[name][: LEAST_SEQUENCES - 1] for name in side if isinstance(side[name], list)}
    reads, samples = sides_of(frame, read, (before, after))
    if of == "still":
        still = pl.lit([0.0] * SEQUENCES)
        samples = Samples(samples[0], samples[1].with_columns(sum_along=still, squares_along=still))
    assert gated(reads, samples)["noise_from"].to_list() == ["bootstrap"]
