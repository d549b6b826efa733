"""Whatever dies, every read is one row: what `python -m tests.runners.chaos` does with twenty seeds."""

import pytest

from tests.runners.chaos import survive

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_an_actor_a_node_and_the_driver_are_killed_and_every_read_is_one_row(seed, tmp_path):
    happened = survive(seed, models=6, seconds=0.2, folder=tmp_path)
    assert len(happened["killed"]) == 3
    assert happened["failed"] <= 1, "two deaths of one read are its retry and its end"
