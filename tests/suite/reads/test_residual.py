"""Planted faults in synthetic residual streams: what fell, at which block, along which direction."""

import itertools

import numpy as np
import pytest
import torch

from deadbench.suite.reads.collapse import collapse_limit, is_nondecreasing
from deadbench.suite.reads.residual import ResidualRead

D, N, TAPS = 24, 24 * 16, 6


def stream(seed=0, dtype=torch.float32, tokens=N):
    """A random walk over taps, as blocks write to it: its smallest singular value grows slowly."""
    generator = torch.Generator().manual_seed(seed)
    taps = [torch.randn(tokens, D, generator=generator)]
    taps += [0.4 * torch.randn(tokens, D, generator=generator) for _ in range(TAPS - 1)]
    return [t.to(dtype) for t in torch.stack(taps).cumsum(0)]


def read(taps, *, dtype="float32", placement="pre", batch=50, per_pass=TAPS, stride=1):
    measured = ResidualRead(D, len(taps[0]), dtype, placement, stride=stride)
    for first in range(0, len(taps), per_pass):
        measured.wanted = range(first, first + per_pass)
        for start in range(0, len(taps[0]), batch):
            for index, acts in enumerate(taps):
                measured.update(index, acts[start : start + batch], is_last=index == len(taps) - 1)
        measured.end_pass()
    return measured.finish()


def direction(seed=1):
    q = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    return q / q.norm()


def test_a_healthy_stream_is_preserved_and_agrees_with_direct_svd():
    taps = stream()
    columns, blocks, spectra = read(taps)
    assert columns["blocks_preserved"] is True
    assert [row["block"] for row in blocks] == list(range(TAPS))
    assert [row["state"] for row in blocks] == [None] + ["preserved"] * (TAPS - 1)
    for acts, row, spectrum in zip(taps, blocks, spectra, strict=True):
        centred = acts.double() - acts.double().mean(0)
        _, sigma, right = torch.linalg.svd(centred, full_matrices=False)
        sigma = sigma / N**0.5
        assert row["sigma_min"] == pytest.approx(float(sigma[-1]), rel=1e-6)
        assert row["sigma_max"] == pytest.approx(float(sigma[0]), rel=1e-6)
        assert row["sigma_median"] == pytest.approx(float(np.median(sigma)), rel=1e-6)
        assert spectrum["eigenvalues"] == pytest.approx((sigma**2).tolist(), rel=1e-6)
        assert row["participation"] == pytest.approx(1 / float((right[-1] ** 4).sum()), rel=1e-4)
        assert row["bottom_coordinates"][0] == int(right[-1].abs().argmax())
        assert row["bottom_weights"][0] == pytest.approx(float(right[-1].square().max()), rel=1e-4)
    ratios = [row["sigma_min"] / before["sigma_min"] for before, row in itertools.pairwise(blocks)]
    assert [row["ratio"] for row in blocks[1:]] == pytest.approx(ratios)
    assert columns["worst_block_ratio"] == pytest.approx(min(ratios))


@pytest.mark.parametrize("left", [0.0, 1e-4], ids=["gone", "1e-4"])
@pytest.mark.parametrize("at", [1, 3, TAPS - 1])
def test_a_planted_collapse_is_reported_there_with_its_direction(at, left):
    taps, q = stream(), direction()
    for index in range(at, TAPS):  # nothing writes along q again
        taps[index] = taps[index] - (1 - left) * torch.outer(taps[index] @ q, q)
    columns, blocks, _ = read(taps)
    assert [row["block"] for row in blocks if row["state"] == "collapsed"] == [at]
    assert (columns["blocks_preserved"], columns["worst_block"]) == (False, at)
    assert abs(np.dot(blocks[at]["bottom_direction"], q.numpy())) > 0.999
    later = {row["state"] for row in blocks[at + 1 :]}
    assert later <= ({"preserved-dead"} if left == 0 else {"preserved"})
    assert all(row["bottom_direction"] is None for row in blocks if row["block"] != at)


def test_a_direction_that_comes_back_is_revived():
    taps, q = stream(), direction()
    taps[2] = taps[2] - torch.outer(taps[2] @ q, q)
    _, blocks, _ = read(taps)
    assert [row["state"] for row in blocks[2:4]] == ["collapsed", "revived"]
    assert [row["preserved"] for row in blocks[1:4]] == [True, False, False]


