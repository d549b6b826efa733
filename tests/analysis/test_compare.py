import math

import pytest

from deadbench.analysis.compare import METRICS, compare
from deadbench.analysis.compare_seeds import compared_over_seeds
from deadbench.analysis.formats import render
from deadbench.analysis.results import ResultsError
from deadbench.analysis.sides import open_side
from deadbench.analysis.student import widening


def rows_of(frame, baseline, candidate, asked=METRICS):
    return compare(frame(baseline), frame(candidate), asked).to_dicts()


def test_reads_are_paired_and_every_metric_of_the_baseline_is_a_row(frame, read):
    baseline = [read("a", depth=13.0, num_dead_1e6=1), read("b", depth=2.0)]
    candidate = [read("b", depth=2.0), read("a", depth=12.0, num_dead_1e6=3), read("new", depth=1.0)]
    rows = rows_of(frame, baseline, candidate)
    assert [(r["model"], r["metric"], r["change"], r["verdict"]) for r in rows] == [
        ("a", "depth", -1.0, "changed"),
        ("a", "num_dead_1e6", 2.0, "changed"),
        ("b", "depth", 0.0, "same"),
    ]


@pytest.mark.parametrize(
    ("scale", "metric", "before", "after", "change"),
    [
        ("absolute", "lambda_v", 2.0, 3.0, 1.0),
        ("relative", "lambda_v", -2.0, -3.0, -0.5),
        ("relative", "lambda_v", 0.0, 3.0, math.inf),
        ("decades", "lambda_v", 1e-13, 1e-15, -2.0),
        ("decades", "lambda_v", 1e-13, 0.0, -math.inf),
        ("decades", "lambda_v", 0.0, 0.0, 0.0),
        ("decades", "depth", 13.0, 12.5, -0.5),  # decades already
        ("absolute", "kernel_exact", True, False, -1.0),
    ],
)
def test_scales(frame, read, scale, metric, before, after, change):
    (row,) = rows_of(frame, [read(**{metric: before})], [read(**{metric: after})], {metric: scale})
    assert row["change"] == pytest.approx(change)


def test_noise_comes_from_the_seeds_else_from_the_tokens(frame, read):
    baseline = [read("m", "random", seed=s, lambda_v=v) for s, v in enumerate((1e-13, 1e-14))]
    (first, _) = rows_of(frame, baseline, baseline, {"lambda_v": "decades"})
    # log10 of the two values differ by one decade: standard deviation 1/sqrt(2), of a difference 1; two seeds widen it.
    assert (first["noise"], first["noise_from"]) == (pytest.approx(widening(1)), "seeds")

    one = [read("m", depth=13.0, num_tokens=800, alignment=0.9)]
    depth, alignment = rows_of(frame, one, one, {"depth": "decades", "alignment": "absolute"})
    assert depth["noise_from"] == "tokens"
    assert depth["noise"] == pytest.approx(math.sqrt(2) * math.sqrt(2 / 800) / math.log(10))
    assert (alignment["noise"], alignment["noise_from"]) == (None, None)


def test_a_reads_own_bootstrap_comes_before_the_gaussian_estimate(frame, read):
    one = [read("m", depth=13.0, depth_exact=32.0, num_tokens=800, depth_standard_error=0.1)]
    depth, exact = rows_of(frame, one, one, {"depth": "decades", "depth_exact": "decades"})
    assert (depth["noise"], depth["noise_from"]) == (pytest.approx(math.sqrt(2) * 0.1), "bootstrap")
    assert exact["noise_from"] == "tokens"


def test_a_change_within_noise_is_told_from_one_beyond(frame, read):
    tokens = {"num_tokens": 800}  # noise 0.0307 decades
    changes = [
        rows_of(frame, [read(depth=13.0, **tokens)], [read(depth=d)], {"depth": "decades"}) for d in (13.05, 13.1)
    ]
    assert [rows[0]["verdict"] for rows in changes] == ["noise", "changed"]
    (row,) = rows_of(frame, [read(depth=1.0)], [read(depth=1.0 + 1e-12)], {"depth": "decades"})
    assert row["verdict"] == "same", "the same numbers added up in another order"


def test_what_is_gone_is_said(frame, read):
    baseline = [read("a", depth=1.0), read("b", depth=1.0), read("c", depth=1.0)]
    candidate = [read("a", depth=None), read("b", status="failed", error="no memory"), read("d", depth=1.0)]
    rows = rows_of(frame, baseline, candidate, {"depth": "decades"})
    assert [(r["model"], r["metric"], r["verdict"], r["detail"]) for r in rows] == [
        ("a", "depth", "lost", "no value in the candidate; its row does not say why"),
        ("b", None, "failed", "no memory"),
        ("c", None, "missing", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        ({"error": "no final norm"}, "no value in the candidate: no final norm"),
        ({"family": "rmsnorm"}, "no value in the candidate, whose norm is rmsnorm, the baseline's layernorm"),
    ],
)
def test_a_lost_value_is_explained_by_the_candidates_row(frame, read, candidate, reason):
    table = compare(frame([read("a", depth=1.0, alignment=0.5)]), frame([read("a", alignment=0.5, **candidate)]))
    assert table.filter(metric="depth").select("verdict", "detail").rows() == [("lost", reason)]
    assert table.filter(metric="alignment")["detail"].to_list() == [None]
    for format in ("md", "html"):
        page = render({"compare": table}, format)
        assert "lost: the baseline has a value of the metric and the candidate has none" in page
        assert "a depth: no value in the candidate" in page
    assert "lost:" not in render({"compare": table.filter(metric="alignment")}, "md")


