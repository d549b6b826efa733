"""What the inputs alone tell: how many rows there are, and how many of them can differ."""

import pytest
import torch

from deadbench.suite.errors import InputError
from deadbench.suite.inputs import batches
from deadbench.suite.inputs.batches import Batch, Inputs, check_distinct, check_inputs
from deadbench.suite.reads.distinct_rows import MIN_DISTINCT


def inputs(*made):
    return Inputs(list(made), sum(batch.num_rows for batch in made), None, "made")


def ids(rows, length=10, seed=0):
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_a_repeated_prompt_is_as_many_rows_as_it_is_long():
    repeated = ids(1).repeat(30, 1)
    with pytest.raises(InputError, match="only 10 of 600 rows differ, for hidden size 16.*at least 64 different rows"):
        check_inputs(inputs(Batch({"input_ids": repeated}), Batch({"input_ids": repeated})), 16)
    check_inputs(inputs(Batch({"input_ids": ids(60)})), 16)


def test_the_last_padded_batch_holds_the_same_prompt():
    first = Batch({"input_ids": ids(1, 6).repeat(3, 1)})
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :6] = True
    padded = torch.nn.functional.pad(ids(1, 6).repeat(2, 1), (0, 2))
    last = Batch({"input_ids": padded, "attention_mask": mask.long()}, mask)
    assert len({item for batch in (first, last) for item, _ in batch.items()}) == 1
    assert [rows for batch in (first, last) for _, rows in batch.items()] == [6] * 5


def test_sequences_of_one_token_are_as_many_as_their_ids():
    few = torch.arange(12).repeat(40)[:, None]
    with pytest.raises(InputError, match="only 12 of 480 rows differ"):
        check_inputs(inputs(Batch({"input_ids": few})), 12)


def test_blank_pictures_are_one_picture_and_pictures_in_one_row_are_not_told_apart():
    blank, noise = torch.zeros(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    with pytest.raises(InputError, match="only 5 of 40 rows differ"):
        check_inputs(inputs(Batch({"pixel_values": blank}, rows=40)), 8)
    check_inputs(inputs(Batch({"pixel_values": noise}, rows=40)), 8)
    packed = Batch({"pixel_values": blank.flatten(0, 1), "image_grid": torch.ones(2, 3)}, rows=40)
    assert [rows for _, rows in packed.items()] == [40]


def test_the_rule():
    """No more rows than the width are never enough; four for a direction always are; else most must differ."""
    assert batches._ENOUGH == MIN_DISTINCT
    for distinct, rows in ((8, 8), (8, 100), (31, 100)):
        with pytest.raises(InputError, match="rows differ"):
            check_distinct(distinct, rows, 8)
    for distinct, rows in ((9, 9), (9, 18), (32, 10_000)):
        check_distinct(distinct, rows, 8)
