import re

import altair as alt
import pytest
import vl_convert

from deadbench.analysis.colours import TONES
from deadbench.analysis.leaderboard import FAMILIES
from deadbench.analysis.plots.axes import MAX_TICKS, foot, linear_axis, powers
from deadbench.analysis.plots.channels import tones


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1e-14, 3.0, [1e-12, 1e-9, 1e-6, 1e-3, 1.0]),
        (0.05, 0.9, [0.05, 0.1, 0.2, 0.5]),
        (1.0, 1000.0, [1.0, 10.0, 100.0, 1000.0]),
        (1e-14, 5e-14, [1e-14, 2e-14, 5e-14]),
    ],
)
def test_few_ticks_at_powers_of_ten(low, high, ticks):
    assert powers(low, high) == ticks


@pytest.mark.parametrize("exponent", [1, 2, 3, 7, 19, 76, 300])
def test_never_many_ticks(exponent):
    assert 1 <= len(powers(10.0**-exponent, 2.0)) <= MAX_TICKS


def test_what_is_far_below_everything_is_drawn_at_a_foot():
    assert foot([1e-76, 1e-3, 1.0]) == 1e-20
    assert foot([1e-13, 1.0]) == 1e-13


def test_depths_are_shown_at_their_own_size():
    low, high = linear_axis([13.07, None, 13.93])["scale"].domain
    assert (round(low, 2), round(high, 2)) == (13.02, 13.98)
    low, high = linear_axis([13.0, 13.0 + 1e-9])["scale"].domain
    assert high - low == pytest.approx(0.5), "rounding is drawn as a level"
    assert linear_axis([0.0, 3.0])["scale"].domain[0] == 0, "what is never negative has no negative axis"


def test_round_tens_are_written_out():
    degrees = [0.0, 20.0, 40.0, 60.0, 75.5]
    plot = alt.Chart(alt.Data(values=[{"y": y} for y in degrees])).mark_point().encode(
        y=alt.Y("y:Q", **linear_axis(degrees))
    )  # fmt: skip
    drawn = vl_convert.vegalite_to_svg(plot.to_dict())
    assert re.findall(r">(\d[^<]*)</text>", drawn) == ["0", "20", "40", "60", "80"]


def test_a_model_is_a_tone_of_its_family_and_has_a_colour_of_its_own():
    lines = [(f"l{i}", f"l{i}", "layernorm") for i in range(3)] + [("r (quick)", "r", "rmsnorm")]
    found = tones(lines)
    assert [found[f"l{i}"] for i in range(3)] == list(TONES["layernorm"][:3])
    assert found["r"] == found["r (quick)"] == TONES["rmsnorm"][0]
    assert list(TONES) == list(FAMILIES)
    assert len({tone for each in TONES.values() for tone in each}) == sum(map(len, TONES.values()))
