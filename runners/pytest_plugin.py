"""`pytest --deadbench models.yaml`: each read of a registry's suite is a benchmark of pytest-benchmark.

A read is timed; what it measured is in the benchmark's `extra_info`. Beside it stands a second benchmark, `…-depth`,
whose figure is no time but `FAR - depth` in decades, so that `pytest-benchmark compare` shows a loss of depth as it
shows a loss of speed, and `--benchmark-compare-fail=mean:0.5 -k depth` fails when half a decade is gone.

Loaded with every pytest where deadbench is installed: nothing but pytest is imported before the option is given.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from deadbench.runners.jobs.job import ModelJob, ReadJob


FAR = 40.0  # decades; deeper than any projection of ours resolves, so that the figure is positive
SCIENCE = [
    "family", "depth", "depth_exact", "depth_predicted", "lambda_v", "lambda_mean", "alignment", "containment",
    "kernel_exact", "num_dead_1e6", "num_algebraic", "num_learned", "num_zero_scales", "scale_harmonic",
    "blocks_preserved", "worst_block", "worst_block_ratio", "num_tokens", "input", "protocol", "protocol_hash", "dtype",
    "device", "versions", "forward_seconds", "spectrum_seconds",
]  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("deadbench")
    group.addoption("--deadbench", metavar="FILE", help="benchmark the reads of this registry (models.yaml)")
    group.addoption("--deadbench-suite", metavar="NAME", help="suite of the registry [default: quick]")
    group.addoption("--deadbench-models", metavar="ID,…", help="only these models, of the registry or SOURCEs")
    group.addoption("--deadbench-reads", metavar="READ,…", help="only these reads: parameters, random, trained")
    group.addoption(
        "--deadbench-rounds", type=int, default=1, metavar="N", help="how often a read is timed [default: 1]"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Say what is missing before anything is collected."""
    config.addinivalue_line("markers", "deadbench: a read of --deadbench")
    if config.getoption("deadbench") and config.getoption("benchmark_disable", None) is None:
        raise pytest.UsageError("--deadbench needs pytest-benchmark: pip install pytest-benchmark")


@pytest.hookimpl(tryfirst=True)  # -k and -m come after
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the reads to whatever else was collected."""
    file = config.getoption("deadbench")
    if file:
        registry = RegistryFile.from_parent(session, path=Path(file).resolve(), jobs=_jobs(config))
        items.extend(session.genitems(registry))


class RegistryFile(pytest.File):
    """A registry file as a collection of benchmarks."""

    def __init__(self, *, jobs: "list[ModelJob]", **kwargs: Any):
        super().__init__(**kwargs)
        self.jobs = jobs

    def collect(self) -> Iterator[pytest.Item]:
        """Two items a forward read, one a read of parameters."""
        for job in self.jobs:
            for read in job.reads:
                measurement = _Measurement(job, read)
                name = "-".join(part for part in (read.revision, read.read) if part)
                yield self._item(f"{job.model_id}[{name}]", _timed(measurement))
                if read.engine is not None:
                    yield self._item(f"{job.model_id}[{name}-depth]", _depth(measurement))

    def _item(self, name: str, function: Any) -> pytest.Item:
        item: pytest.Function = pytest.Function.from_parent(self, name=name, callobj=function)
        item.add_marker(pytest.mark.deadbench)
        return item


def _jobs(config: pytest.Config) -> "list[ModelJob]":
    from deadbench.runners.jobs.build import build_jobs
    from deadbench.runners.jobs.job import JobError, Overrides
    from deadbench.suite.registry.entries import RegistryError
    from deadbench.suite.registry.loading import find_registry, load_registry

    def listed(name: str) -> list[str]:
        return [part.strip() for part in (config.getoption(name) or "").split(",") if part.strip()]

    try:
        path = find_registry(Path(config.getoption("deadbench")))
        suite = config.getoption("deadbench_suite")
        models, reads = listed("deadbench_models"), listed("deadbench_reads")
        return build_jobs(load_registry(path), path, models, suite, reads or None, Overrides())
    except (RegistryError, JobError) as error:
        raise pytest.UsageError(f"--deadbench: {error}") from error


class _Measurement:
    """One read, measured as often as it is asked to be; the last row is kept for who does not time it."""

    def __init__(self, job: "ModelJob", read: "ReadJob"):
        self.job, self.read = job, read
        self._row: dict[str, Any] | None = None

    def measure(self) -> dict[str, Any]:
        """Run the read in this process; returns its row of `reads`, or fails the test with the row's error."""
        from deadbench.runners.jobs.events import Finished
        from deadbench.runners.worker.run import run_model

        for event in run_model(replace(self.job, reads=(self.read,)), "pytest", 1):
            if isinstance(event, Finished):
                if event.row["status"] != "ok":
                    pytest.fail(f"{self.read.label()}: {event.row['error']}", pytrace=False)
                self._row = event.row
        assert self._row is not None
        return self._row

    def row(self) -> dict[str, Any]:
        """The row, measured if it was not yet."""
        return self._row or self.measure()


def _timed(measurement: _Measurement) -> Any:
    def benchmark_read(benchmark: Any, request: pytest.FixtureRequest) -> None:
        import deadbench.runners.worker.forward  # noqa: F401  (torch and transformers: their import is not the read's time)

        rounds = max(1, request.config.getoption("deadbench_rounds"))
        benchmark.group = f"deadbench {measurement.read.read}"
        benchmark.extra_info.update(_science(benchmark.pedantic(measurement.measure, rounds=rounds)))

    return benchmark_read


def _depth(measurement: _Measurement) -> Any:
    figures: list[float] = []

    @pytest.mark.benchmark(timer=lambda: figures.pop())  # pytest-benchmark takes the difference of two calls
    def benchmark_depth(benchmark: Any) -> None:
        row = measurement.row()
        if row["depth"] is None:
            pytest.skip("no depth: the model has no final norm")
        figures[:] = [FAR - row["depth"], 0.0]
        benchmark.group = f"deadbench: {FAR:g} - depth, decades (no time)"
        benchmark.extra_info.update(_science(row))
        benchmark.pedantic(lambda: None)

    return benchmark_depth


def _science(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in SCIENCE if row[name] is not None}
