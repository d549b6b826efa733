import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadbench.analysis.footnotes import footnotes
from deadbench.analysis.formats import render
from deadbench.analysis.leaderboard import leaderboard
from deadbench.analysis.lines import in_natural_order, natural
from deadbench.analysis.plots.training import trend_plot
from deadbench.analysis.results import ResultsError
from deadbench.analysis.trend import METRICS, change_point, checkpoints, first_failing, on_scale, sparkline, summary


@pytest.fixture
def series(frame, read):
    depths = {0: 13.0, 16: 13.1, 128: 12.9, 512: 13.0, 2048: 9.0, 4096: 9.1}
    rows = [read("m", revision=f"step{s}", checkpoint_step=s, depth=d, lambda_v=10.0**-d) for s, d in depths.items()]
    return frame([*reversed(rows), read("m", "random", depth=1.0), read("other", depth=1.0)])


def test_checkpoints_come_in_training_order(series):
    assert checkpoints(series, "m")["checkpoint_step"].to_list() == [0, 16, 128, 512, 2048, 4096]


@given(st.sampled_from(["checkpoint-{}", "epoch{}", "v1-{}-final", "{}"]), st.data())
def test_names_without_a_step_sort_as_people_count(family, data):
    numbers = data.draw(st.lists(st.integers(0, 10**25), unique=True))
    widths = data.draw(st.sampled_from([1, 6]))
    names = [family.format(str(number).zfill(widths)) for number in numbers]
    ordered = [family.format(str(number).zfill(widths)) for number in sorted(numbers)]
    assert sorted(names, key=natural) == ordered
    table = pl.DataFrame({"revision": names}, schema={"revision": pl.String})
    assert table.sort(in_natural_order("revision"))["revision"].to_list() == ordered


def test_without_steps_the_names_order_a_trend_its_end_and_what_opened(frame, read):
    rows = [read("m", revision=f"epoch{n}", depth=float(n), minute=-n) for n in (10, 9, 100, 2, 1)]
    series = checkpoints(frame(rows), "m")
    assert series["revision"].to_list() == ["epoch1", "epoch2", "epoch9", "epoch10", "epoch100"]
    assert leaderboard(frame(rows))["revision"].to_list() == ["epoch100"]
    note = "no training step is known of 5 checkpoints: in the natural order of their names"
    assert footnotes(series) == [note]
    assert note in render({"trend": series}, "md")
    assert footnotes(series.with_columns(checkpoint_step=pl.Series([1, 2, 9, 10, 100]))) == []


def test_a_depths_error_stands_beside_it(frame, read):
    series = checkpoints(
        frame([read("m", revision="step1", checkpoint_step=1, depth=13, depth_standard_error=0.2)]), "m"
    )
    assert "| 13.00 ± 0.2 |" in render({"trend": series}, "md")


def test_the_summary_marks_the_change_point(series):
    found = {row["metric"]: row for row in summary(checkpoints(series, "m")).to_dicts()}
    assert (found["depth"]["change_step"], found["depth"]["change_revision"]) == (2048, "step2048")
    assert found["depth"]["change"] == pytest.approx(-3.95)
    assert found["depth"]["trend"] == "████▁▁"
    # A magnitude changes by decades.
    assert (found["lambda_v"]["change_step"], found["lambda_v"]["unit"]) == (2048, "decades")
    assert found["lambda_v"]["change"] == pytest.approx(3.95)
    assert "alignment" not in found, "nothing measured, no row"


def test_a_row_of_the_summary_says_where_a_metric_began_and_ended(frame, read):
    depths = {0: 5.0, 1: 9.0, 2: 3.0, 3: 6.0}
    rows = [read("m", revision=f"s{s}", checkpoint_step=s, depth=d, num_learned=2) for s, d in depths.items()]
    rows.append(read("m", revision="s4", checkpoint_step=4, num_learned=2))
    depth, learned = summary(checkpoints(frame(rows), "m"), ["depth", "num_learned"]).to_dicts()
    assert [depth[name] for name in ("first", "last", "min", "max")] == [5.0, 6.0, 3.0, 9.0]
    assert (depth["num_checkpoints"], learned["num_checkpoints"]) == (4, 5), "only those that have it"
    assert (depth["change_step"], depth["change_revision"], depth["change"]) == (None, None, None)
    assert (depth["unit"], learned["unit"]) == ("decades", "dimensions")
    assert (depth["protocol"], depth["dtype"], depth["seed"]) == ("standard", "float32", 0)