def test_two_models_or_two_checkpoints_are_paired_whatever_their_names(frame, read):
    baseline = [read("./old", revision="step1", depth=1.0)]
    candidate = [read("./new", revision="step2", depth=2.0)]
    (row,) = rows_of(frame, baseline, candidate, {"depth": "decades"})
    assert (row["model"], row["candidate_model"]) == ("./old", "./new")
    assert (row["revision"], row["candidate_revision"], row["change"]) == ("step1", "step2", 1.0)
    # With a series on one side a checkpoint has only its own name.
    series = [*baseline, read("./old", revision="step2", depth=5.0)]
    (alone, paired) = rows_of(frame, series, candidate, {"depth": "decades"})
    assert (paired["revision"], paired["verdict"], alone["verdict"]) == ("step2", "changed", "missing")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"protocol": "standard[tokens=9]"}, "standard float32 against standard[tokens=9] float32"),
        ({"dtype": "bfloat16"}, "standard float32 against standard bfloat16"),
        ({}, "standard float32, of another input or version of the read"),
    ],
)
def test_mixed_protocols_are_refused_in_one_line(frame, read, other, words):
    with pytest.raises(ResultsError, match="different protocols") as refused:
        rows_of(frame, [read("m", depth=1.0)], [read("m", depth=1.0, protocol_hash="other", **other)])
    assert words in str(refused.value)
    assert "m: the trained reads" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_nothing_in_common(frame, read):
    with pytest.raises(ResultsError, match="the baseline has a, b, the candidate c, d"):
        rows_of(frame, [read("a"), read("b")], [read("c"), read("d")])
    with pytest.raises(ResultsError, match="the candidate has no finished read"):
        rows_of(frame, [read("a")], [read("a", status="failed")])


def test_a_side_is_a_result_set_or_one_checkpoint_of_it(result_set, read):
    location = result_set([read(revision="step1", depth=1.0), read(revision="step2", depth=2.0), read(read="random")])
    assert open_side(location).reads.collect().height == 3
    assert open_side(f"{location}@step2").reads.collect()["depth"].to_list() == [2.0]
    odd = result_set([read(depth=3.0)], name="a@b")
    assert open_side(odd).reads.collect()["depth"].to_list() == [3.0], "a folder of that name comes first"
    with pytest.raises(ResultsError, match="no checkpoint 'step3' in .*; choose step1, step2"):
        open_side(f"{location}@step3")
    with pytest.raises(ResultsError, match="no such result set"):
        open_side("absent@step1")


def test_over_seeds_a_comparison_is_of_means_with_the_noise_of_the_mean_change(frame, read):
    def side(*depths):
        return frame(
            [read(f"m-seed{i}", depth=d, lambda_v=10.0**-d) for i, d in enumerate(depths)] + [read("b", depth=1)]
        )

    table = compare(side(12.0, 13.0, 14.0), side(12.0, 13.5, 14.4))
    both = compared_over_seeds(table)
    columns = ("model", "metric", "baseline", "candidate", "change", "noise_from", "verdict", "num_seeds")
    b, depth, lambda_v = both.select(columns).rows()
    assert b[:2] == ("b", "depth")
    assert depth == ("m-seed*", "depth", 13.0, pytest.approx(13.3), pytest.approx(0.3), "seeds", "noise", 3)
    assert lambda_v[2:5] == (pytest.approx(1e-13), pytest.approx(10**-13.3), pytest.approx(-0.3))
    errors = both.filter(model="m-seed*").select("baseline_error", "candidate_error", "noise").rows()
    assert errors[0] == (1.0, pytest.approx(1.2124, abs=1e-4), pytest.approx(0.26458 / 3**0.5 * widening(2), abs=1e-4))
    assert errors[1][:2] == (None, None), "a factor has no error on the value's own scale"
    shown = render({"compare": both}, "md")
    assert "13 ± 1 |" in shown
    assert "mean ± standard deviation over seeds: m-seed\\* (3)" in shown
    assert compared_over_seeds(table.filter(model="b")).equals(table.filter(model="b"))


def test_a_depths_own_error_stands_beside_it(frame, read):
    table = compare(frame([read(depth=13.0, depth_standard_error=0.05)]), frame([read(depth=12.0)]))
    assert table.select("baseline_error", "candidate_error").rows() == [(0.05, None)]
    assert "| 13 ± 0.05 | 12 |" in render({"compare": table}, "md")
