"""What the plots draw: their rows, their axes and what they leave out; nothing here is turned into pixels."""

import itertools
from math import cos, dist, radians, sin

import polars as pl
import pytest

from deadbench.analysis.colours import DIRECTION_COLOURS
from deadbench.analysis.compare import compare
from deadbench.analysis.plots.comparison import comparison_plot
from deadbench.analysis.plots.models import depth_plot, predicted_plot
from deadbench.analysis.plots.movement import STILL, movement_plot
from deadbench.analysis.plots.norms import norms_plot
from deadbench.analysis.plots.positions import QUANTITIES, WITH, WITHOUT, positions_plot
from deadbench.analysis.plots.spectra import spectra_plot
from deadbench.analysis.plots.training import training_plot, trend_plot, turning_plot
from deadbench.analysis.results import scan
from deadbench.analysis.trend import checkpoints, summary
from deadbench.suite.schema import KEY, to_table


def table(name, rows):
    return pl.DataFrame(pl.from_arrow(to_table(name, rows))).lazy()


def key(row):
    return {name: row.get(name) for name in ["run_id", *KEY]}


def domain(spec, channel="x"):
    layers = spec.get("layer", [spec])
    return next(
        l["encoding"][channel]["scale"]["domain"] for l in layers if "domain" in l["encoding"][channel]["scale"]
    )


def test_depths_of_a_family_fill_its_axis_and_zero_scales_have_a_plot_of_their_own(frame, read):
    reads = frame([
        read("a", depth=13.07), read("b", depth=13.93), read("r", depth=0.1, family="rmsnorm"),
        read("zeroed", depth=76.0, num_zero_scales=2),
    ])  # fmt: skip
    low, high = domain(depth_plot(reads, "layernorm"))
    assert (low, high) == (pytest.approx(13.02, abs=0.01), pytest.approx(13.98, abs=0.01))
    assert [row["line"] for row in depth_plot(reads, learned=True)["datasets"]["depths"]] == ["zeroed"]
    assert {row["line"] for row in depth_plot(reads)["datasets"]["depths"]} == {"a", "b", "r"}
    assert depth_plot(reads, "none") is None


def test_seeds_are_one_point_with_their_spread_as_a_bar(frame, read):
    rows = [
        read(f"m-seed{seed}", revision=f"step{step}", checkpoint_step=step, depth=d + step, minute=step)
        for seed, d in ((1, 12.0), (2, 14.0))
        for step in (1, 2)
    ]
    (point,) = depth_plot(frame(rows))["datasets"]["depths"]
    assert (point["line"], point["depth"]) == ("m-seed*", 15.0)
    assert (point["low"], point["high"]) == (pytest.approx(15 - 2**0.5), pytest.approx(15 + 2**0.5))
    history = training_plot(frame(rows), "depth")["datasets"]["history"]
    assert [(row["step"], row["value"], row["high"]) for row in history] == [
        (1, 14.0, pytest.approx(14 + 2**0.5)), (2, 15.0, pytest.approx(15 + 2**0.5)),
    ]  # fmt: skip
    series = checkpoints(frame(rows), "m-seed*")
    drawn = trend_plot(series, summary(series), ["depth"])["datasets"]["depth"]
    assert [row["low"] for row in drawn] == pytest.approx([14 - 2**0.5, 15 - 2**0.5])