def test_another_direction_dying_is_a_collapse_although_one_was_dead_before():
    taps, q, p = stream(), direction(1), direction(2)
    p = p - (p @ q) * q
    p = p / p.norm()
    for index in range(1, TAPS):
        taps[index] = taps[index] - torch.outer(taps[index] @ q, q)
        if index >= 4:
            taps[index] = taps[index] - torch.outer(taps[index] @ p, p)
    _, blocks, _ = read(taps)
    assert [row["block"] for row in blocks if row["state"] == "collapsed"] == [1, 4]


def test_bfloat16_rounding_is_not_taken_for_a_living_direction():
    taps, q = stream(), direction()
    for index in range(2, TAPS):
        taps[index] = taps[index] - torch.outer(taps[index] @ q, q)
    _, blocks, _ = read([t.bfloat16() for t in taps], dtype="bfloat16")
    assert [row["state"] for row in blocks[1:]] == ["preserved", "collapsed"] + ["preserved-dead"] * 3


def test_post_norm_streams_carry_their_kernel_by_construction():
    gains = [0.5 + torch.rand(D, generator=torch.Generator().manual_seed(k)) for k in range(TAPS)]
    taps = [torch.nn.functional.layer_norm(t, (D,), g) for t, g in zip(stream(), gains, strict=True)]
    columns, blocks, _ = read(taps, placement="post")
    assert {row["state"] for row in blocks[1:]} == {"preserved-dead"}
    assert columns["blocks_preserved"] is True


def test_massive_coordinates_do_not_hide_a_collapse():
    taps, q = stream(), direction()
    q = torch.nn.functional.normalize(
        q.index_fill(0, torch.tensor([0]), 0.0), dim=0
    )  # else the massive one writes to it
    for index in range(TAPS):
        if index >= 3:
            taps[index] = taps[index] - (1 - 1e-4) * torch.outer(taps[index] @ q, q)
        taps[index][:, 0] += 1e4
        taps[index][::40, 0] += 3e3
    _, blocks, _ = read([t.double() for t in taps], dtype="float64")
    assert [row["block"] for row in blocks if row["state"] == "collapsed"] == [3]


def test_few_distinct_inputs_are_said_and_judge_nothing():
    taps = stream()
    taps[0] = taps[0][: 3 * D].repeat(6, 1)[:N]
    _, blocks, _ = read(taps)
    assert [row["rank_limited"] for row in blocks] == [True] + [False] * (TAPS - 1)
    assert blocks[1]["state"] is None
    assert blocks[1]["ratio"] is None
    assert blocks[2]["state"] == "preserved"


@pytest.mark.parametrize("per_pass", [1, 2, 4])
def test_any_number_of_passes_gives_the_same_rows(per_pass):
    taps, q = stream(), direction()
    taps[3] = taps[3] - torch.outer(taps[3] @ q, q)
    assert read(taps, per_pass=per_pass) == read(taps)


@pytest.mark.parametrize("per_pass", [3, TAPS])
def test_each_third_tap_and_the_last_are_compared_with_the_one_read_before(per_pass):
    taps, q = stream(), direction()
    for index in range(2, TAPS):
        taps[index] = taps[index] - torch.outer(taps[index] @ q, q)
    _, whole, spectra = read(taps)
    columns, blocks, some = read(taps, stride=3, per_pass=per_pass)
    assert [row["block"] for row in blocks] == [0, 3, 5]
    assert some == [spectra[0], spectra[3], spectra[5]]
    assert blocks[1]["ratio"] == whole[3]["sigma_min"] / whole[0]["sigma_min"]
    assert [row["state"] for row in blocks] == [None, "collapsed", "preserved-dead"]
    assert (columns["blocks_preserved"], columns["worst_block"]) == (False, 3)


def test_no_tap_is_null_and_no_row():
    columns, blocks, spectra = read(stream(), stride=0)
    assert columns == dict.fromkeys(("blocks_preserved", "blocks_nondecreasing", "worst_block", "worst_block_ratio"))
    assert (blocks, spectra) == ([], [])


def test_taps_within_a_budget():
    assert ResidualRead.taps_within(10 * 40 * 100**2, 100) == 10
    assert ResidualRead.taps_within(0, 100) == 1, "one tap is always read"


