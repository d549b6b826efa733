"""Counters of a run for Prometheus, by Ray's own metrics: the endpoint is Ray's, and so is who may read it."""

from functools import cache
from typing import Any

from deadbench.runners.jobs.events import Progress


class Metrics:
    """Reads done and failed, tokens, models that run; labelled with the run."""

    def __init__(self, run_id: str):
        self._tags = {"run_id": run_id}
        self._tokens: dict[str, Progress] = {}

    def progress(self, model_id: str, event: Progress) -> None:
        """Count the tokens since the last event of the same phase."""
        if event.unit != "tokens":
            return
        last = self._tokens.get(model_id)
        same = last is not None and (last.label, last.phase) == (event.label, event.phase)
        new = event.done - (last.done if same and last is not None else 0)
        self._tokens[model_id] = event
        if new > 0:
            _series()["tokens"].inc(new, tags=self._tags)

    def finished(self, status: str) -> None:
        """One more read is in the results."""
        _series()["reads"].inc(1, tags=self._tags | {"status": status})

    def running(self, models: int) -> None:
        """How many models run now."""
        _series()["running"].set(models, tags=self._tags)


@cache
def _series() -> dict[str, Any]:
    from ray.util.metrics import Counter, Gauge

    return {
        "reads": Counter("deadbench_reads", "Reads that are in the results", ("run_id", "status")),
        "tokens": Counter("deadbench_tokens", "Tokens that went through models", ("run_id",)),
        "running": Gauge("deadbench_running_models", "Models that run now", ("run_id",)),
    }
