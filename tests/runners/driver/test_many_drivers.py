"""Whoever is killed or stands still, each read is there once; `python -m tests.runners.many_drivers` does more."""

import pytest

from tests.runners.many_drivers import survive

pytestmark = [pytest.mark.subprocess, pytest.mark.full]


@pytest.mark.parametrize("seed", [0, 1])
def test_four_drivers_of_one_result_set_with_random_kills_leave_every_read_once(seed, tmp_path):
    happened = survive(seed, folder=tmp_path)
    assert len(happened["did"]) == 4
    assert happened["by"] >= 2
