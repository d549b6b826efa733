import json

import pytest

from deadbench.analysis.bencher import bencher
from deadbench.analysis.compare import compare


def test_the_candidate_by_read_and_metric_with_its_interval(frame, read):
    before = frame([read("a", depth=13.0), read("b", depth=12.0)])
    rows = [read("a", depth=12.5, depth_standard_error=0.1, lambda_v=float("inf")), read("b", depth=12.0)]
    document = json.loads(bencher(compare(before, frame(rows))), parse_constant=pytest.fail)
    (first, second) = document.values()
    assert next(iter(document)).startswith("a ")
    assert first["depth"] == {
        "value": 12.5,
        "lower_value": pytest.approx(12.5 - 0.196),
        "upper_value": pytest.approx(12.5 + 0.196),
    }
    assert "lambda_v" not in first
    assert second["depth"] == {"value": 12.0}


def test_a_name_is_one_line_and_not_longer_than_bencher_takes(frame, read):
    rows = frame([read("x\n\x1b[31m" + 2000 * "y", depth=1.0)])
    (name,) = json.loads(bencher(compare(rows, rows)))
    assert len(name) == 1024
    assert name.isprintable()
