"""MLflow: one run a series, in the experiment `deadbench` of a tracking server, a database or a folder."""

import os
from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from deadbench.analysis.trackers.curves import Series, by_tokens

EXPERIMENT = "deadbench"  # unless MLFLOW_EXPERIMENT_NAME names another
_TAG = "deadbench.series"
_MOST = 1000  # metrics that MLflow takes at once


def log(series: Sequence[Series], uri: str) -> int:
    """Write what the runs at `uri` lack of `series`; returns how many values that were.

    An empty `uri` is MLflow's own default (MLFLOW_TRACKING_URI). A metric is over the step, and a second one
    `METRIC_by_tokens` where the tokens seen are known.

    Raises:
        mlflow.exceptions.MlflowException: no such store, or it refuses.
    """
    # Its own are seven attempts of two minutes, at a server that says nothing.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    client = MlflowClient(uri or None)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    there = client.get_experiment_by_name(name)
    experiment = there.experiment_id if there is not None else client.create_experiment(name)
    runs = {run.data.tags[_TAG]: run for run in _runs(client, experiment) if _TAG in run.data.tags}
    written = 0
    for each in series:
        run = runs.get(each.name)
        if run is None:
            run = client.create_run(
                experiment, tags={_TAG: each.name, "deadbench.model": each.model}, run_name=each.name
            )
        points = [*each.points, *by_tokens(each.points)]
        known = {(n, m.step) for n in run.data.metrics for m in client.get_metric_history(run.info.run_id, n)}
        new = [
            Metric(name, value, int(1000 * point.seconds), point.step)
            for point in points
            for name, value in point.values.items()
            if (name, point.step) not in known
        ]
        for first in range(0, len(new), _MOST):
            client.log_batch(run.info.run_id, new[first : first + _MOST])
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id)
        written += len(new)
    return written


def _runs(client: MlflowClient, experiment: str) -> list[Run]:
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment], page_token=token)
        found += page
        token = page.token
        if not token:
            return found