def test_every_line_of_a_model_is_summed_up_for_itself(frame, read):
    rows = [
        read(
            "m", revision=f"s{s}", checkpoint_step=s, seed=seed, dtype=dtype, protocol_hash=dtype, depth=float(seed + s)
        )
        for s in range(2)
        for seed in range(2)
        for dtype in ("float32", "bfloat16")
    ]
    found = summary(checkpoints(frame(rows), "m"), ["depth"])
    assert found.select("dtype", "seed", "first").rows() == [("bfloat16", None, 0.5), ("float32", None, 0.5)]


def test_training_seeds_are_replicates_whether_models_or_revisions_carry_them(frame, read):
    depths = {1: (12.0, 13.0), 2: (13.0, 15.0), 3: (14.0, 17.0)}
    as_models = [
        read(f"org/m-160m-seed{seed}", revision=f"step{step}", checkpoint_step=step, depth=d, hidden_size=64)
        for seed, both in depths.items()
        for step, d in enumerate(both)
    ]
    as_revisions = [
        read("org/m", revision=f"seed_{seed}-step{step}", checkpoint_step=step, depth=d)
        for seed, both in depths.items()
        for step, d in enumerate(both)
    ]
    for rows, name, revision in (
        (as_models, "org/m-160m-seed*", "step1"),
        (as_revisions, "org/m", "seed*-step1"),
    ):
        series = checkpoints(frame(rows), name)
        assert series.select("checkpoint_step", "depth", "depth_spread", "num_replicates").rows() == [
            (0, 13.0, 1.0, 3), (1, 15.0, 2.0, 3),
        ]  # fmt: skip
        (line,) = leaderboard(frame(rows)).to_dicts()
        told = [line[column] for column in ("model", "revision", "depth", "depth_spread", "num_replicates")]
        assert told == [name, revision, 15.0, 2.0, 3]
        shown = render({"leaderboard": leaderboard(frame(rows))}, "md")
        assert "| 15.00 ± 2 |" in shown
        assert "mean ± standard deviation over seeds:" in shown
        assert "| 15.00 ± 2 |" in render({"trend": series}, "md")
    assert checkpoints(frame(as_models), "org/m-160m-seed2")["depth"].to_list() == [13.0, 15.0], "one by its own name"


def test_models_of_other_sizes_are_no_replicates_and_one_that_stopped_early_is_not_averaged(frame, read):
    rows = [read("m-seed1", depth=1.0, hidden_size=64), read("m-seed2", depth=2.0, hidden_size=128)]
    assert sorted(leaderboard(frame(rows))["model"]) == ["m-seed1", "m-seed2"]
    rows = [
        read(f"m-seed{seed}", revision=f"step{last}", checkpoint_step=last, depth=float(seed))
        for seed, last in ((1, 10), (2, 10), (3, 5))
    ]
    rows += [read(f"m-seed{seed}", "random", depth=0.5) for seed in (1, 2, 3)]
    (line,) = leaderboard(frame(rows)).to_dicts()
    assert (line["depth"], line["num_replicates"], line["deepening"]) == (1.5, 2, 1.0)
    assert (line["depth_random"], line["depth_random_spread"], line["num_seeds"]) == (0.5, None, 1)


def test_magnitudes_are_compared_by_decades_and_a_zero_as_the_smallest_that_is_not():
    assert on_scale("lambda_v", [0.0, 1e-3, 10.0]) == pytest.approx([-3.0, -3.0, 1.0])
    assert on_scale("scale_harmonic", [0.0, 0.0]) == [0.0, 0.0]
    assert on_scale("depth", [0.0, -1.0]) == [0.0, -1.0]


def test_what_cannot_be_a_trend_is_one_line_that_says_what_can(frame, read):
    reads = frame([read("a", depth=1.0), read("b", depth=1.0)])
    for metric in ("model", "seed", "nothing"):
        with pytest.raises(ResultsError) as refused:
            checkpoints(reads, "a", [metric])
        assert str(refused.value) == f"--metric '{metric}' is no numeric column of reads; choose {', '.join(METRICS)}"
    with pytest.raises(ResultsError) as refused:
        checkpoints(reads, "c")
    assert str(refused.value) == "--model 'c' has no finished read here; choose a, b"
    with pytest.raises(ResultsError, match="choose none$"):
        checkpoints(frame([read("a", status="failed")]), "a")
    with pytest.raises(ResultsError, match="^--model 'm' has no checkpoints here, only its random initialisation$"):
        checkpoints(frame([read("m", "random")]), "m")


