import numpy as np
import pytest

from deadbench.analysis.compare import compare
from deadbench.analysis.drift import judge_drift, slope, with_drift
from deadbench.analysis.gate import Gate, GateError, judge, load_gate
from deadbench.analysis.sides import open_side
from deadbench.analysis.student import widening

RULE = {"worse": "lower", "per_1000_steps": 0.01, "last": 8}


def gate(**rule):
    metrics = {"depth": {"worse": "lower", "decades": 1}}
    return Gate.model_validate({"metrics": metrics, "drift": {"depth": RULE | rule}})


def series(read, depths, **more):
    return [
        read(revision=f"step{s}", checkpoint_step=s, depth=depth, **more)
        for s, depth in zip(range(1000, 1000 * (len(depths) + 1), 1000), depths, strict=True)
    ]


def test_a_line_by_hand():
    found = slope([0, 1000, 2000, 3000], [1.0, 3.0, 4.0, 6.0])
    # Residuals of 1.1 + 1.6 x: -0.1, 0.3, -0.3, 0.1; sum of squares 0.2, of x 5.
    assert found.per_1000_steps == pytest.approx(1.6)
    assert found.error == pytest.approx(widening(2) * (0.2 / 2 / 5) ** 0.5)
    with pytest.raises(ValueError, match="needs 4 checkpoints"):
        slope([0, 1, 2], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("depths", "verdict"),
    [
        ([13 - 0.05 * i for i in range(10)], "broken"),
        ([13 - 0.001 * i for i in range(10)], "passed"),
        ([13 + 0.05 * i for i in range(10)], "passed"),
        ([13, 12.9, 13.1, 12.9, 13.05, 12.95, 13, 12.97], "cannot tell"),
        ([13, 12, 11], "cannot tell"),
        ([9, 9, *[13] * 8], "passed"),
    ],
)
def test_the_slope_over_the_last_checkpoints_is_judged_with_its_interval(frame, read, depths, verdict):
    (row,) = judge_drift(frame(series(read, depths)), gate()).iter_rows(named=True)
    assert (row["metric"], row["verdict"]) == ("depth drift", verdict)
    assert row["candidate"] == depths[-1]
    assert row["candidate_revision"] == f"step{1000 * len(depths)}"


def test_what_no_neighbour_shows_the_slope_does(frame, read):
    rows = series(read, [13 - 0.05 * i for i in range(10)])
    neighbours = [frame([rows[place]]) for place in (-2, -1)]
    judged = judge(compare(*neighbours, gate().scales()), gate())
    assert judged["verdict"].to_list() == ["passed"]
    both = with_drift(judged, frame(rows), gate())
    assert both["verdict"].to_list() == ["passed", "broken"]


def test_false_alarms_without_a_drift(frame, read):
    rng = np.random.default_rng(0)
    rows = [row for m in range(200) for row in series(read, list(13 + 0.1 * rng.standard_normal(8)), model=f"m{m}")]
    judged = judge_drift(frame(rows), gate(per_1000_steps=0))
    assert len(judged) == 200
    assert (judged["verdict"] == "broken").sum() <= 10, "five percent"


def test_one_checkpoint_as_a_side_has_those_before_it_and_none_after(result_set, read):
    place = result_set(series(read, [13.0, 12.9, 12.8, 12.7, 12.6, 20.0, 20.0]))
    side = open_side(f"{place}@step5000")
    (row,) = judge_drift(side.until, gate()).iter_rows(named=True)
    assert (row["change"], row["verdict"]) == (pytest.approx(-0.1), "broken")
    assert judge_drift(open_side(place).until, gate())["candidate"].to_list() == [20.0]


def test_only_the_reads_and_models_of_the_rule(frame, read):
    rows = frame(series(read, [13.0] * 5) + series(read, [13.0] * 5, model="other"))
    assert judge_drift(rows, gate(models=["oth*"]))["model"].to_list() == ["other"]
    assert judge_drift(rows, gate(reads=["random"])).is_empty()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("dept: {worse: lower, per_1000_steps: 1}", r"drift: metric 'dept' is no numeric column"),
        ("depth: {worse: lower}", r"drift.depth.per_1000_steps"),
        ("depth: {worse: lower, per_1000_steps: 1, last: 3}", r"drift.depth.last"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(tmp_path, rule, message):
    (tmp_path / "gate.yaml").write_text(f"metrics: {{depth: {{worse: lower}}}}\ndrift: {{{rule}}}")
    with pytest.raises(GateError, match=message):
        load_gate(tmp_path / "gate.yaml")
