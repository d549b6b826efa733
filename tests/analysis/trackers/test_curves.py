import math

import pytest

from deadbench.analysis.results import ResultsError
from deadbench.analysis.trackers.curves import by_tokens, series


def test_points_stand_in_the_order_of_their_steps_with_what_is_finite(frame, read):
    rows = [
        read("a", revision="step10", checkpoint_step=10, depth=12.0, lambda_v=math.inf, minute=0),
        read("a", revision="step2", checkpoint_step=2, depth=13.0, kernel_exact=True, tokens_seen=2048, minute=1),
        read("a", "random", depth=14.0),
        read("a", revision="step20", checkpoint_step=20, status="failed", error="no"),
    ]
    random, trained = series(frame(rows))
    assert random.name == "a random standard float32 torch seed 0"
    assert [(point.step, point.values) for point in random.points] == [(0, {"depth": 14.0})]
    assert [(point.step, point.tokens, point.values) for point in trained.points] == [
        (2, 2048, {"depth": 13.0, "kernel_exact": 1.0}),
        (10, None, {"depth": 12.0}),
    ]
    assert [(point.step, point.values) for point in by_tokens(trained.points)] == [
        (2048, {"depth_by_tokens": 13.0, "kernel_exact_by_tokens": 1.0})
    ]


def test_what_differs_in_protocol_dtype_or_seed_is_another_series(frame, read):
    others = ({}, {"dtype": "bfloat16"}, {"seed": 1}, {"protocol": "quick"})
    rows = [read("a", depth=1.0, protocol_hash=str(other), **other) for other in others]
    assert len({each.name for each in series(frame(rows))}) == 4


def test_a_model_that_is_not_there_is_told_with_those_that_are(frame, read):
    rows = frame([read("a", depth=1.0), read("b", depth=1.0)])
    assert [each.model for each in series(rows, "b")] == ["b"]
    with pytest.raises(ResultsError, match="model 'c' has no finished read here; choose a, b"):
        series(rows, "c")
    with pytest.raises(ResultsError, match="nothing to log"):
        series(frame([read("a", status="failed", error="no")]))
