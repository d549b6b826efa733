"""The bootstrap over sequences against resampled rows, and against the spread of new samples."""

import numpy as np
import pytest
import torch

from deadbench.suite.spectra.bootstrap import RESAMPLES, SequenceSums, sequence_lengths

D = 6


def sequences(count, length, seed, shift=0.0):
    """(rows, deviations along a direction): a factor that the tokens of a sequence share scales them."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.rand(count, 1, 1, generator=generator) + 0.5
    acts = common * torch.randn(count, length, D, generator=generator)
    rows = acts.reshape(-1, D)
    return rows + shift, rows[:, 0].double()


def sums_of(rows, deviations, length, shift_D=None):
    sums = SequenceSums(shift_D)
    sums.update(rows, deviations, [length] * (len(rows) // length))
    return sums


def trace_of(rows):
    return float(rows.double().var(0, correction=0).sum())


def test_equals_a_bootstrap_of_the_rows_themselves():
    rows, deviations = sequences(40, 8, seed=0, shift=3.0)
    shift_D = torch.full((D,), 3.0, dtype=torch.float64)
    errors = sums_of(rows, deviations, 8, shift_D).finish(trace_of(rows))
    drawn = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), RESAMPLES)
    logs = []
    for counts in drawn:
        picked = np.repeat(np.arange(40), counts)
        again = deviations.reshape(40, 8)[picked].flatten().numpy()
        logs.append(np.log10(again.var()))
    assert errors.log_lambda_v == pytest.approx(np.std(logs, ddof=1), rel=1e-9)


def test_is_the_spread_of_new_samples_where_tokens_of_a_sequence_are_alike():
    logs, depths, claimed = [], [], []
    for seed in range(60):
        rows, deviations = sequences(64, 16, seed)
        trace = trace_of(rows)
        variance = float(deviations.var(correction=0))
        logs.append(np.log10(variance))
        depths.append(np.log10(trace / D / variance))
        claimed.append(sums_of(rows, deviations, 16).finish(trace))
    assert np.mean([c.log_lambda_v for c in claimed]) == pytest.approx(np.std(logs), rel=0.3)
    assert np.mean([c.depth for c in claimed]) == pytest.approx(np.std(depths), rel=0.3)
    assert np.std(logs) > 1.3 * np.sqrt(2 / 1024) / np.log(10), "independent tokens would vary less"


def test_parts_merge_to_the_same_errors():
    rows, deviations = sequences(40, 8, seed=1)
    whole, first, second = (sums_of(rows[a:b], deviations[a:b], 8) for a, b in ((0, 320), (0, 160), (160, 320)))
    first.merge(second)
    assert first.finish(trace_of(rows)) == whole.finish(trace_of(rows))


def test_many_sequences_are_pooled_and_say_the_same():
    rows, deviations = sequences(20_000, 1, seed=2)
    sums = sums_of(rows, deviations, 1)
    assert len(sums.sums_S4) <= 8192
    assert sums.sums_S4.sum(0)[0] == 20_000
    lowest = np.sqrt(2 / 20_000) / np.log(10)
    assert lowest < sums.finish(trace_of(rows)).log_lambda_v < 2 * lowest


def test_undefined_is_none():
    rows, deviations = sequences(7, 8, seed=3)
    assert sums_of(rows, deviations, 8).finish(trace_of(rows)) == (None, None)
    rows, deviations = sequences(9, 8, seed=3)
    assert sums_of(rows, 0 * deviations, 8).finish(trace_of(rows)) == (None, None)
    assert sums_of(rows, deviations, 8).finish(0.0) == (None, None)


def test_lengths_are_those_of_the_token_rows():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert sequence_lengths(torch.zeros(2, 3, D), mask) == [2, 1]
    assert sequence_lengths(torch.zeros(2, 3, D), None) == [3, 3]
    assert sequence_lengths(torch.zeros(2, 4, 4, D), None) == [16, 16]
    assert sequence_lengths(torch.zeros(10, D), None) == [10]
