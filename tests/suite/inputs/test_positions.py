"""Which positions count: exactly as many as are asked for, whatever is left out and padded."""

import pytest
import torch

from deadbench.suite.errors import InputError
from deadbench.suite.inputs.batches import Batch, Inputs
from deadbench.suite.inputs.positions import tokens_for, without_first
from tests.suite.architectures.test_locate import TEXT, VISION
from tests.suite.inputs.test_feed import made


@pytest.mark.parametrize(("rows", "skipped"), [(200, 0), (200, 5), (177, 63), (1, 5), (59, 5), (60, 5)])
def test_the_tokens_leave_the_rows_that_are_wanted(rows, skipped):
    total = tokens_for(rows, 64, skipped)
    lengths = [64] * (total // 64) + ([total % 64] if total % 64 else [])
    assert sum(length - skipped for length in lengths) == rows
    assert all(length > skipped for length in lengths)


def test_padding_stays_left_out_on_either_side():
    mask_ST = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    inputs = Inputs([Batch({"input_ids": torch.ones(2, 5, dtype=torch.long)}, mask_ST)], 7, None, "")
    (batch,) = without_first(inputs, 2).batches
    assert batch.mask_ST.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert without_first(inputs, 2).num_tokens == 3
    assert without_first(inputs, 0) is inputs


def test_text_has_first_positions_and_pictures_have_none():
    _, _, inputs = made("gpt_neox", TEXT, skip_positions=7)
    assert inputs.num_tokens == 200
    assert not any(batch.mask_ST[:, :7].any() for batch in inputs.batches)
    assert all("attention_mask" not in batch.model_inputs for batch in inputs.batches[:-1]), "they run as they did"
    with pytest.raises(InputError, match="leaves out tokens of text; an input of image has none"):
        made("vit", VISION, spec="image", modality="image", skip_positions=1)
    with pytest.raises(InputError, match="skip_positions 64 cannot be left out of sequences of 64"):
        made("gpt_neox", TEXT, skip_positions=64)