def test_broken_shards_and_other_widths():
    measured = ResidualRead(D, N, "float32", "pre")
    measured.wanted = range(3)
    measured.update(1, torch.randn(5, D + 1))  # a merger's output: not this stream
    rows = torch.randn(5, D)
    rows[2] = 0
    with pytest.raises(ValueError, match="1 of 5 rows after block 1 are all zeros"):
        measured.update(1, rows)
    rows[2, 0] = torch.nan
    with pytest.raises(ValueError, match="after block 2 is not finite in 1 of 5 rows"):
        measured.update(2, rows)
    huge = torch.randn(5, D, dtype=torch.float64)
    huge[2, 0] = 1e200
    with pytest.raises(ValueError, match=r"stream after block 1 reach 1\.0e\+200 in 1 of 5 rows"):
        measured.update(1, huge)
    assert measured.finish()[1] == []


def test_padding_is_left_out():
    taps = [t.reshape(8, -1, D) for t in stream()]
    mask = torch.ones(8, N // 8, dtype=torch.bool)
    mask[7, 20:] = False
    measured, chosen = (ResidualRead(D, int(mask.sum()), "float32", "pre") for _ in range(2))
    measured.wanted = chosen.wanted = range(TAPS)
    for index, acts in enumerate(taps):
        measured.update(index, torch.where(mask[..., None], acts, 1e6), mask)
        chosen.update(index, acts[mask])
    measured.end_pass()
    chosen.end_pass()
    assert measured.finish() == chosen.finish()


@pytest.mark.parametrize(
    ("width", "ratios", "limit"),
    [
        (768, (0.7, 0.75), 0.8),  # wide and quiet: the ratio decides
        (512, (0.7, 0.7), 0.8),
        (96, (0.592, 0.6), 0.15),  # GPT-2's second block of four at random initialisation
        (768, (0.5, 0.79), 1 - 3 * 0.29 / 2**0.5),  # the halves do not agree that it fell so far
        (24, (1e-4, 3e-4), 0.0375),
        (768, (0.0, 0.0), 0.8),
        (768, (np.nan, 0.1), None),
    ],
)
def test_width_and_noise_decide_from_where_on_a_fall_is_a_collapse(width, ratios, limit):
    assert collapse_limit(width, ratios) == pytest.approx(limit)


def test_a_narrow_stream_that_falls_as_random_weights_do_is_preserved_and_says_by_which_limit():
    taps, q = stream(), direction()
    for index in range(3, TAPS):
        taps[index] = taps[index] - 0.5 * torch.outer(taps[index] @ q, q)
    _, blocks, _ = read(taps)
    assert blocks[3]["ratio"] < 0.8
    assert (blocks[3]["state"], blocks[3]["collapse_below"]) == ("preserved", pytest.approx(0.8 * D / 512))
    assert [row["collapse_below"] for row in blocks[:3]] == [None] * 3, "nothing fell, no limit was asked"


def test_blocks_that_do_not_fall_are_counted_beyond_the_halves_noise():
    taps, q = stream(), direction()
    for index in range(2, TAPS):
        taps[index] = taps[index] - (0.3 if index == 2 else 0.02) * torch.outer(taps[index] @ q, q)
    columns, blocks, _ = read(taps)
    fell = [row["block"] for row in blocks if row["nondecreasing"] is False]
    assert blocks[0]["nondecreasing"] is None, "there is nothing before the embedding"
    assert 2 in fell
    assert columns["blocks_nondecreasing"] == sum(row["nondecreasing"] is True for row in blocks)
    assert columns["blocks_preserved"] is True, "at this width a fall of a third is no collapse"


@pytest.mark.parametrize(
    ("state", "ratio", "ratios", "expected"),
    [
        ("preserved", 1.2, None, True),
        ("preserved", 0.9, (0.9, 0.9), False),
        ("preserved", 0.97, (0.95, 0.99), True),
        ("preserved", 0.9, (np.nan, 0.9), None),
        ("preserved-dead", 0.5, None, True),
        ("collapsed", 1e-9, None, False),
        ("revived", 1e9, None, True),
    ],
)
def test_what_counts_as_not_falling(state, ratio, ratios, expected):
    assert is_nondecreasing(state, ratio, ratios) is expected


def test_massive_coordinates_are_told_at_each_tap():
    taps = stream()
    for index in range(2, TAPS):
        taps[index][:, 5] += 500
    _, blocks, _ = read(taps)
    assert [row["massive_coordinates"] for row in blocks] == [[], [], *[[5]] * (TAPS - 2)]
