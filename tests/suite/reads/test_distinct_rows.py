"""Different rows are counted whatever their order, their batches and float32's noise."""

import torch

from deadbench.suite.reads.distinct_rows import DistinctRows

D = 12


def seen(*parts, limit=1000):
    counted = DistinctRows(D, limit)
    for part in parts:
        counted.update(part.double())
    return counted


def test_repeated_rows_are_one_and_noise_of_rounding_does_not_part_them():
    rows = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    assert seen(rows, rows, rows.flip(0)).count() == 50
    noisy = rows * (1 + 2e-7 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
    assert seen(rows, noisy).count() <= 55  # a cell's border may run between the two
    assert seen(rows, rows * (1 + 1e-3 * torch.randn(rows.shape))).count() > 90


def test_rows_that_differ_little_beside_a_common_part_are_told_apart():
    rows = 100 + torch.randn(400, D, generator=torch.Generator().manual_seed(0))
    assert seen(rows).count() == 400


def test_merged_in_any_order_and_restored_it_is_the_same_set():
    rows = torch.randn(90, D, generator=torch.Generator().manual_seed(0))
    first, second, whole = seen(rows[:50]), seen(rows[30:]), seen(rows)
    other = seen(rows[30:])
    other.merge(seen(rows[:50]))
    first.merge(second)
    assert torch.equal(first.cells, whole.cells)
    assert torch.equal(other.cells, whole.cells)
    again = DistinctRows(D, 1000)
    again.restore(whole.to_arrow()[0])
    assert torch.equal(again.cells, whole.cells)
    again.update(rows.double())
    assert again.count() == 90


def test_it_keeps_no_more_than_anybody_asks_for():
    rows = torch.randn(90, D, generator=torch.Generator().manual_seed(0))
    assert seen(rows, limit=20).count() == 20
    merged = seen(rows[:15], limit=20)
    merged.merge(seen(rows[15:30], limit=20))
    assert merged.count() == 20
