"""Whole reads cut among workers, packed, moved and merged: the row of one worker; what is torn is refused."""

import itertools
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deadbench.suite.architectures.kernel_test import live_norm, probe
from deadbench.suite.ranks import RankError, Ranks
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.reads.residual import ResidualRead
from deadbench.suite.spectra.arrow_state import StateError
from deadbench.suite.spectra.covariance import CovarianceFactor
from deadbench.suite.spectra.triangular import GRAM_ERROR

TAPS = 4


def moved(state: pa.RecordBatch) -> pa.RecordBatch:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, state.schema) as writer:
        writer.write_batch(state)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


def in_ranks(size, work, divided="tokens"):
    """`work(ranks)` in as many threads as there are ranks; what each returned, or raised."""
    barrier, slots, results = threading.Barrier(size, timeout=60), [None] * size, [None] * size

    def exchange(rank, mine):
        slots[rank] = mine
        barrier.wait()
        given = list(slots)
        barrier.wait()
        return given

    def collect(rank, mine, owner):
        given = exchange(rank, mine and moved(mine))
        return given if rank == owner else []

    def run(rank):
        ranks = Ranks(
            rank, size, lambda mine: exchange(rank, mine), lambda mine, owner: collect(rank, mine, owner), divided
        )
        try:
            results[rank] = work(ranks)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def assert_same_spectrum(found, expected, floor):
    """To 1e-9 relative above the floor; never further apart than what the method that squares is certified to."""
    found, expected = np.array(found), np.array(expected)
    error = np.maximum(1e-9 * expected, GRAM_ERROR * expected[0])
    certified = expected > floor
    assert (abs(found - expected)[certified] <= error[certified]).all()
    assert (found[~certified] <= 2 * floor).all()


def assert_same_row(row, expected):
    rounding = {"lambda_v": 1e-6, "lambda_second": 1e-6, "alignment": 1e-6, "containment": 1e-6}
    free = {"lambda_min", "spectrum_method", "spectrum_floor", "lambda_min_resolved", "depth_bottom"}
    assert row.keys() == expected.keys()
    for name in expected.keys() - free:
        if isinstance(expected[name], float):
            least = 1e-9 if name == "precision_slope" else 1e-30  # the logarithm of a ratio of one is rounding alone
            assert row[name] == pytest.approx(expected[name], rel=rounding.get(name, 1e-6), abs=least), name
        else:
            assert row[name] == expected[name], name


def assert_same_rows(found, expected):
    """Rows of `blocks` or `spectra`, lists and all: floats to rounding, what is not a float exactly."""
    for row, reference in zip(found, expected, strict=True):
        assert row.keys() == reference.keys()
        for name, value in reference.items():
            rounded = any(isinstance(each, float) for each in (value if isinstance(value, list) else [value]))
            assert row[name] == (pytest.approx(value, rel=1e-9, abs=0) if rounded else value), name


norms = st.sampled_from(["layernorm", "rmsnorm", "two zero scales"])


def made(kind, D, seed):
    torch.manual_seed(seed)
    module = nn.RMSNorm(D, eps=1e-6) if kind == "rmsnorm" else nn.LayerNorm(D)
    nn.init.uniform_(module.weight, 0.3, 2.0)
    with torch.no_grad():
        if kind == "two zero scales":
            module.weight[:2] = 0
    return module.requires_grad_(False)


@settings(deadline=None, max_examples=15)
@given(
    kind=norms,
    D=st.integers(4, 20),
    sequences=st.integers(6, 12),
    cuts=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    padded=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 20),
)
def test_a_final_norms_read_cut_anywhere_gives_one_row(kind, D, sequences, cuts, padded, dtype, seed):
    """Uneven shares, empty ones, padding, either norm: packed, moved, merged in order."""
    module = made(kind, D, seed).to(dtype)
    norm = live_norm(module, probe(module, D), D)
    x = (torch.randn(sequences, 2 * D, D) * torch.linspace(0.2, 3, D) + 1).to(dtype)
    mask = torch.ones(sequences, 2 * D, dtype=torch.bool)
    if padded:
        mask[-2:, D:] = False
    edges = [0, *sorted(min(cut, sequences) for cut in cuts), sequences]
    whole, merged = FinalNormRead(module, norm), None
    for b in range(sequences):
        whole.update(x[b : b + 1], module(x[b : b + 1]), mask[b : b + 1])
    for start, stop in itertools.pairwise(edges):
        part = FinalNormRead(module, norm, int(mask[:start].sum()))
        for b in range(start, stop):
            part.update(x[b : b + 1], module(x[b : b + 1]), mask[b : b + 1])
        received = FinalNormRead(module, norm)
        received.restore(moved(part.to_arrow()))
        if merged is None:
            merged = received
        else:
            merged.merge(received)
    (row, spectrum), (expected, reference) = merged.finish(), whole.finish()
    assert_same_row(row, expected)
    assert spectrum["verdicts"] == reference["verdicts"]
    assert merged.distinct.count() == whole.distinct.count()
    assert_same_spectrum(spectrum["eigenvalues"], reference["eigenvalues"], expected["spectrum_floor"])


