"""Sizes: a benchmark measures at full size by `make bench`; `make test` runs it once, small, for what it asserts."""

from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def is_measured(config) -> bool:
    """Whether this session times the benchmarks (pytest-benchmark's own rule)."""
    option = config.getoption
    return option("benchmark_enable") or not option("benchmark_disable")


@pytest.fixture(scope="session")
def sized(request):
    """`sized(full, quick)`: `full` where it is measured, else `quick`."""
    measured = is_measured(request.config)
    return lambda full, quick: full if measured else quick


@pytest.hookimpl(tryfirst=True)  # -m comes after
def pytest_collection_modifyitems(config, items):
    """What is marked `bench` says nothing at a small size that another test does not: `make bench` alone runs it.

    None of them is for every save.
    """
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
    if is_measured(config):
        return
    left_out = [item for item in items if item.get_closest_marker("bench")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