def test_seeds_turn_as_one_line_from_their_own_first_checkpoints(frame, read):
    turns = {("m-seed1", 1): 0, ("m-seed1", 2): 10, ("m-seed2", 1): 40, ("m-seed2", 2): 70, ("alone", 1): 0,
             ("alone", 2): 5, ("once", 1): 0}  # fmt: skip
    rows = [read(model, "parameters", revision=f"step{step}", checkpoint_step=step) for model, step in turns]
    norms = [
        key(row) | {"norm": "ln_f", "direction": [cos(radians(t)), sin(radians(t))]}
        for row, t in zip(rows, turns.values(), strict=True)
    ]
    drawn = turning_plot(frame(rows), table("norms", norms))["datasets"]["history"]
    found = {(row["line"], row["step"]): (row["value"], row["low"], row["high"]) for row in drawn}
    spread = 200**0.5  # of 10 and 30 degrees
    assert found["m-seed*", 2] == pytest.approx((20, 20 - spread, 20 + spread))
    assert found["m-seed*", 1] == pytest.approx((0, 0, 0))
    assert found["alone", 2] == (pytest.approx(5), None, None), "of one there is no bar"
    assert set(found) == {(line, step) for line in ("m-seed*", "alone") for step in (1, 2)}
    assert turning_plot(frame(rows[-1:]), table("norms", norms)) is None


def test_eigenvalues_of_zero_scales_lie_on_the_foot_and_hide_nothing(result_set, read):
    location = result_set([read("m", depth=76.0, lambda_v=1e-76)], {0: [1.0, 1e-3, 1e-76]})
    spec = spectra_plot(scan(location), scan(location, "spectra"))
    low, high = next(l for l in spec["layer"] if l["mark"]["type"] == "line")["encoding"]["y"]["scale"]["domain"]
    assert (low, high) == (1e-21, 2.0)
    assert spec["datasets"]["points"][-1]["value"] == 1e-76, "what one reads off is the value itself"


def test_predictions_are_of_kernels_and_stand_on_equal_axes(frame, read):
    reads = frame([
        read("a", depth=13.0, depth_predicted=13.2), read("a", "random", depth=12.5, depth_predicted=13.2),
        read("zeroed", depth=30.0, depth_predicted=30.0, num_zero_scales=1),
        read("r", depth=0.1, depth_predicted=0.1, family="rmsnorm"), read("unpredicted", depth=13.0),
    ])  # fmt: skip
    spec = predicted_plot(reads)
    assert [(row["line"], row["read"], row["measured"]) for row in spec["datasets"]["predicted"]] == [
        ("a", "random", 12.5), ("a", "trained", 13.0),
    ]  # fmt: skip
    points = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "point")
    assert points["encoding"]["x"]["scale"] == points["encoding"]["y"]["scale"]
    assert predicted_plot(frame([read("r", depth=0.1, family="rmsnorm")])) is None


def test_movement_shows_the_median_over_the_maps_and_draws_nothing_below_stillness(frame, read):
    row = read("m", "functional", dtype="float64")
    moved = [
        key(row) | {"site": site, "family": "layernorm", "direction": direction, "step": step, "kl": kl}
        for direction, kls in (("compensated", (0.0, 1e-34, 1e-30)), ("random", (1e-4, 1e-3, 1e-2)))
        for step in (0.1, 1.0)
        for site, kl in zip("abc", kls, strict=True)
    ]
    squared = read("n", "functional", dtype="float64")
    moved.append(key(squared) | {"site": "a", "family": "layernorm", "direction": "random", "step": 1.0,
                                 "output_change": 0.1})  # fmt: skip
    spec = movement_plot(frame([row, squared]), table("functional", moved), "layernorm")
    found = {(r["model"], r["direction"], r["step"]): r for r in spec["datasets"]["movement"]}
    assert found["m", "compensated", 0.1]["least"] == STILL
    assert found["m", "compensated", 0.1]["value"] == 1e-34
    assert (found["m", "random", 1.0]["value"], found["m", "random", 1.0]["maps"]) == (1e-3, 3)
    assert found["n", "random", 1.0]["value"] == pytest.approx(0.01)
    assert movement_plot(frame([row]), table("functional", moved), "rmsnorm") is None
    powers = {(each["order"], each["step"]): each["value"] for each in spec["datasets"]["powers"]}
    top = max(each["high"] for each in spec["datasets"]["movement"])
    assert powers["k = 2", 0.1] == pytest.approx(powers["k = 2", 1.0] * 1e-4)
    assert powers["k = 1", 1.0] == top


