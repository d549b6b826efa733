"""Random-init reads at the true dimensions of published models, block by block on a CPU: `pytest -m full`.

Minutes to an hour and gigabytes each; figures go to docs/measurements.md.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

READ = """
import json, sys
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.worker.run import run_model
from deadbench.suite.registry.loading import find_registry, load_registry
model, tokens, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
path = find_registry(None)
overrides = Overrides(tokens=tokens, input="tokens:random", dtype=dtype, engine="streaming")
(job,) = build_jobs(load_registry(path), path, [model], None, ["random"], overrides)
for event in run_model(job, "run", 1):
    if not isinstance(event, Finished):
        print(event.phase, event.done, event.total, file=sys.stderr, flush=True)
names = ("status", "error", "num_tokens", "hidden_size", "peak_host_bytes", "load_seconds", "forward_seconds",
         "spectrum_seconds", "alignment", "depth", "blocks_preserved")
print(json.dumps({name: event.row[name] for name in names}))
"""


@pytest.mark.subprocess
@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "tokens", "dtype", "gigabytes"),
    [
        pytest.param("pythia-1.4b", 4 * 2048, "float32", 6, id="pythia-1.4b, N = 4D"),
        pytest.param("pythia-6.9b", 4096 + 512, "bfloat16", 24, id="pythia-6.9b, N = D + 512"),
    ],
)
def test_a_read_at_true_dimensions(model, tokens, dtype, gigabytes):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, model, str(tokens), dtype],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row, indent=2))
    assert (row["status"], row["num_tokens"]) == ("ok", tokens), row["error"]
    assert row["peak_host_bytes"] < gigabytes * 1e9
    assert row["alignment"] > 0.99
    assert row["depth"] > (10 if dtype == "float32" else 3)
