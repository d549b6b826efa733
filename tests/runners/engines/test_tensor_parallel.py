"""Torch tensor parallel on two real ranks (gloo): the rows of one process, and no hang when a rank is lost."""

import os
import signal
import threading
import time

import polars as pl
import psutil
import pytest
from polars.testing import assert_frame_equal

from deadbench.runners.cluster import actors
from deadbench.runners.driver.driver import execute
from deadbench.runners.driver.loop import Settings
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.job import JobError, Overrides
from deadbench.runners.reporting.progress import Reporter
from deadbench.runners.results.store import ResultStore
from deadbench.suite.registry.loading import load_registry
from tests.conftest import TINY_NEOX, save_tiny

pytestmark = pytest.mark.ray

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip
AT_THE_ROUNDING_FLOOR = ("depth", "depth_exact", "depth_as_executed")  # of a kernel: what is left there is rounding


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    save_tiny(folder / "neox", TINY_NEOX | {"num_attention_heads": 2})
    save_tiny(folder / "llama", LLAMA)
    (folder / "models.yaml").write_text(
        "protocols: {standard: {tokens: 8D}}\nsuites: {}\nmodels:\n"
        "  - {id: neox, source: neox, input: 'tokens:random', dtype: float32}\n"
        "  - {id: llama, source: llama, input: 'tokens:random', dtype: float32}\n"
    )
    return folder / "models.yaml"


def run(registry, out, models, degree, reads=None):
    jobs = build_jobs(load_registry(registry), registry, models, None, reads, Overrides(tensor_parallel=degree))
    settings = Settings("auto", timeout=300)
    return execute(jobs, ResultStore(str(out)), settings, Reporter(len(jobs)), f"run-{degree}")


def table(out, name):
    keys = {"reads": ["model", "read"], "blocks": ["model", "read", "block"]}[name]
    return pl.scan_parquet(out / name / "*.parquet").collect().sort(keys)


@pytest.fixture(scope="module")
def both(ray_session, registry, tmp_path_factory):
    out = tmp_path_factory.mktemp("rows")
    for degree in (1, 2):
        summary = run(registry, out / str(degree), ["neox", "llama"], degree)
        assert (summary.ok, summary.failed) == (6, 0), summary.reads
    return out / "1", out / "2"


def test_two_ranks_give_the_row_of_one(both):
    one, two = (table(out, "reads").filter(pl.col("read") != "parameters") for out in both)
    assert one["tensor_parallel"].to_list() == [1] * 4
    assert two["tensor_parallel"].to_list() == [2] * 4
    for detail in two["engine_detail"]:
        assert "tensor parallel over 2 ranks (gloo)" in detail
        assert "differs from the unsharded model by" in detail
    names = ["model", "read", "family", "final_norm", "num_tokens", "lambda_min_resolved", "kernel_exact"]
    assert_frame_equal(one.select(names), two.select(names))
    numbers = ["lambda_mean", "lambda_max", "lambda_second", "lambda_control", "worst_block_ratio", "alignment"]
    assert_frame_equal(one.select(numbers), two.select(numbers), rel_tol=1e-4)
    for name in AT_THE_ROUNDING_FLOOR:
        assert (one[name] - two[name]).abs().max() < 0.3
        rms = [frame.filter(pl.col("family") == "rmsnorm")[name] for frame in (one, two)]
        assert (rms[0] - rms[1]).abs().max() < 1e-4


def test_the_ranks_divide_the_blocks_and_none_is_missing(both):
    one, two = (table(out, "blocks") for out in both)
    names = ["model", "read", "block", "state", "rank_limited", "preserved"]
    assert_frame_equal(one.select(names), two.select(names))
    assert_frame_equal(one.select("sigma_min", "sigma_max"), two.select("sigma_min", "sigma_max"), rel_tol=1e-4)


def test_a_degree_that_does_not_divide_the_heads_is_refused_before_anything_starts(registry):
    with pytest.raises(JobError, match="3 devices do not divide its 2 attention heads; choose one of 1, 2"):
        build_jobs(load_registry(registry), registry, ["llama"], None, None, Overrides(tensor_parallel=3))


def test_a_rank_that_dies_ends_the_group(ray_session, registry, tmp_path, monkeypatch):
    start, born, killed = actors.start, [], []

    def watched(*args):
        group = start(*args)
        born.append(group)
        threading.Thread(target=kill_rank_1, args=(group,), daemon=True).start()
        return group

    def kill_rank_1(group):
        import ray

        _, pid, _ = ray.get(group.homes[1])
        time.sleep(1)
        killed.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr("deadbench.runners.driver.loop.start", watched)
    summary = run(registry, tmp_path, ["llama"], 2, ["random", "trained"])
    assert summary.ok + summary.failed == 2
    assert summary.failed >= 1
    assert time.monotonic() - killed[0] < 60  # the collective itself would wait for hours
    errors = table(tmp_path, "reads").filter(status="failed")["error"]
    assert all("rank 1 of 2: " in error and "died" in error for error in errors)
    assert not any(psutil.pid_exists(ray_pid(home)) for home in born[0].homes)


def ray_pid(home):
    import ray

    return ray.get(home)[1]
