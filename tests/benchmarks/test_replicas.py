"""What a checkpoint costs beside what it saves, and what a second replica gives on two cores."""

import pytest
import torch
from torch import nn

from deadbench.runners.driver.driver import execute
from deadbench.runners.driver.loop import Settings
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.results.store import ResultStore
from deadbench.runners.worker.saved_state import Position, SavedRead
from deadbench.suite.architectures.kernel_test import live_norm, probe
from deadbench.suite.ranks import Ranks
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.reads.residual import ResidualRead
from deadbench.suite.registry.loading import load_registry

MODEL = "{model_type: gpt2, n_embd: 512, n_layer: 6, n_head: 8, vocab_size: 8192}"
SMALL = "{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, vocab_size: 100}"


def job(tmp_path, tokens, model=MODEL, **overrides):
    path = tmp_path / "models.yaml"
    path.write_text(
        f"protocols: {{standard: {{tokens: {tokens}}}}}\nsuites: {{}}\n"
        f"models: [{{id: m, config: {model}, input: 'tokens:random', dtype: float32}}]\n"
    )
    (job,) = build_jobs(load_registry(path), path, ["m"], None, ["random"], Overrides(**overrides))
    return job


@pytest.mark.benchmark(group="state of a read, 13 taps: time, and bytes in extra_info")
@pytest.mark.parametrize("hidden_size", [768, 2048])
@pytest.mark.parametrize("what", ["checkpoint", "the same bytes, written and synced", "restore"])
def test_checkpoint(benchmark, sized, tmp_path, hidden_size, what):
    hidden_size, taps = sized((hidden_size, 13), (32, 3))
    rows = 5 * hidden_size
    module = nn.LayerNorm(hidden_size).requires_grad_(False)
    measured = FinalNormRead(module, live_norm(module, probe(module, hidden_size), hidden_size))
    stream = ResidualRead(hidden_size, rows, "float32", "pre")
    stream.wanted = range(taps)
    acts = torch.randn(rows, hidden_size)
    for tap in range(taps):
        stream.update(tap, acts)
    measured.update(acts, module(acts))
    (read,) = job(tmp_path, 4096).checkpointed(1, str(tmp_path)).reads
    checkpoint = SavedRead(read, Ranks(), {}, possible=True)
    checkpoint.save(Position(batch=3), measured, stream, in_step=False)
    (file,) = (tmp_path / "_progress").iterdir()
    whole = file.read_bytes()
    benchmark.extra_info["bytes"] = len(whole)

    def save():
        checkpoint.save(Position(batch=3), measured, stream, in_step=False)
        return checkpoint.remark == ""

    def raw():
        import os

        with (tmp_path / "raw").open("wb") as out:
            out.write(whole)
            out.flush()
            os.fsync(out.fileno())
        return True

    def restore():
        again = FinalNormRead(module, measured.norm), ResidualRead(hidden_size, rows, "float32", "pre")
        return checkpoint.load(*again) == Position(batch=3)

    work = {"checkpoint": save, "restore": restore}.get(what, raw)
    assert benchmark.pedantic(work, rounds=3)


@pytest.mark.ray
@pytest.mark.benchmark(group="one model's tokens on 2 cores: forward and spectrum seconds in extra_info")
@pytest.mark.bench  # at a small size it is test_replicas of the worker
@pytest.mark.parametrize("replicas", [1, 2])
def test_replicas(benchmark, ray_session, sized, tmp_path, replicas):
    """One process has both cores; of two, each has one."""
    tokens, model = sized((32_768, MODEL), (256, SMALL))

    def read():
        store = ResultStore(str(tmp_path / "out"))
        jobs = [job(tmp_path, tokens, model, replicas=replicas)]
        assert execute(jobs, store, Settings("auto"), Reporter(1), "run").ok == 1

    benchmark.pedantic(read, rounds=1)
    import pyarrow.dataset as ds

    (row,) = ds.dataset(tmp_path / "out" / "reads").to_table().to_pylist()
    assert row["num_tokens"] == tokens
    benchmark.extra_info.update({name: row[name] for name in ("forward_seconds", "spectrum_seconds")})
