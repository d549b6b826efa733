import pytest

from deadbench.analysis.formats import render
from deadbench.analysis.leaderboard import COLUMNS, SORTABLE, leaderboard
from deadbench.analysis.plots.models import depth_plot
from deadbench.analysis.plots.training import training_plot
from deadbench.analysis.results import ResultsError


def board(frame, rows, *columns, **options):
    return leaderboard(frame(rows), **options).select(columns).rows()


def test_a_model_is_its_last_checkpoint_beside_its_random_read(frame, read):
    rows = [
        read("m", "random", depth=10.0),
        read("m", revision="step0", checkpoint_step=0, depth=10.5, minute=3),
        read("m", revision="step512", checkpoint_step=512, depth=13.0, minute=1),
        read("m", revision="step16", checkpoint_step=16, depth=11.0, minute=2),
    ]
    line = leaderboard(frame(rows))
    assert line.columns == COLUMNS
    (line,) = line.to_dicts()
    assert (line["rank"], line["revision"], line["read"]) == (1, "step512", "trained")
    assert (line["depth"], line["depth_random"], line["deepening"]) == (13.0, 10.0, 3.0)


def test_without_a_trained_read_the_random_one_speaks(frame, read):
    rows = [read("m", "random", depth=10.0), read("m", status="failed", dtype=None, error="no memory")]
    shown = board(frame, rows, "read", "depth", "depth_random", "deepening", "status", "error")
    assert shown == [("random", 10.0, 10.0, None, "ok", None)]


def test_deepening_needs_equal_protocol_and_dtype(frame, read):
    rows = [
        read("m", "random", depth=10.0),
        read("m", "random", depth=3.0, dtype="bfloat16", engine="vllm"),
        read("m", depth=4.0, dtype="bfloat16"),
        read("m", depth=5.0, protocol="quick", protocol_hash="q"),
    ]
    shown = board(frame, rows, "protocol", "dtype", "depth", "deepening", sort="model")
    assert sorted(shown) == [
        ("quick", "float32", 5.0, None),
        ("standard", "bfloat16", 4.0, 1.0),
        ("standard", "float32", 10.0, None),
    ]


def test_ties_share_a_rank_and_missing_values_come_last(frame, read):
    depths = {"none": None, "nan": float("nan"), "b": 12.0, "a": 12.0, "c": 11.0, "top": 13.0}
    rows = [read(model, depth=depth) for model, depth in depths.items()]
    assert board(frame, rows, "rank", "model") == [
        (1, "top"), (2, "a"), (2, "b"), (4, "c"), (None, "nan"), (None, "none"),
    ]  # fmt: skip


def test_ranks_count_within_a_group_and_larger_groups_come_first(frame, read):
    rows = [
        read("deep", depth=30.0, dtype="float64"),
        read("a", depth=5.0, dtype="bfloat16"),
        read("b", depth=6.0, dtype="bfloat16"),
        read("unranked", depth=None, dtype="float16"),
        read("z", depth=9.0, dtype="float32"),
    ]
    assert board(frame, rows, "dtype", "rank", "model") == [
        ("bfloat16", 1, "b"), ("bfloat16", 2, "a"), ("float32", 1, "z"), ("float64", 1, "deep"),
        ("float16", None, "unranked"),
    ]  # fmt: skip


def test_parameters_only_and_failed_models_are_listed(frame, read):
    rows = [
        read("broken", status="failed", dtype=None, family=None, error="older", minute=0),
        read("broken", "random", status="failed", dtype=None, family=None, error="no memory", minute=1),
        read("paper", "parameters", revision="step1", checkpoint_step=1, depth_predicted=13.0, dtype="float16"),
        read("paper", "parameters", revision="step2", checkpoint_step=2, depth_predicted=14.0, dtype="float16"),
        read("read", "parameters", depth_predicted=13.5, dtype="float16"),
        read("read", "random", depth=13.0),
    ]
    assert board(frame, rows, "rank", "model", "read", "depth", "depth_predicted", "status", "error") == [
        (1, "read", "random", 13.0, None, "ok", None),
        (None, "paper", "parameters", None, 14.0, "ok", None),
        (None, "broken", "random", None, None, "failed", "no memory"),
    ]


def test_the_family_is_what_was_measured(frame, read):
    rows = [read("m", depth=1.0, family="rmsnorm", family_expected="layernorm"), read("n", depth=2.0)]
    assert board(frame, rows, "model", "family", "rank", family="rmsnorm") == [("m", "rmsnorm", 1)]


@pytest.mark.parametrize("sort", SORTABLE)
def test_every_sortable_column_ranks(frame, read, sort):
    rows = [read("small", depth=1.0), read("large", depth=1.0)]
    if sort == "deepening_as_executed":
        rows = [
            read(m, r, depth_as_executed=d)
            for m, r, d in [
                ("small", "trained", 1.0),
                ("large", "trained", 2.0),
                ("small", "random", 1.5),
                ("large", "random", 1),
            ]
        ]
    elif sort in ("depth_random", "deepening"):
        rows += [read("small", "random", depth=3.0), read("large", "random", depth=3.0)]
        rows[1]["depth"] = 2.0
        rows[3]["depth"] = 3.0 if sort == "depth_random" else 2.0
        rows[2]["depth"] = 2.0 if sort == "depth_random" else 3.0
    else:
        rows[0][sort], rows[1][sort] = 1, 2
    assert board(frame, rows, "rank", "model", sort=sort) == [(1, "large"), (2, "small")]


