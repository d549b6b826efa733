import math

import polars as pl
import pytest

from deadbench.analysis.claims import CLAIMS
from deadbench.analysis.families import SCHEMA, collapsed_blocks, confusion, families
from deadbench.analysis.results import scan
from deadbench.suite.schema import KEY, to_table


def claim(frame, rows, claim_id):
    table = families(frame(rows))
    assert dict(table.schema) == SCHEMA
    assert table["claim"].to_list() == list(CLAIMS)
    return table.filter(claim=claim_id).to_dicts()[0]


LAYER, RMS, RANDOM = {"family": "layernorm"}, {"family": "rmsnorm"}, {"read": "random"}
EXACT = {"kernel_exact": True, "precision_slope": 1.0, "num_zero_scales": 0}
INEXACT = {"kernel_exact": False, "precision_slope": 0.0, "num_zero_scales": 0}

# claim, what every row has, a row that holds it, one that does not, the value of each
ONE_READ = [
    ("layernorm-random-aligned", LAYER | RANDOM, {"alignment": 0.99995}, {"alignment": 0.9999}, 0.99995, 0.9999),
    ("rmsnorm-random-unaligned", RMS | RANDOM, {"alignment": 0.1}, {"alignment": 0.99999}, 0.1, 0.99999),
    ("layernorm-kernel-contained", LAYER, {"containment": 0.9999}, {"containment": 0.5}, 0.9999, 0.5),
    ("layernorm-kernel-exact", LAYER, EXACT, INEXACT, 1.0, 0.0),
    ("rmsnorm-kernel-inexact", RMS, INEXACT, EXACT, 0.0, 1.0),
    ("depth-predicted", LAYER | {"depth": 13.0}, {"depth_predicted": 13.5}, {"depth_predicted": 12.25}, 0.5, -0.75),
    ("blocks-preserved", RMS, {"blocks_preserved": True, "worst_block_ratio": 0.9},
     {"blocks_preserved": False, "worst_block_ratio": 0.2}, 0.9, 0.2),
    ("classified", {"read": "parameters", "family_expected": "layernorm"}, LAYER, RMS, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("claim_id", "common", "good", "bad", "good_value", "bad_value"), ONE_READ)
def test_claim_holds_fails_and_is_untested(frame, read, claim_id, common, good, bad, good_value, bad_value):
    rows = [read("good", **{"read": "trained"} | common | good), read("bad", **{"read": "trained"} | common | bad)]
    held = claim(frame, rows[:1], claim_id)
    assert (held["num_models"], held["num_hold"], held["holds"], held["failing"]) == (1, 1, True, [])
    assert held["value_median"] == good_value

    both = claim(frame, rows, claim_id)
    assert (both["num_models"], both["num_hold"], both["holds"], both["failing"]) == (2, 1, False, ["bad"])
    if good_value is not None:
        assert (both["value_min"], both["value_max"]) == tuple(sorted((good_value, bad_value)))

    # Nothing measured: neither held nor failed.
    none = claim(frame, [read("m", **{"read": "trained"} | common | {"family_expected": None})], claim_id)
    assert (none["num_models"], none["num_hold"], none["holds"], none["value_median"]) == (0, 0, None, None)


def test_token_errors_of_both_reads_enter_a_difference(frame, read):
    spectrum = {"lambda_mean": 1.0, "depth_limit": 28.0}
    rows = [
        read("m", "random", lambda_v=1e-13, lambda_v_standard_error=0.03, **spectrum),
        read("m", lambda_v=1e-16, lambda_v_standard_error=0.04, **spectrum),
    ]
    assert claim(frame, rows, "layernorm-deepens")["value_token_error"] == pytest.approx(0.05)
    assert claim(frame, rows, "layernorm-kernel-exact")["value_token_error"] is None


def test_deepening_is_random_over_trained_at_the_last_checkpoint(frame, read):
    spectrum = {"lambda_mean": 1.0, "depth_limit": 28.0}
    rows = [
        read("m", "random", lambda_v=1e-13, **spectrum),
        read("m", revision="step9", checkpoint_step=9, lambda_v=1e-16, **spectrum),
        read("m", revision="step1", checkpoint_step=1, lambda_v=1e-10, minute=1, **spectrum),
        read("up", "random", lambda_v=1e-13, **spectrum),
        read("up", lambda_v=1e-12, **spectrum),
        read("alone", lambda_v=1e-12, **spectrum),
        read("other dtype", "random", lambda_v=1e-13, dtype="bfloat16", **spectrum),
        read("other dtype", lambda_v=1e-15, **spectrum),
    ]
    row = claim(frame, rows, "layernorm-deepens")
    assert (row["num_models"], row["num_hold"], row["failing"]) == (2, 1, ["up"])
    assert row["value_max"] == pytest.approx(3.0)
    assert row["value_min"] == pytest.approx(-1.0)


def test_an_unresolved_lambda_v_is_cut_like_the_depth_and_never_infinite(frame, read):
    spectrum = {"lambda_mean": 1.0, "depth_limit": 28.0}
    rows = [read("m", "random", lambda_v=1e-13, **spectrum), read("m", lambda_v=0.0, **spectrum)]
    assert claim(frame, rows, "layernorm-deepens")["value_max"] == pytest.approx(15.0)
    rows = [read("m", "random", lambda_v=1e-13), read("m", lambda_v=0.0)]  # no limit known: not testable
    assert claim(frame, rows, "layernorm-deepens")["holds"] is None


def test_more_dead_directions(frame, read):
    rows = [
        read("more", "random", num_dead_1e6=1), read("more", num_dead_1e6=3),
        read("same", "random", num_dead_1e6=1, **RMS), read("same", num_dead_1e6=1, **RMS),
    ]  # fmt: skip
    row = claim(frame, rows, "more-dead-directions")
    assert (row["num_models"], row["num_hold"], row["failing"], row["value_max"]) == (2, 1, ["same"], 2.0)


def test_zero_scales_carry_no_claim_of_exactness_and_two_none_of_alignment(frame, read):
    rows = [read("m", num_zero_scales=1, kernel_exact=False), read("m", "random", num_zero_scales=2, alignment=0.7)]
    assert claim(frame, rows, "layernorm-kernel-exact")["num_models"] == 0
    assert claim(frame, rows, "layernorm-random-aligned")["num_models"] == 0


def test_a_model_holds_when_all_its_reads_do_and_counts_once_a_protocol(frame, read):
    rows = [
        read("m", "random", kernel_exact=True), read("m", kernel_exact=False),
        read("m", "random", kernel_exact=True, protocol="quick", protocol_hash="q"),
    ]  # fmt: skip
    row = claim(frame, rows, "layernorm-kernel-exact")
    assert (row["num_models"], row["num_hold"], row["failing"]) == (2, 1, ["m"])


def test_failed_reads_test_nothing_and_nothing_is_infinite(frame, read):
    rows = [
        read("m", "random", alignment=0.1, status="failed"),
        read("n", "random", alignment=float("nan")),
        read("o", kernel_exact=True, precision_slope=float("inf"), num_zero_scales=0),
    ]
    table = families(frame(rows))
    values = table.select("value_median", "value_min", "value_max").rows()
    assert all(value is None or math.isfinite(value) for row in values for value in row)
    assert table["num_models"].sum() == 1


def test_no_rows(frame):
    table = families(frame([]))
    assert table["num_models"].to_list() == [0] * len(CLAIMS)
    assert table["holds"].to_list() == [None] * len(CLAIMS)


def test_margins_are_signed_distances_to_the_threshold(frame, read):
    rows = [read("near", containment=0.99995), read("far", containment=0.9)]
    assert claim(frame, rows, "layernorm-kernel-contained")["value_margin"] == pytest.approx(0.9 - 0.9999)
    assert claim(frame, rows[:1], "layernorm-kernel-contained")["value_margin"] == pytest.approx(5e-5)


def test_seeds_count_once_and_their_spread_is_pooled(frame, read):
    rows = [read("m", "random", seed=s, alignment=a) for s, a in enumerate((0.99996, 0.99998, 1.0))]
    rows += [read("one", "random", alignment=0.99999)]
    row = claim(frame, rows, "layernorm-random-aligned")
    assert (row["num_models"], row["num_hold"], row["num_seeds"]) == (2, 2, 3)
    assert row["value_seed_spread"] == pytest.approx(2e-5, rel=1e-6)
    assert row["value_median"] == pytest.approx((0.99998 + 0.99999) / 2)
    rows[0]["alignment"] = 0.5
    assert claim(frame, rows, "layernorm-random-aligned")["failing"] == ["m"]
    assert claim(frame, rows[3:], "layernorm-random-aligned")["value_seed_spread"] is None


def test_deepening_is_against_the_mean_of_the_random_seeds(frame, read):
    spectrum = {"lambda_mean": 1.0, "depth_limit": 28.0}
    rows = [
        read("m", "random", seed=s, lambda_v=v, depth_predicted=13.0, **spectrum) for s, v in ((0, 1e-12), (1, 1e-14))
    ]
    rows += [read("m", lambda_v=1e-15, depth_predicted=14.75, **spectrum)]
    assert claim(frame, rows, "layernorm-deepens")["value_median"] == pytest.approx(2.0)
    assert claim(frame, rows, "deepening-predicted")["value_median"] == pytest.approx(-0.25)


@pytest.mark.parametrize("count", [*range(1, 60), 100, 250])
def test_the_interval_of_the_median_covers_95_percent_and_is_none_where_it_cannot(frame, read, count):
    """Exact: the k-th values from either end miss the median with probability 2 P(Binomial(n, 1/2) < k)."""
    rows = [read(f"m{i}", containment=float(i)) for i in range(count)]
    row = claim(frame, rows, "layernorm-kernel-contained")
    if row["value_low"] is None:
        assert 2 * 0.5**count > 0.05
        return
    place = int(row["value_low"]) + 1
    assert row["value_high"] == count - place
    missed = 2 * sum(math.comb(count, below) for below in range(place)) / 2**count
    assert missed <= 0.05


def test_twins_are_told_by_their_names_and_compared_at_the_same_checkpoint(frame, read):
    rows = [
        read("twin-layernorm", "random", depth=13.0), read("twin-rmsnorm", "random", depth=1.0, **RMS),
        read("twin-layernorm", depth=13.5, checkpoint_step=9),
        read("twin-rmsnorm", depth=10.5, checkpoint_step=9, **RMS),
        read("alone-layernorm", depth=2.0), read("gpt2", depth=2.0),
    ]  # fmt: skip
    row = claim(frame, rows, "twins-separate")
    assert (row["num_models"], row["num_hold"], row["failing"]) == (1, 0, ["twin-layernorm"])
    assert (row["value_min"], row["value_max"]) == (3.0, 12.0)


def test_confusion_counts_models_by_what_was_expected_and_found(frame, read):
    told = {"read": "parameters", "family_expected": "layernorm"}
    rows = [
        read("a", **told),
        read("b", **told),
        read("c", **told | RMS),
        read("d", **told | RMS | {"family_expected": "rmsnorm"}),
    ]
    rows += [read("a", revision="step2", **told), read("unknown", "parameters")]
    assert confusion(frame(rows)).to_dicts() == [
        {"expected": "layernorm", "layernorm": 2, "rmsnorm": 1},
        {"expected": "rmsnorm", "layernorm": 0, "rmsnorm": 1},
    ]
    assert confusion(frame([])).is_empty()


def test_a_collapsed_block_is_pinpointed_and_an_older_run_is_not(result_set, read):
    rows = [read("m", run_id="old"), read("m", run_id="new", minute=1)]
    tap = {"block": 3, "state": "collapsed", "ratio": 0.01, "bottom_coordinates": [7], "bottom_weights": [0.99]}
    location = result_set(rows, blocks={0: [tap | {"block": 5}], 1: [tap, {"block": 4, "state": "preserved"}]})
    (row,) = collapsed_blocks(scan(location), scan(location, "blocks")).to_dicts()
    assert (row["model"], row["block"], row["bottom_coordinates"]) == ("m", 3, [7])


def test_any_number_of_result_sets_is_one(result_set, read):
    places = [result_set([read(model, containment=1.0)], name=model) for model in "abc"]
    (row,) = families(scan([*places, places[0]])).filter(claim="layernorm-kernel-contained").to_dicts()
    assert row["num_models"] == 3


def test_deepening_as_executed_belongs_to_the_dtype_of_the_model(frame, read):
    spectrum = {"lambda_mean": 2.0, "depth_limit": 28.0, "lambda_v": 1e-14, "dtype": "bfloat16"}
    rows = [
        read("m", "random", depth_as_executed=4.0, **spectrum), read("m", depth_as_executed=5.0, **spectrum),
        read("old", "random", **spectrum), read("old", **spectrum),
    ]  # fmt: skip
    executed, replayed = (claim(frame, rows, f"layernorm-deepens{name}") for name in ("-as-executed", ""))
    assert (executed["num_models"], executed["holds"]) == (1, True)
    assert executed["value_median"] == pytest.approx(1.0)
    assert (replayed["num_models"], replayed["holds"]) == (2, False)
    assert "dtype that it ran in" in executed["statement"]
    assert "float32" in replayed["statement"]


def test_an_rmsnorm_of_a_centred_stream_is_no_control_and_counted_apart(frame, read):
    rows = [
        read("plain", depth=1.0, kernel_exact=False, precision_slope=0.0, stream_centred=False, **RMS),
        read("centred", depth=13.0, kernel_exact=False, precision_slope=0.0, stream_centred=True, **RMS),
        read("old", depth=1.0, kernel_exact=False, precision_slope=0.0, **RMS),
    ]
    control, apart = (claim(frame, rows, f"rmsnorm-{name}") for name in ("inverse-scale-alive", "centred-kernel"))
    assert (control["num_models"], control["holds"]) == (2, True)
    assert (apart["num_models"], apart["holds"], apart["value_median"]) == (1, True, 13.0)
    assert claim(frame, rows, "rmsnorm-kernel-inexact")["num_models"] == 2


def test_orders_of_directions_are_judged_by_their_worst(frame, read):
    reads = [read(name, "functional", dtype="float64", family=None) for name in ("good", "bad", "old")]

    def rows(row, verdicts, orders):
        key = {name: row.get(name) for name in ["run_id", *KEY]}
        directions = ("compensated", "random", "planted-unit")
        return [
            key
            | {"site": "a", "direction": d, "step": t, "kl": 1e-3, "output_change": 1.0, "verdict": v, "kl_order": k}
            for d, v, k in zip(directions, verdicts, orders, strict=True)
            for t in (0.001, 0.1)
        ]

    moved = rows(reads[0], ("gauge", "regular", "singular"), (None, 1.01, 1.99))
    moved += rows(reads[1], ("regular", "unresolved", "unresolved"), (1.0, 1.3, 1.5))
    moved += rows(reads[2], (None, None, None), (None, None, None))
    table = families(frame(reads), pl.DataFrame(pl.from_arrow(to_table("functional", moved))).lazy())
    for name, value in (
        ("layernorm-directions-gauge", 0.5), ("random-directions-regular", 0.155), ("dead-units-singular", 1.745),
    ):  # fmt: skip
        (row,) = table.filter(claim=name).to_dicts()
        assert (row["num_models"], row["num_hold"], row["failing"]) == (2, 1, ["bad"]), name
        assert row["value_median"] == pytest.approx(value), name
