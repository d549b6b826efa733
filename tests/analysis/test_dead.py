"""Dead directions one by one, and over training: by hand on small result sets, and on MiniLM's stored reads."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from deadbench.analysis.dead import dead_directions
from deadbench.analysis.families import dead_parameters, families
from deadbench.analysis.leaderboard import leaderboard
from deadbench.analysis.results import scan
from deadbench.analysis.trajectory import angle, between, trajectory
from deadbench.analysis.trend import checkpoints
from deadbench.suite.schema import KEY, to_table

STORED = Path(__file__).parents[1] / "data"
ARCHITECTURE = {"final_norm": "norm", "hidden_size": 4, "num_blocks": 2, "num_parameters": 100}


def tables(rows, **others):
    """Lazy tables; `others` holds (index of a row of `reads`, columns) pairs by table."""
    found = [pl.DataFrame(pl.from_arrow(to_table("reads", rows))).lazy()]
    for name in ("norms", "spectra", "blocks"):
        entries = [{k: rows[i].get(k) for k in ("run_id", *KEY)} | columns for i, columns in others.get(name, [])]
        found.append(pl.DataFrame(pl.from_arrow(to_table(name, entries))).lazy())
    return found


def norm(zeros=(), direction=None, name="norm"):
    return {"norm": name, "role": "final", "scale_mean_square": 1.0, "num_zero_scales": len(zeros),
            "zero_coordinates": list(zeros), "zero_scales": [1e-6] * len(zeros), "direction": direction}  # fmt: skip


def output(coordinates, weights, verdict="learned"):
    return {"site": "final_norm", "eigenvalues": [1.0, 1.0, 1e-9], "verdicts": [verdict],
            "dead_coordinates": [coordinates], "dead_weights": [weights]}  # fmt: skip


def test_minilms_three_zero_scales_are_learned():
    found = dead_directions(*(scan(str(STORED / "minilm"), name) for name in ("reads", "norms", "spectra", "blocks")))
    assert found["coordinates"].to_list() == [[127], [223], [319]], "each once, though the spectrum has them too"
    assert set(found["verdict"]) == {"learned"}
    assert set(found["site"]) == {"encoder.layer.5.output.LayerNorm"}
    assert found["depth"].to_list() == pytest.approx([28.72, 28.72, 17.27], abs=0.01)


def test_without_the_parameters_the_spectrum_still_tells_them():
    reads, norms, spectra, blocks = (
        scan(str(STORED / "minilm"), name) for name in ("reads", "norms", "spectra", "blocks")
    )
    found = dead_directions(reads.filter(pl.col("read") == "trained"), norms, spectra, blocks)
    assert set(found["verdict"]) == {"learned"}
    assert {c for row in found["coordinates"] for c in row} == {127, 223, 319}


def test_which_checkpoints_and_which_runs_have_a_zero_scale(read):
    rows = [read("a", "parameters", revision=f"step{s}", checkpoint_step=s, **ARCHITECTURE) for s in (1, 2, 3)]
    rows += [read(m, "parameters", **ARCHITECTURE) for m in ("b", "c")]
    rows.append(read("d", "parameters", **ARCHITECTURE | {"num_blocks": 9}))
    rows.append(read("a", "random", num_zero_scales=0, **ARCHITECTURE))
    entries = [(0, norm()), (1, norm([2])), (2, norm([2, 3])), (3, norm([2])), (4, norm()), (5, norm([2, 3]))]
    found = dead_directions(*tables(rows, norms=entries)).filter(model="a").rows_by_key("model", named=True)["a"]
    by_coordinate = {row["coordinates"][0]: row for row in found}
    assert set(by_coordinate) == {2, 3}
    two, three = by_coordinate[2], by_coordinate[3]
    assert (two["opened_revision"], two["opened_step"], two["in_checkpoints"], two["num_checkpoints"]) == (
        "step2",
        2,
        2,
        3,
    )
    assert (three["opened_step"], three["in_checkpoints"]) == (3, 1)
    assert (two["in_runs"], two["num_runs"], three["in_runs"]) == (1, 2, 0), "d is another architecture"
    assert two["at_random"] is False
    assert two["depth"] == pytest.approx(12)
    assert len(dead_directions(*tables(rows, norms=entries), every=True).filter(model="a")) == 3


def test_seeds_share_what_lies_on_the_same_coordinates_and_what_is_spread_thin_cannot_tell(read):
    rows = [read("m", "random", seed=s, lambda_mean=1.0, depth_limit=30.0, **ARCHITECTURE) for s in (0, 1, 2)]
    rows.append(read("m", "trained", lambda_mean=1.0, depth_limit=30.0, **ARCHITECTURE))
    spectra = [(0, output([1, 2], [0.6, 0.4])), (1, output([2, 1], [0.5, 0.45])), (2, output([0], [1.0])),
               (3, output([1], [0.97]))]  # fmt: skip
    found = dead_directions(*tables(rows, spectra=spectra))
    assert found.filter(read="random").select("seed", "in_runs", "num_runs").rows() == [(0, 1, 2), (1, 1, 2), (2, 0, 2)]
    (trained,) = found.filter(read="trained").to_dicts()
    assert (trained["at_random"], trained["num_runs"]) == (True, 0)
    assert trained["depth"] == pytest.approx(9)
    thin = [(i, output([1, 2], [0.2, 0.2])) for i in range(3)]
    assert dead_directions(*tables(rows, spectra=thin))["in_runs"].to_list() == [None] * 3


def test_a_collapsed_block_is_listed_with_what_it_lost(read):
    rows = [read("m", "trained", **ARCHITECTURE), read("m", "random", **ARCHITECTURE)]
    tap = {"block": 2, "state": "collapsed", "sigma_min": 1e-4, "sigma_median": 1.0, "bottom_coordinates": [7],
           "bottom_weights": [0.99]}  # fmt: skip
    (row,) = dead_directions(*tables(rows, blocks=[(0, tap)])).to_dicts()
    assert (row["site"], row["coordinates"], row["verdict"], row["at_random"]) == ("block 2", [7], "collapsed", False)
    assert row["depth"] == pytest.approx(8)


def test_the_trajectory_turns_and_says_what_opened(read):
    steps = [0, 10, 20]
    rows = [read("m", "parameters", revision=f"step{s}", checkpoint_step=s, **ARCHITECTURE) for s in steps]
    along = [[1.0, 0.0], [-np.cos(0.1), -np.sin(0.1)], [0.0, 1.0]]
    entries = [(i, norm([3] if i == 2 else [], direction)) for i, direction in enumerate(along)]
    reads, norms, spectra, blocks = tables(rows, norms=entries)
    dead = dead_directions(reads, norms, spectra, blocks, every=True)
    found = trajectory(checkpoints(reads, "m"), "m", reads, norms, dead)
    assert found["angle"].to_list() == [None, pytest.approx(np.degrees(0.1)), pytest.approx(90 - np.degrees(0.1))]
    assert found["angle_from_first"].to_list() == pytest.approx([0, np.degrees(0.1), 90])
    assert found["opened"].to_list() == [None, None, ["norm: 3"]]


def test_training_seeds_turn_by_the_mean_of_their_angles_and_open_what_any_of_them_does(read):
    turns = {"m-seed1": 0.1, "m-seed2": 0.3}
    rows = [
        read(model, "parameters", revision=f"step{s}", checkpoint_step=s, **ARCHITECTURE)
        for model in turns
        for s in (0, 10)
    ]
    along = [[np.cos(turn), np.sin(turn)] for last in turns.values() for turn in (0.0, last)]
    entries = [(i, norm([3] if i == 3 else [], direction)) for i, direction in enumerate(along)]
    reads, norms, spectra, blocks = tables(rows, norms=entries)
    dead = dead_directions(reads, norms, spectra, blocks, every=True)
    found = trajectory(checkpoints(reads, "m-seed*"), "m-seed*", reads, norms, dead)
    assert found["angle"].to_list() == [None, pytest.approx(np.degrees(0.2))]
    assert found["opened"].to_list() == [None, ["norm: 3"]]
    one = trajectory(checkpoints(reads, "m-seed1"), "m-seed1", reads, norms, dead)
    assert one["angle"].to_list() == [None, pytest.approx(np.degrees(0.1))]
    assert one["opened"].to_list() == [None, None]


@pytest.mark.parametrize("size", [1e-12, 1e-8, 1e-3, 1.0])
def test_small_angles_are_kept(size):
    assert np.radians(angle(np.array([1.0, 0.0]), np.array([np.cos(size), np.sin(size)]))) == pytest.approx(size)


@pytest.mark.parametrize("other", [None, np.array([]), np.ones(3), np.array([1.0, np.nan])])
def test_directions_of_two_widths_have_no_angle(other):
    assert between(np.array([1.0, 0.0]), other) is None
    assert between(other, np.array([1.0, 0.0])) is None


def test_dead_parameters_stand_in_the_leaderboard_and_by_family(read):
    counted = {"dead_parameters": 5, "dead_parameters_share": 0.05}
    rows = [
        read("a", revision="step2", checkpoint_step=2, depth=1.0, **ARCHITECTURE),
        read("a", "parameters", revision="step2", checkpoint_step=2, **ARCHITECTURE, **counted),
        read("a", "parameters", revision="step1", checkpoint_step=1, **ARCHITECTURE, dead_parameters=1),
        read("b", "random", depth=1.0, **ARCHITECTURE, dead_parameters=9, dead_parameters_share=0.09),
        read("r", "parameters", **ARCHITECTURE | {"family": "rmsnorm"}, dead_parameters=0, dead_parameters_share=0.0),
    ]
    reads = tables(rows)[0]
    board = leaderboard(reads)
    assert dict(board.select("model", "dead_parameters").rows()) == {"a": 5, "b": 9, "r": 0}
    assert dead_parameters(reads).select("family", "num_models", "dead_parameters").rows() == [
        ("layernorm", 2, 14), ("rmsnorm", 1, 0),
    ]  # fmt: skip
    claims = {row["claim"]: row for row in families(reads).to_dicts()}
    assert claims["layernorm-dead-parameters"]["num_hold"] == 2
    assert claims["rmsnorm-no-dead-parameters"]["num_hold"] == 1


@pytest.mark.parametrize(("compensated", "holds"), [(1e-20, True), (1e-5, False)])
def test_moved_maps_are_judged_by_the_worst(read, compensated, holds):
    rows = [read("m", "functional", **ARCHITECTURE)]
    key = {name: rows[0].get(name) for name in ("run_id", *KEY)}
    moved = [
        key | {"site": site, "step": 1.0, "direction": direction, "kl": kl, "output_change": change}
        for site, value in (("head", 1e-30), ("inner", compensated))
        for direction, kl in (("compensated", value), ("uncompensated", 1.0), ("random", 1.0))
        for kl, change in ([(kl, 0.5)] if site == "head" else [(None, kl**0.5)])
    ]
    functional = pl.DataFrame(pl.from_arrow(to_table("functional", moved))).lazy()
    claims = {row["claim"]: row for row in families(tables(rows)[0], functional).to_dicts()}
    row = claims["layernorm-outputs-keep-still"]
    assert (row["num_models"], row["holds"]) == (1, holds)
    assert row["value_min"] == pytest.approx(-np.log10(compensated))
    assert claims["rmsnorm-outputs-move"]["num_models"] == 0


def test_the_command_filters_and_names_what_there_is(deadbench):
    code, out, _ = deadbench("dead", STORED / "minilm", "--verdict", "learned", "--format", "csv")
    assert (code, out.count("learned")) == (0, 3)
    code, out, _ = deadbench("dead", STORED / "quick", "--model", "twin-layernorm", "--verdict", "learned", "--json")
    assert (code, out) == (0, '{\n  "dead_directions": []\n}\n')
    for arguments in (("--model", "nobody"), ("--verdict", "dead")):
        code, out, error = deadbench("dead", STORED / "quick", *arguments)
        assert (code, out, error.count("\n")) == (2, "", 1)
