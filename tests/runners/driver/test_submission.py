"""`ray job submit` and `ray submit` against real clusters with token authentication, and what is sent there."""

import subprocess
import sys
import zipfile

import polars as pl
import pytest

from deadbench.runners.results.store import ResultStore
from tests.conftest import ROOT
from tests.runners.clusters import ray_cluster
from tests.runners.launcher import launched_cluster, missing_programs

MAX_UPLOAD_BYTES = 20 * 2**20
TWIN = "suite/data/twins/layernorm"  # as the job finds it, below its working directory


def test_what_is_uploaded_is_small_and_enough(tmp_path):
    """By Ray's own packaging, ignore files and all."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    assert package.stat().st_size < MAX_UPLOAD_BYTES
    with zipfile.ZipFile(package) as opened:
        names = set(opened.namelist())
    needed = {
        "models.yaml",
        "pyproject.toml",
        "deadbench/__init__.py",
        "runners/cli/main.py",
        "suite/data/atlas.json",
        "analysis/results.py",
    }
    assert needed <= names
    assert [name for name in names if name.startswith((".git/", ".venv/", "tests/", "docs/", "results/"))] == []


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster() as running:
        yield running


@pytest.mark.ray
def test_a_submitted_job_leaves_a_whole_result_set(cluster, tmp_path):
    run = f"python -m deadbench run {TWIN}/step16 --tokens 256 --input tokens:random --address auto"
    # A relative place is refused in one line; an absolute one is written.
    script = f"{run} --out results; test $? = 2 && {run} --out {tmp_path}/out"
    submitted = cluster.ray(
        "job", "submit", f"--address={cluster.dashboard}", "--working-dir", str(ROOT), "--", "sh", "-c", script
    )
    told = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, told
    assert "--out results: a Ray job runs in a folder that Ray deletes" in told
    assert "3 ok, 0 failed, 0 already there" in told
    rows = pl.read_parquet(tmp_path / "out" / "reads" / "*.parquet")
    assert sorted(zip(rows["read"], rows["status"], strict=True)) == [
        ("parameters", "ok"), ("random", "ok"), ("trained", "ok"),
    ]  # fmt: skip
    assert len(ResultStore(str(tmp_path / "out")).finished()) == 3
    assert set(pl.read_parquet(tmp_path / "out" / "spectra" / "*.parquet")["read"]) == {"random", "trained"}
    assert cluster.environment["RAY_AUTH_TOKEN"] not in told
    attach = [sys.executable, "-m", "deadbench", "attach", cluster.dashboard]
    environment = cluster.environment | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "http://127.0.0.1:1"}
    followed = subprocess.run(attach, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert followed.returncode == 0, followed.stderr
    assert "3 ok, 0 failed, 0 already there" in followed.stderr, "what the job printed"
    assert followed.stdout.endswith(" succeeded, exit code 0\n")


@pytest.mark.ray
def test_nobody_without_the_token_gets_in(cluster):
    refused = cluster.ray("job", "list", f"--address={cluster.dashboard}", RAY_AUTH_MODE=None, RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode != 0
    assert "nauthor" in refused.stdout + refused.stderr or "401" in refused.stdout + refused.stderr


@pytest.mark.ray
@pytest.mark.skipif(bool(missing_programs()), reason=f"not installed here: {', '.join(missing_programs())}")
def test_ray_up_and_ray_submit_leave_a_whole_result_set(tmp_path):
    """`ray submit` copies one script: the rest is what the cluster's file mounts."""
    with launched_cluster() as cluster:
        run = ["run", f"~/deadbench/{TWIN}/step16", "--registry", "~/deadbench/models.yaml", "--address", "auto"]
        arguments = [*run, "--tokens", "256", "--input", "tokens:random", "--out", str(tmp_path / "out")]
        submitted = cluster.ray("submit", "--no-config-cache", "deadbench/__main__.py", "--", *arguments)
        told = submitted.stdout + submitted.stderr
        assert submitted.returncode == 0, told
    assert "3 ok, 0 failed, 0 already there" in told
    assert cluster.token not in told
    rows = pl.read_parquet(tmp_path / "out" / "reads" / "*.parquet")
    assert sorted(zip(rows["read"], rows["status"], strict=True)) == [
        ("parameters", "ok"), ("random", "ok"), ("trained", "ok"),
    ]  # fmt: skip
    assert len(ResultStore(str(tmp_path / "out")).finished()) == 3
    assert rows["source"].str.contains("/node/deadbench/").all(), "what was mounted was read"
