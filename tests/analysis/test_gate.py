from xml.etree import ElementTree

import pytest
import yaml

from deadbench.analysis.compare import compare
from deadbench.analysis.gate import DEFAULT, Gate, GateError, broken, judge, load_gate, unjudged
from deadbench.analysis.pages.gate_report import github_summary, headline, junit
from deadbench.analysis.student import widening
from tests.conftest import ROOT

EVIL = "<script>|x\x00</testcase>"


def judged(frame, baseline, candidate, metrics, **options):
    gate = Gate.model_validate({"metrics": metrics} | options)
    return judge(compare(frame(baseline), frame(candidate), gate.scales()), gate)


@pytest.mark.parametrize(
    ("metric", "rule", "before", "after", "breaks"),
    [
        ("depth", {"worse": "lower", "decades": 0.5}, 13.0, 12.5, False),
        ("depth", {"worse": "lower", "decades": 0.5}, 13.0, 12.49, True),
        ("depth", {"worse": "lower", "decades": 0.5}, 13.0, 20.0, False),
        ("depth", {"worse": "higher", "absolute": 0.5}, 13.0, 20.0, True),
        ("depth", {"worse": "changed", "absolute": 0.5}, 13.0, 12.0, True),
        ("lambda_v", {"worse": "higher", "decades": 1}, 1e-13, 2e-12, True),
        ("lambda_v", {"worse": "lower", "decades": 1}, 1e-13, 0.0, True),
        ("worst_block_ratio", {"worse": "lower", "relative": 0.2}, 1.0, 0.81, False),
        ("worst_block_ratio", {"worse": "lower", "relative": 0.2}, 1.0, 0.79, True),
        ("num_learned", {"worse": "higher"}, 0, 1, True),
        ("num_learned", {"worse": "higher"}, 1, 1, False),
        ("kernel_exact", {"worse": "lower"}, True, False, True),
        ("depth", {"worse": "lower", "decades": 0.5, "models": ["other-*"]}, 13.0, 1.0, None),
        ("depth", {"worse": "lower", "decades": 0.5, "reads": ["random"]}, 13.0, 1.0, None),
    ],
)
def test_direction_and_bound(frame, read, metric, rule, before, after, breaks):
    # A second metric, unchanged: a gate must judge something.
    sides = [[read("m", **{metric: value}, hidden_size=8)] for value in (before, after)]
    checks = judged(frame, *sides, {metric: rule, "hidden_size": {"worse": "changed"}})
    verdicts = dict(checks.select("metric", "verdict").rows())
    assert verdicts.pop("hidden_size") == "passed"
    assert verdicts == ({} if breaks is None else {metric: "broken" if breaks else "passed"})


def test_noise_widens_a_bound_and_never_narrows_it(frame, read):
    seeds = [read("m", "random", seed=s, depth=d) for s, d in enumerate((13.0, 12.0))]  # noise 1 decade, by two seeds
    worse = [row | {"depth": row["depth"] - 1.5 * widening(1)} for row in seeds]
    rule = {"depth": {"worse": "lower", "decades": 0.1}}
    assert broken(judged(frame, seeds, worse, rule)).is_empty()
    assert len(broken(judged(frame, seeds, worse, rule, noise=1))) == 2
    assert len(broken(judged(frame, seeds, worse, rule, noise=0))) == 2
    checks = judged(frame, seeds, worse, {"depth": {"worse": "lower", "decades": 20}}, noise=1)
    assert checks["allowed"].to_list() == [20.0, 20.0]


def test_what_is_allowed_is_the_bound_or_so_many_times_the_noise(frame, read):
    seeds = [read("m", "random", seed=s, depth=d) for s, d in enumerate((13.0, 12.5))]  # noise half a decade
    half = 0.5 * widening(1)  # of two seeds
    for noise, decades, allowed in ((2, 0.1, 2 * half), (1, 0.1, half), (3, 0.1, 3 * half), (0, 0.1, 0.1), (2, 9, 9)):
        checks = judged(frame, seeds, seeds, {"depth": {"worse": "lower", "decades": decades}}, noise=noise)
        assert checks["allowed"].to_list() == pytest.approx([allowed] * 2)


def test_missing_failed_and_lost_break(frame, read):
    baseline = [read(name, depth=1.0) for name in "abcd"]
    candidate = [read("a", depth=1.0), read("b", status="failed", error="no memory"), read("d", depth=None)]
    rule = {"depth": {"worse": "lower"}}
    assert broken(judged(frame, baseline, candidate, rule))["verdict"].to_list() == ["lost", "missing", "failed"]
    ignored = judged(frame, baseline, candidate, rule, missing="ignore")
    assert broken(ignored)["verdict"].to_list() == ["lost"]
    assert sorted(ignored["verdict"]) == ["ignored", "ignored", "lost", "passed"]


