"""The page of a run in training: verdicts, curves with the limits of the gate, and no more than that it is told."""

import json
import re

import polars as pl
import pytest

from deadbench.analysis.gate import Gate, MetricGate, limits
from deadbench.analysis.pages.training import training_page
from deadbench.analysis.plots.gated import gated_plot
from deadbench.analysis.results import scan

EVIL = "</script><script>alert(1)</script>"
GATE = Gate(metrics={"depth": MetricGate(worse="lower", decades=0.5), "num_learned": MetricGate(worse="higher")})


@pytest.fixture
def location(result_set, read):
    depths = {10: 13.0, 20: 13.2, 30: 12.0}
    return result_set(
        [read(EVIL, revision=f"step{s}", checkpoint_step=s, depth=d, num_learned=0) for s, d in depths.items()]
    )


def verdict(step, status, broken=(), opened=(), error=None):
    side = {"against": f"step{step - 10}", "num_checks": 2, "num_cannot_tell": 0, "broken": list(broken)}
    return {
        "model": EVIL, "revision": f"step{step}", "step": step, "status": status, "comparisons": [side],
        "opened": list(opened), "error": error,
    }  # fmt: skip


VERDICTS = [
    verdict(10, "first"),
    verdict(20, "passed"),
    verdict(30, "broken", [{"metric": "depth", "read": "trained"}], ["ln_f: 5"]),
    verdict(40, "failed", error="no such <b>directory</b>"),
]


@pytest.mark.slow
def test_the_page_has_verdicts_curves_and_the_limits_of_the_gate(location, result_set, read):
    baseline = scan(result_set([read("main", depth=14.0, num_learned=0)], name="base"))
    page = training_page(location, EVIL, VERDICTS, gate=GATE, baseline=baseline, refresh=0.2)
    assert '<meta http-equiv="refresh" content="1">' in page
    assert EVIL not in page
    assert "no such &lt;b&gt;directory&lt;/b&gt;" in page
    assert "depth against step20" in page
    assert "ln_f: 5" in page
    assert re.findall(r"<b>(.*?)</b><span>(.*?)</span>", page) == [
        ("4", "checkpoints"), ("1", "broken"), ("1", "could not be read"), ("step40", "the last one")
    ]  # fmt: skip
    (specs,) = re.findall(r'<script type="application/json" id="specs">(.*?)</script>', page)
    depth, learned = json.loads(specs)
    assert [(row["step"], row["value"], row["broke"]) for row in depth["datasets"]["run"]] == [
        (10, 13.0, False), (20, 13.2, False), (30, 12.0, True)
    ]  # fmt: skip
    assert [(row["step"], row["value"]) for row in depth["datasets"]["borne"]] == [(20, 12.5), (30, 12.7)]
    assert depth["datasets"]["level"] == [{"value": 13.5}]
    assert [row["value"] for row in learned["datasets"]["borne"]] == [0, 0]
    assert page.count('class="plot"') == 2
    assert 'http-equiv="refresh"' not in training_page(location, EVIL, VERDICTS, gate=GATE)


def test_there_is_a_page_before_the_first_checkpoint(tmp_path):
    page = training_page(str(tmp_path), "run", [], refresh=30.0)
    assert 'content="30"' in page
    assert "vegaEmbed" not in page


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (MetricGate(worse="lower", absolute=1), [9.0]),
        (MetricGate(worse="higher", relative=0.5), [15.0]),
        (MetricGate(worse="changed", decades=1), [1.0, 100.0]),
        (MetricGate(worse="higher"), [10.0]),
    ],
)
def test_the_limits_are_those_that_the_gate_has(rule, expected):
    assert limits("scale_harmonic", rule, 10.0) == pytest.approx(expected)


def test_a_metric_without_values_or_steps_has_no_plot():
    series = pl.DataFrame({"seed": [0], "revision": ["a"], "checkpoint_step": [None], "depth": [1.0]})
    assert gated_plot(series, "depth", GATE.metrics["depth"], ()) is None


def test_a_zero_of_a_magnitude_stands_at_the_foot_of_its_axis():
    columns = {"seed": [0] * 3, "revision": ["a", "b", "c"], "checkpoint_step": [1, 2, 3], "lambda_v": [1e-3, 0.0, 1.0]}
    spec = gated_plot(pl.DataFrame(columns), "lambda_v", MetricGate(worse="higher", decades=1), ())
    assert [row["value"] for row in spec["datasets"]["run"]] == [1e-3, 1e-3, 1.0]
    assert [row["value"] for row in spec["datasets"]["borne"]] == [1e-2, 1e-3]
