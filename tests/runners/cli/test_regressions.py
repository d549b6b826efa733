"""Planted regressions, end to end: real reads of doctored twins, caught by the gate and found by the bisection."""

import json
import shutil
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from deadbench.runners.cli.bisect import bisect_series, most_reads
from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.jobs.events import Finished
from deadbench.runners.worker.run import run_model
from tests.conftest import ROOT, TWINS

pytestmark = pytest.mark.slow

NUM_CHECKPOINTS, BROKEN_FROM = 8, 5
FINAL_SCALE = "gpt_neox.final_layer_norm.weight"


def shrink(tensors):
    """The final scales ten times smaller."""
    tensors[FINAL_SCALE] = tensors[FINAL_SCALE] / 10


def zero_one(tensors):
    """One final scale zeroed."""
    tensors[FINAL_SCALE][7] = 0


def remove_direction(tensors):
    """A direction taken out of all that is written to the residual stream."""
    width = len(tensors[FINAL_SCALE])
    u_D = np.random.default_rng(0).normal(size=width)
    u_D -= u_D.mean()  # across the final norm's own kernel
    u_D /= np.linalg.norm(u_D)
    for name, tensor in tensors.items():
        if name.endswith("embed_in.weight"):
            tensors[name] = tensor - np.outer(tensor @ u_D, u_D)
        elif name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            tensors[name] = tensor - np.outer(u_D, u_D @ tensor)
        elif name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
            tensors[name] = tensor - u_D * (u_D @ tensor)


@pytest.fixture
def series(tmp_path):
    """A registry whose model breaks at a known checkpoint."""

    def make(fault):
        for step in range(NUM_CHECKPOINTS):
            folder = tmp_path / "twin" / f"step{step}"
            shutil.copytree(TWINS / "layernorm" / "step4096", folder)
            tensors = {name: t.astype(np.float32) for name, t in load_file(folder / "model.safetensors").items()}
            if step >= BROKEN_FROM:
                fault(tensors)
            save_file({name: np.ascontiguousarray(t, np.float32) for name, t in tensors.items()},
                      folder / "model.safetensors", {"format": "pt"})  # fmt: skip
        registry = {
            "protocols": {"standard": {"tokens": "4D", "sequence_length": 64}},
            "suites": {},
            "models": [{
                "id": "twin", "source": "twin", "family": "layernorm", "dtype": "float32", "input": "tokens:random",
                "checkpoints": {"pattern": "step{step}", "steps": list(range(NUM_CHECKPOINTS))},
            }],
        }  # fmt: skip
        (tmp_path / "models.yaml").write_text(yaml.safe_dump(registry))
        return tmp_path / "models.yaml"

    return make


@pytest.fixture
def without_ray(monkeypatch):
    """The reads in this process: an actor's start takes seconds, and its way is another test's."""

    def execute(jobs, store, settings, reporter, run_id):
        for event in run_model(jobs[0], run_id, 1):
            if isinstance(event, Finished):
                store.write(event.tables)

    monkeypatch.setattr("deadbench.runners.cli.bisect.execute_at", lambda address: execute)


