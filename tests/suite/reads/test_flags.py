"""Each flag, from the row that has it and one that has not."""

import pytest

from deadbench.suite.reads.flags import FLAGS, flags

FORWARD = {"lambda_v": 1e-14, "depth": 13.0, "depth_limit": 30.0, "depth_standard_error": 0.1, "input": "text"}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"num_zero_scales": 2}, "zero-scales"),
        ({"depth": 30.0}, "depth-at-limit"),
        ({"depth_standard_error": None}, "few-sequences"),
        ({"stream_centred": True}, "centred-stream"),
        ({"massive_coordinates": [7]}, "massive-activations"),
        ({"input": "tokens:random"}, "random-input"),
        ({"input": "text (with pixel_values made up)"}, "random-input"),
        ({"skip_positions": 4}, "positions-left-out"),
        ({"flags": ["tf32"]}, "tf32"),
    ],
)
def test_a_flag_says_one_thing(changed, name):
    assert flags(FORWARD, [{"rank_limited": False}]) == []
    assert flags(FORWARD | changed, [{"rank_limited": False}]) == [name]


def test_taps_that_are_rank_limited_are_said_of_the_read():
    assert flags(FORWARD, [{"rank_limited": True}, {"rank_limited": False}]) == ["rank-limited"]


def test_flags_are_in_one_order_and_once():
    given = {"flags": ["tf32", "quantised", "tf32"], "num_zero_scales": 1}
    assert flags(FORWARD | given, []) == ["zero-scales", "quantised", "tf32"]
    assert set(flags(FORWARD | given, [])) <= set(FLAGS)


def test_a_read_without_a_forward_pass_has_no_flags_of_one():
    assert flags({"num_zero_scales": 0, "input": None}, []) == []