def test_a_metric_beside_the_usual_ones_is_a_column_too(frame, read):
    series = checkpoints(frame([read("m", depth=1.0, eps=1e-5)]), "m", ["depth", "eps"])
    assert series["eps"].to_list() == [1e-5]
    assert series.columns.count("depth") == 1


def test_the_plot_has_a_panel_a_metric_with_its_change_point(series):
    table = checkpoints(series, "m")
    spec = trend_plot(table, summary(table), ["depth", "alignment", "lambda_v"])
    assert len(spec["concat"]) == 2
    assert [row["step"] for row in spec["datasets"]["depth_change"]] == [2048]


def test_parameter_reads_are_a_series_where_nothing_ran(frame, read):
    rows = [read("m", "parameters", revision=f"step{s}", checkpoint_step=s, num_zero_scales=s) for s in (2, 1)]
    assert checkpoints(frame(rows), "m")["num_zero_scales"].to_list() == [1, 2]
    with pytest.raises(ResultsError, match="only its random initialisation"):
        checkpoints(frame([read("m", "random")]), "m")


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ([1, 1, 1, 1], None),
        ([1, 1, 1], None),  # too few to tell
        ([0, 0, 5, 5, 5], 2),
        ([5, 0, 0, 0, 0], 1),
        ([0, 0, 0, 0, 5], 4),
        ([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], None),
        ([1.0, 1.0 + 1e-14, 1.0, 1.0 + 1e-14], None),
        ([1.0, float("inf"), 1.0, 1.0], None),
        ([0, 0, 0, 1e-3], 3),  # four are enough
        ([3, 3, 9, 9, 9, 9, 9, 9], 2),
        ([1e9, 1e9 + 5, 1e9 + 5, 1e9 + 5, 1e9 + 5], 1),  # of any size, above rounding
        ([1e9, 1e9, 1e9 + 0.4, 1e9 + 0.4], None),  # and below it
    ],
)
def test_change_point(values, place):
    assert change_point(np.array(values, float)) == place


def split_by_least_squares(values):
    """The definition, over all splits, in plain words; and by how much the criterion is met."""
    count, whole = len(values), sum((v - np.mean(values)) ** 2 for v in values)
    left = {
        place: sum(((part - part.mean()) ** 2).sum() for part in (values[:place], values[place:]))
        for place in range(1, count)
    }
    best = min(left, key=left.get)
    return best, count * np.log(whole / left[best]) / np.log(count)


def test_the_criterion_is_that_of_its_formula():
    generator, met = np.random.default_rng(0), []
    for count in range(4, 40):
        for size in (0.0, 1.0, 2.0):
            values = generator.normal(size=count) + size * (np.arange(count) >= count // 2)
            place, criterion = split_by_least_squares(values)
            met.append(criterion)
            assert change_point(values) == (place if criterion > 2 else None)
    assert any(2 < each < 3 for each in met), "a stricter one would be told from it"
    assert any(1 < each < 2 for each in met), "and a laxer one"


def test_a_value_that_is_none_leaves_no_change_point():
    values = np.r_[np.zeros(10), np.ones(10)]
    assert change_point(values) == 10
    assert change_point(np.where(np.arange(20) == 3, np.nan, values)) is None


def test_noise_alone_has_a_change_point_rarely():
    generator = np.random.default_rng(0)
    found = sum(change_point(generator.normal(size=50)) is not None for _ in range(400))
    # 2 log n is Yao's penalty: consistent, and at n = 50 a false alarm in some 5 to 20 % of pure noise.
    assert found < 100


def test_sparkline():
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([1, 1]) == "▁▁"
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1, 0]) == "██▇▆▅▄▃▂▁"
    assert sparkline([-1e9, -1e9 + 8, -1e9 + 16]) == "▁▅█"
    assert sparkline([-1e9, -1e9 + 0.5]) == "▁▁", "of that size it is rounding"
    assert sparkline([1.0, 1.0 - 1e-14]) == "▁▁"


@given(st.integers(2, 300), st.data())
def test_bisection_finds_the_first_failure_in_log_n_reads(count, data):
    first = data.draw(st.integers(1, count))
    asked = []

    def fails(i):
        asked.append(i)
        return i >= first

    assert first_failing(range(count), fails) == (first if first < count else None)
    assert len(asked) == len(set(asked)) <= 1 + math.ceil(math.log2(max(count - 1, 1)))
    assert first_failing([0], fails) is None