def test_models_that_were_read_with_and_without_first_positions_are_beside_each_other(frame, read):
    rows = [
        read("a", depth=13.0, massive_weight=0.0, skip_positions=0),
        read("a", depth=12.5, massive_weight=0.1, skip_positions=4, protocol="late", protocol_hash="late"),
        read("b", depth=11.0),  # an older row, of which nothing was left out
    ]
    taps = [key(rows[0]) | {"block": i, "sigma_min": s, "sigma_median": 2.0} for i, s in enumerate((0.2, 0.1))]
    taps += [key(rows[1]) | {"block": 0, "sigma_min": 0.4, "sigma_median": 2.0}]
    plots = {name: positions_plot(frame(rows), table("blocks", taps), name) for name in QUANTITIES}
    found = {
        name: {(each["model"], each["positions"]): each["value"] for each in spec["datasets"]["positions"]}
        for name, spec in plots.items()
    }
    assert found["depth"] == {("a", WITH): 13.0, ("a", WITHOUT): 12.5}, "b was read one way only"
    assert found["massive_weight"] == {("a", WITH): 0.0, ("a", WITHOUT): 0.1}
    assert found["sigma_min"] == {("a", WITH): pytest.approx(0.05), ("a", WITHOUT): pytest.approx(0.2)}
    assert positions_plot(frame(rows[2:]), table("blocks", []), "depth") is None
    assert positions_plot(frame(rows), table("blocks", taps), "depth", "rmsnorm") is None
    assert positions_plot(frame(rows), table("blocks", taps), "depth", "layernorm") == plots["depth"]
    below, above = plots["depth"]["layer"][1]["encoding"]["size"]["scale"]["range"]
    assert above < below / 2, "where nothing moves both points are seen"


def test_no_two_directions_have_one_colour():
    rgb = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in DIRECTION_COLOURS.values()]
    assert min(dist(one, other) for one, other in itertools.combinations(rgb, 2)) > 40


def test_norms_are_placed_by_block_with_zero_scales_marked(frame, read):
    row = read("m", "parameters")
    names = [("embed.LayerNorm", "embedding"), *((f"h.{i}.ln_1", "block") for i in (0, 2, 10)), ("ln_f", "final")]
    norms = [
        key(row) | {"norm": norm, "role": role, "family": "layernorm", "scale_min": 0.5, "scale_median": 1.0}
        for norm, role in names
    ]
    norms[-1] |= {"scale_min": 0.0, "num_zero_scales": 1}
    spec = norms_plot(frame([row]), table("norms", norms))
    rows = {r["norm"]: (r["kind"], r["place"], r["value"]) for r in spec["datasets"]["norms"]}
    assert rows["h.10.ln_1"] == ("m ln_1", "10", 0.5)
    assert rows["ln_f"] == ("m outside blocks", "final", 1e-5)
    assert spec["layer"][0]["encoding"]["x"]["sort"] == ["embedding", "0", "2", "10", "final"]
    assert norms_plot(frame([row]), table("norms", [])) is None


def test_a_comparison_is_drawn_candidate_over_baseline(frame, read):
    sides = [frame([read("a", depth=a, num_tokens=800), read("b", depth=b)]) for a, b in ((13.0, 5.0), (12.0, 5.0))]
    spec = comparison_plot(compare(*sides))
    points = {r["model"]: (r["baseline"], r["candidate"], r["verdict"]) for r in spec["datasets"]["comparison"]}
    assert points == {"a": (13.0, 12.0, "changed"), "b": (5.0, 5.0, "same")}
    (a, b) = spec["datasets"]["changes"]
    assert (a["name"], a["change"]) == ("a trained", -1.0), "the largest change first"
    assert a["low"] < -1.0 < a["high"] < 0
    assert b["low"] is None, "of noise that is not known there is no bar"
    assert comparison_plot(compare(*sides), "alignment") is None