@pytest.mark.parametrize(
    ("fault", "metric", "read"),
    [
        (shrink, "scale_harmonic", "parameters"),
        (zero_one, "num_zero_scales", "parameters"),
        (remove_direction, "num_learned", "trained"),
    ],
)
def test_a_planted_regression_is_found_and_breaks_the_gate(
    without_ray, deadbench, series, tmp_path, fault, metric, read
):
    registry, out = series(fault), str(tmp_path / "out")
    found = bisect_series([out], "twin", metric, None, registry, None, None, lambda line: None)
    assert (found.first_failing, found.last_passing) == (f"step{BROKEN_FROM}", f"step{BROKEN_FROM - 1}")
    # Only what the bisection needs was read, and with the cheapest read that knows the metric.
    reads = pl.read_parquet(f"{out}/reads/*.parquet")
    assert reads["read"].unique().to_list() == [read]
    assert sorted(reads["revision"]) == sorted(found.checkpoints_read)
    assert len(reads) <= most_reads(NUM_CHECKPOINTS) == 5

    gate, junit = ROOT / "examples" / "gate.yaml", tmp_path / "gate.xml"
    sides = [f"{out}@step0", f"{out}@step{BROKEN_FROM}"]
    code, printed, err = deadbench("compare", *sides, "--gate", gate, "--junit", junit)
    assert code == 1
    assert metric in printed
    assert "checks broke" in err
    assert [f.get("type") for f in ElementTree.parse(junit).iter("failure")].count("broken") >= 1
    # An unchanged rerun passes: another checkpoint of the same weights.
    assert deadbench("compare", f"{out}@step0", f"{out}@step{BROKEN_FROM - 1}", "--gate", gate)[0] == 0

    # A second bisection of the same series reads nothing again.
    again = bisect_series([out], "twin", metric, None, registry, None, None, lambda line: None)
    assert again == found
    assert len(pl.read_parquet(f"{out}/reads/*.parquet")) == len(reads)


def test_a_direction_removed_from_a_block_is_found_and_pinpointed(
    without_ray, deadbench, series, tmp_path, monkeypatch
):
    """No weights do that in a pre-LN model, whose blocks add: a hook on the third block projects the direction out."""
    registry, out = series(lambda tensors: None), str(tmp_path / "out")
    load = TorchEngine.load_trained

    def load_broken(self, folder, dtype):
        model = load(self, folder, dtype)
        if int(folder.name.removeprefix("step")) >= BROKEN_FROM:
            u_D = torch.zeros(model.config.hidden_size).index_fill(0, torch.tensor([7]), 1.0)
            model.layers[2].register_forward_hook(lambda block, args, output: output - (output @ u_D)[..., None] * u_D)
        return model

    monkeypatch.setattr(TorchEngine, "load_trained", load_broken)
    found = bisect_series([out], "twin", "blocks_preserved", None, registry, None, None, lambda line: None)
    assert (found.first_failing, found.last_passing) == (f"step{BROKEN_FROM}", f"step{BROKEN_FROM - 1}")
    sides = [f"{out}@step0", f"{out}@step{BROKEN_FROM}"]
    code, printed, _ = deadbench("compare", *sides, "--gate", ROOT / "examples" / "gate.yaml", "--format", "github")
    assert code == 1
    (line,) = [line for line in printed.splitlines() if "blocks preserved" in line or "blocks_preserved" in line]
    assert "block 3" in line
    (block,) = json.loads(deadbench("families", out, "--json")[1])["collapsed_blocks"]
    assert (block["revision"], block["block"], block["bottom_coordinates"][0]) == (f"step{NUM_CHECKPOINTS - 1}", 3, 7)


def test_a_checkpoint_that_cannot_be_read_stops_the_bisection(without_ray, deadbench, series, tmp_path):
    registry, out = series(zero_one), tmp_path / "out"
    (tmp_path / "twin" / f"step{NUM_CHECKPOINTS - 1}" / "model.safetensors").write_bytes(b"broken")
    code, _, err = deadbench(
        "trend", out, "--model", "twin", "--bisect", "num_zero_scales", "--registry", registry, "--json"
    )
    assert code == 2
    assert f"step{NUM_CHECKPOINTS - 1} parameters: could not be read" in err.splitlines()[-1]


def test_bisection_through_the_command_line(ray_session, deadbench, series, tmp_path):
    registry, out = series(lambda tensors: None), tmp_path / "out"
    arguments = ["trend", out, "--model", "twin", "--bisect", "num_zero_scales", "--registry", registry]
    code, printed, _ = deadbench(*arguments)
    assert (code, printed) == (0, "twin: num_zero_scales holds at the last checkpoint (2 of 8 checkpoints read)\n")