@settings(deadline=None, max_examples=10)
@given(
    D=st.integers(6, 16),
    batches=st.integers(2, 8),
    size=st.integers(2, 5),
    per_pass=st.integers(1, TAPS),
    fault=st.sampled_from([0.0, 1e-4, 1.0]),
    divided=st.sampled_from(["tokens", "taps"]),
    seed=st.integers(0, 20),
)
def test_ranks_give_the_blocks_of_one(D, batches, size, per_pass, fault, divided, seed):
    """More ranks than batches or taps, too; a direction that dies after block 2 is found by all, at that block."""
    N, generator = 12 * D * batches, torch.Generator().manual_seed(seed)
    taps = torch.randn(TAPS, N, D, generator=generator).cumsum(0)
    q = torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
    taps[2:] -= (1 - fault) * (taps[2:] @ q)[..., None] * q
    rows = N // batches

    def work(ranks):
        first, last = 0, batches
        if ranks.replicas:
            first, last = (-(-batches * place // ranks.size) for place in (ranks.rank, ranks.rank + 1))
        measured = ResidualRead(D, N, "float32", "pre", ranks=ranks, first_row=first * rows)
        for start in range(0, TAPS, per_pass):
            measured.wanted = range(start, start + per_pass)
            for b in range(first, last):
                for index in range(TAPS):
                    measured.update(index, taps[index, b * rows : (b + 1) * rows])
            measured.end_pass()
        return measured.finish()

    columns, blocks, spectra = work(Ranks())
    assert columns["blocks_preserved"] == (fault == 1)
    assert fault == 1 or columns["worst_block"] == 2
    for found in in_ranks(size, work, divided):
        assert found[0]["blocks_preserved"] == columns["blocks_preserved"]
        assert found[0]["worst_block"] == columns["worst_block"]
        for row, expected in zip(found[1], blocks, strict=True):
            for name in ("block", "state", "rank_limited", "preserved", "bottom_coordinates"):
                assert row[name] == expected[name]
            assert row["sigma_max"] == pytest.approx(expected["sigma_max"], rel=1e-9)
            if expected["sigma_min"] > expected["floor"]:
                assert row["sigma_min"] == pytest.approx(expected["sigma_min"], rel=1e-6)
        for each, expected in zip(found[2], spectra, strict=True):
            assert_same_spectrum(each["eigenvalues"], expected["eigenvalues"], 1e-7 * expected["eigenvalues"][0])


def test_what_one_rank_raises_all_raise_once():
    def work(ranks):
        with ranks.together():
            ranks.share(ranks.rank)
            with ranks.together():
                if ranks.rank == 1:
                    raise KeyError("lost")
            ranks.share("never reached")

    assert [(type(error), f"{error}") for error in in_ranks(3, work)] == [(RankError, "KeyError: 'lost'")] * 3


@settings(deadline=None, max_examples=15)
@given(
    D=st.integers(2, 16),
    before=st.integers(0, 120),
    after=st.integers(1, 120),
    batch=st.integers(1, 40),
    log_condition=st.floats(0, 9),
    dead_at_first=st.booleans(),
    seed=st.integers(0, 50),
)
def test_a_restored_accumulator_goes_on_where_it_was(D, before, after, batch, log_condition, dead_at_first, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(before + after, D, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(D, D, generator=generator, dtype=torch.float64)
    rows = rows * torch.logspace(0, -log_condition, D, dtype=torch.float64) + 100
    if dead_at_first:
        rows[:before, -1] = 1
    kept = CovarianceFactor(D)
    for part in rows[:before].split(batch):
        kept.update(part)
    restored = CovarianceFactor.from_arrow(moved(kept.to_arrow()))
    assert restored.to_arrow().equals(kept.to_arrow()), "every bit"
    for accumulator in (kept, restored):
        for part in rows[before:].split(batch):
            accumulator.update(part)
    assert (restored.num_rows, restored.method) == (kept.num_rows, kept.method)
    if before + after > D:  # LAPACK may round otherwise where a matrix lies in memory by rows and not by columns
        found, expected = restored.finish(), kept.finish()
        resolved = expected.eigenvalues_D > 1e3 * expected.resolution
        assert found.eigenvalues_D[resolved] == pytest.approx(expected.eigenvalues_D[resolved], rel=1e-9)


def test_a_stream_restored_in_mid_pass_gives_the_same_rows():
    D, N = 12, 12 * 24
    taps = torch.randn(TAPS, N, D, generator=torch.Generator().manual_seed(0)).cumsum(0)
    taps[2:] *= torch.linspace(0.2, 1, D)

    def feed(measured, first, rows):
        measured.wanted = range(first, first + 2)
        for index in range(TAPS):
            measured.update(index, taps[index, rows])

    whole = ResidualRead(D, N, "float32", "pre")
    for first in (0, 2):
        for start in range(0, N, 48):
            feed(whole, first, slice(start, start + 48))
        whole.end_pass()
    cut = ResidualRead(D, N, "float32", "pre")
    for first in (0, 2):
        for start in range(0, N, 48):
            state = [moved(batch) for batch in cut.to_arrow()]
            cut = ResidualRead(D, N, "float32", "pre")
            cut.restore(state)
            feed(cut, first, slice(start, start + 48))
        cut.end_pass()
    packed = ResidualRead(D, N, "float32", "pre")
    packed.restore([moved(batch) for batch in cut.to_arrow()])
    assert packed.finish() == cut.finish(), "every bit"
    for found, expected in zip(cut.finish()[1:], whole.finish()[1:], strict=True):
        assert_same_rows(found, expected)
        for column in [name for name, value in expected[-1].items() if isinstance(value, list)]:
            altered = [*found[:-1], found[-1] | {column: [*found[-1][column][:-1], -1]}]
            with pytest.raises(AssertionError, match=column):
                assert_same_rows(altered, expected)


def test_gram_matrices_of_different_offsets_are_merged_as_exactly_as_of_one():
    """Shares whose means are a thousand spreads apart, each with its own offset; no communication before the merge."""
    D, generator = 12, torch.Generator().manual_seed(0)
    near = torch.randn(30 * D, D, generator=generator, dtype=torch.float64)
    far = torch.randn(30 * D, D, generator=generator, dtype=torch.float64) + 1e3 * torch.arange(D)
    parts = []
    for rows in (near, far):
        accumulator = CovarianceFactor(D)
        accumulator.update(rows)
        parts.append(accumulator)
    parts[0].merge(parts[1])
    spectrum = parts[0].finish()
    rows = torch.cat([near, far])
    reference = torch.linalg.svdvals(rows - rows.mean(0)).square().numpy() / len(rows)
    assert (abs(spectrum.eigenvalues_D - reference) <= GRAM_ERROR * reference[0]).all()
    assert spectrum.num_tokens == len(rows)


def test_a_state_that_is_not_whole_is_refused():
    accumulator = CovarianceFactor(4)
    accumulator.update(torch.randn(20, 4))
    state = accumulator.to_arrow()
    for column, value in (("mean", [[1.0]]), ("method", ["magic"]), ("hidden_size", [5])):
        index = state.schema.get_field_index(column)
        broken = state.set_column(index, state.schema.field(index), pa.array(value, state.schema.field(index).type))
        with pytest.raises(StateError):
            CovarianceFactor.from_arrow(broken)
    with pytest.raises(StateError, match="another kind or version"):
        CovarianceFactor.from_arrow(state.select(["count", "mean"]))
    module = made("layernorm", 5, 0)
    narrow = made("layernorm", 4, 0)
    read = FinalNormRead(module, live_norm(module, probe(module, 5), 5))
    other = FinalNormRead(narrow, live_norm(narrow, probe(narrow, 4), 4))
    with pytest.raises(StateError, match="width 4; the norm's is 5"):
        read.restore(other.to_arrow())
