"""A comparison's candidate as Bencher takes it (https://bencher.dev/docs/reference/bencher-metric-format)."""

import json

import polars as pl

from deadbench.analysis.cells import told

_LONGEST_NAME = 1024  # letters of a benchmark's name that Bencher takes
_CONFIDENCE = 1.96  # standard errors on either side: 95 %


def bencher(table: pl.DataFrame) -> str:
    """The candidate's side of a table of `compare` in Bencher's format: a read is a benchmark, a metric a measure.

    `bencher run --adapter json --file FILE` takes it. A value whose standard error is known has the bounds of its 95 %
    interval; what has no finite value has no measure.
    """
    benchmarks: dict[str, dict[str, dict[str, float]]] = {}
    wanted = [
        "candidate_model",
        "candidate_revision",
        "read",
        "seed",
        "engine",
        "metric",
        "candidate",
        "candidate_error",
    ]
    rows = table.filter(pl.col("candidate").is_finite()).select(wanted)
    for model, revision, read, seed, engine, metric, value, error in rows.iter_rows():
        parts = [model, revision, read, None if seed is None else f"seed {seed}", engine]
        name = told(" ".join(str(part) for part in parts if part is not None), _LONGEST_NAME)
        measure = {"value": value}
        if error is not None:
            measure |= {"lower_value": value - _CONFIDENCE * error, "upper_value": value + _CONFIDENCE * error}
        benchmarks.setdefault(name, {})[metric] = measure
    return json.dumps(benchmarks, indent=2, allow_nan=False)