def test_sorted_by_name_the_rank_stays_that_of_the_depth(frame, read):
    rows = [read("b", depth=3.0), read("a", depth=1.0), read("c", depth=2.0)]
    assert board(frame, rows, "model", "rank", sort="model") == [("a", 3), ("b", 1), ("c", 2)]


def test_learned_directions_are_listed_below_without_a_rank(frame, read):
    rows = [
        read("kernel", depth=13.0, kernel_exact=True, num_zero_scales=0),
        read("zeroed", depth=29.5, kernel_exact=False, num_zero_scales=1),
        read("deeper zero", depth=30.0, kernel_exact=None, num_zero_scales=2),
        read("said to be exact", depth=28.7, kernel_exact=True, num_zero_scales=3),
        read("small scale", depth=8.0, kernel_exact=False, num_zero_scales=0, family="rmsnorm"),
        read("control", depth=0.2, kernel_exact=False, num_zero_scales=0, family="rmsnorm"),
        read("untold", depth=12.0),
        read("elsewhere", depth=5.0, dtype="bfloat16", kernel_exact=True),
    ]
    assert board(frame, rows, "rank", "model", "kernel") == [
        (1, "kernel", "algebraic"), (2, "untold", None), (3, "control", "none"), (None, "deeper zero", "learned"),
        (None, "zeroed", "learned"), (None, "said to be exact", "learned"), (None, "small scale", "learned"),
        (1, "elsewhere", "algebraic"),
    ]  # fmt: skip
    zeros = board(frame, rows, "rank", "model", sort="num_zero_scales")
    assert zeros[:3] == [(1, "said to be exact"), (2, "deeper zero"), (3, "zeroed")], "what else ranks, ranks all"
    by_name = dict(board(frame, rows, "model", "rank", sort="model"))
    assert (by_name["kernel"], by_name["zeroed"]) == (1, None)


def test_zero_scales_are_explained_in_every_format(frame, read):
    rows = [read("zeroed", depth=28.7, kernel_exact=True, num_zero_scales=3), read("plain", depth=13.0)]
    for format in ("md", "html"):
        page = render({"leaderboard": leaderboard(frame(rows))}, format)
        assert "zero scales: zeroed (3). Each is a dead direction that training closed" in page
        assert "exact yes says only" in page
    assert "zero scales" not in render({"leaderboard": leaderboard(frame(rows[1:]))}, "md")
    assert "protocol standard, dtype float32, learned directions" in render({"b": leaderboard(frame(rows))}, "html")


def test_uncertainty_stands_beside_the_depths(frame, read):
    rows = [read("m", "random", seed=s, depth=d) for s, d in enumerate((12.0, 13.0, 14.0))]
    rows += [read("m", depth=13.984, depth_standard_error=0.0541), read("n", depth=12.0)]
    found = leaderboard(frame(rows))
    assert found.select("depth_standard_error", "depth_random", "depth_random_spread", "num_seeds").rows() == [
        (0.0541, 13.0, 1.0, 3), (None, None, None, None),
    ]  # fmt: skip
    for page in (render({"leaderboard": found}, format) for format in ("md", "html")):
        assert "13.98 ± 0.054" in page
        assert "13.00 ± 1" in page
        assert "12.00 ±" not in page
        assert "standard error" not in page
    assert '"depth_standard_error": 0.0541' in render({"leaderboard": found}, "json")


def test_error_bars_are_drawn_where_errors_are_known(frame, read):
    def layers(spec):
        return [layer["mark"]["type"] for layer in spec.get("layer", [])]

    steps = [read("m", revision=f"step{s}", checkpoint_step=s, depth=13.0, minute=s) for s in (1, 2)]
    assert layers(depth_plot(frame(steps))) == ["line", "point"]
    assert "layer" not in training_plot(frame(steps), "depth")
    known = [row | {"depth_standard_error": 0.5} for row in steps]
    assert layers(depth_plot(frame(known))) == ["line", "rule", "point"]
    spec = training_plot(frame(known), "depth")
    assert layers(spec) == ["rule", "line"]
    assert [(row["low"], row["high"]) for row in spec["datasets"]["history"]] == [(12.5, 13.5)] * 2


def test_unknown_requests_name_what_is_allowed(frame, read):
    with pytest.raises(ResultsError, match=r"--sort 'family' is unknown; choose depth, .*model"):
        leaderboard(frame([read()]), sort="family")
    with pytest.raises(ResultsError, match="--family 'groupnorm' is unknown; choose layernorm, rmsnorm"):
        leaderboard(frame([read()]), family="groupnorm")


def test_no_rows(frame):
    empty = leaderboard(frame([]))
    assert empty.is_empty()
    assert empty.columns == COLUMNS