def test_a_gate_that_judges_nothing_is_refused_and_an_idle_rule_is_named(frame, read):
    sides = [[read("m", depth=1.0)]] * 2
    with pytest.raises(GateError, match="judges nothing: no read .* has lambda_v"):
        judged(frame, *sides, {"lambda_v": {"worse": "higher"}})
    gate = Gate.model_validate({"metrics": {"depth": {"worse": "lower"}, "lambda_v": {"worse": "higher"}}})
    assert unjudged(judge(compare(frame(sides[0]), frame(sides[1]), gate.scales()), gate), gate) == ["lambda_v"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a gate file is a mapping"),
        ("[1", "not YAML"),
        ("metrics: {depth: {worse: lower}, depth: {worse: higher}}", "key 'depth' is given twice"),
        ("metrics: {}", "metrics: "),
        ("metrics: {dept: {worse: lower}}", "metric 'dept' is no numeric column of reads; for example depth"),
        ("metrics: {model: {worse: lower}}", "metric 'model' is no numeric column"),
        ("metrics: {depth: {worse: down}}", "metrics.depth.worse: .*'lower', 'higher' or 'changed'.* .got 'down'."),
        ("metrics: {depth: {worse: lower, absolute: 1, decades: 1}}", "give one of absolute, relative, decades"),
        ("metrics: {depth: {worse: lower, decades: -1}}", "greater than or equal to 0 .got -1."),
        ("metrics: {depth: {worse: lower, decades: .nan}}", "finite"),
        ("metrics: {depth: {worse: lower}}\nnoize: 1", "noize: Extra inputs are not permitted"),
    ],
)
def test_a_bad_gate_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "gate.yaml"
    path.write_text(content)
    with pytest.raises(GateError, match=message) as error:
        load_gate(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("metrics: {depth: {worse: lower, absolute: 1, decades: 1}}",
         "metrics.depth: give one of absolute, relative, decades"),
        ("metrics: {depht: {worse: lower}}",
         "metrics: metric 'depht' is no numeric column of reads; for example depth"),
        ("metrics: {depth: {worse: lower, decades: -1}}",
         "metrics.depth.decades: Input should be greater than or equal to 0 (got -1)"),
        ("metrics: {depth: 1}", "metrics.depth: Input should be a valid dictionary or instance of MetricGate (got 1)"),
    ],
)  # fmt: skip
def test_the_line_says_where_and_what_and_nothing_of_the_checker(tmp_path, content, line):
    path = tmp_path / "gate.yaml"
    path.write_text(content)
    with pytest.raises(GateError) as error:
        load_gate(path)
    assert str(error.value).split(", depth")[0] == f"{path}: {line}"


def test_a_gate_file_that_is_not_there_and_a_line_without_end(tmp_path):
    with pytest.raises(GateError, match=r"absent.yaml: no such gate file$"):
        load_gate(tmp_path / "absent.yaml")
    path = tmp_path / "gate.yaml"
    path.write_text(f"metrics: {{{'x' * 1000}: {{worse: lower}}}}")
    with pytest.raises(GateError) as error:
        load_gate(path)
    assert len(str(error.value)) == len(f"{path}: ") + 300


def test_all_rules_that_judged_nothing_are_named(frame, read):
    sides = [[read("m", depth=1.0)]] * 2
    with pytest.raises(GateError, match="has lambda_v, alignment under its reads and models"):
        judged(frame, *sides, {"lambda_v": {"worse": "higher"}, "alignment": {"worse": "lower"}})


def test_the_example_gate_and_workflow_hold():
    assert "depth" in load_gate(ROOT / "examples" / "gate.yaml").metrics
    workflow = yaml.safe_load((ROOT / "examples" / "github-actions.yaml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert any("deadbench compare" in step and "--gate" in step for step in steps)
    assert DEFAULT.noise == 2.0


def test_summaries_escape_what_users_wrote(frame, read):
    sides = [[read(EVIL, depth=13.0, num_zero_scales=0)], [read(EVIL, depth=1.0, num_zero_scales=0)]]
    checks = judged(frame, *sides, {"depth": {"worse": "lower"}, "num_zero_scales": {"worse": "higher"}})
    assert headline(checks) == "deadbench gate: 1 of 2 checks broke"
    summary = github_summary(checks)
    assert summary.startswith("### ❌ deadbench gate: 1 of 2 checks broke")
    assert "&lt;script&gt;\\|x" in summary
    root = ElementTree.fromstring(junit(checks))
    (suite,) = root.findall("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    (failure,) = root.iter("failure")
    assert failure.get("message") == "broken, baseline 13, candidate 1, change -12, allowed 0"

    passed = judged(frame, sides[0], sides[0], {"depth": {"worse": "lower"}})
    assert github_summary(passed) == "### ✅ deadbench gate: all 1 checks passed\n"
    assert not list(ElementTree.fromstring(junit(passed)).iter("failure"))


@pytest.mark.parametrize(
    ("depth", "error", "bound", "verdict", "detail"),
    [
        (13.0, 0.1, 0.5, "passed", None),
        (12.75, 0.1, 0.5, "cannot tell", "about 1049 tokens would tell"),  # worse by 0.25, noise hides 0.2828
        (12.4, 0.5, 0.5, "cannot tell", "about 4551 tokens would tell"),  # 0.6 worse, noise hides 1.4142
        (12.5, 0.1, 0.5, "cannot tell", "not even 1000 times as many tokens would tell"),
        (12.0, 0.1, 0.5, "broken", None),
        (12.9, 0.1, 0.0, "passed", None),  # where nothing is borne noise is
    ],
)
def test_a_check_passes_breaks_or_cannot_tell(frame, read, depth, error, bound, verdict, detail):
    side = {"num_tokens": 819, "depth_standard_error": error}
    rule = {"depth": {"worse": "lower", "decades": bound}}
    (row,) = judged(frame, [read("m", depth=13.0, **side)], [read("m", depth=depth)], rule).iter_rows(named=True)
    assert (row["verdict"], row["detail"]) == (verdict, detail)


def test_what_cannot_be_told_is_said_and_breaks_nothing(frame, read):
    before = [read("m", depth=13.0, num_tokens=819, depth_standard_error=0.5)]
    checks = judged(frame, before, [read("m", depth=12.4)], {"depth": {"worse": "lower", "decades": 0.5}})
    assert headline(checks) == "deadbench gate: 1 of 1 checks cannot tell"
    assert broken(checks).is_empty()
    assert "cannot tell" in github_summary(checks)
    (suite,) = ElementTree.fromstring(junit(checks))
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")
    assert "about" in suite[0][0].get("message")
