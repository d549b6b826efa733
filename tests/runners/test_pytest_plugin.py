"""pytest --deadbench in a process of its own: benchmarks made of reads, compared like any others."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT, TWINS

pytestmark = pytest.mark.subprocess


@pytest.fixture
def project(tmp_path):
    """A folder with a registry of one twin, and a test of its own."""
    registry = {
        "protocols": {"standard": {"tokens": "4D", "sequence_length": 64}, "quick": {"tokens": "4D"}},
        "suites": {"quick": {"protocol": "standard", "models": ["twin"], "reads": ["parameters", "trained"]}},
        "models": [
            {"id": "twin", "source": str(TWINS / "layernorm"), "dtype": "float32", "input": "tokens:random",
             "checkpoints": ["step16", "step4096"]},
            {"id": "broken", "source": str(TWINS / "absent")},
        ],
    }  # fmt: skip
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(registry))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "deadbench.runners.pytest_plugin", "-q", *arguments]
        ours = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}  # in which nothing is timed
        environment = ours | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return subprocess.run(
            [*command, "-p", "pytest_benchmark.plugin"], cwd=tmp_path, env=environment, text=True, capture_output=True
        )

    return run


def test_reads_are_benchmarks_with_the_science_beside_the_time(project, tmp_path):
    first = project("--deadbench", "models.yaml", "-k", "step16", "--benchmark-json", "out.json")
    assert first.returncode == 0, first.stdout + first.stderr
    found = {entry["fullname"]: entry for entry in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    assert set(found) == {
        "models.yaml::twin[step16-parameters]",
        "models.yaml::twin[step16-trained]",
        "models.yaml::twin[step16-trained-depth]",
    }
    trained, depth = (found[f"models.yaml::twin[step16-{name}]"] for name in ("trained", "trained-depth"))
    assert trained["extra_info"]["kernel_exact"] is True
    assert trained["stats"]["mean"] > 0
    assert depth["stats"]["mean"] == pytest.approx(40 - trained["extra_info"]["depth"], abs=1e-12)
    assert trained["group"] != depth["group"]


def test_a_loss_of_depth_fails_benchmark_compare(project, tmp_path):
    arguments = ["--deadbench", "models.yaml", "-k", "step4096-trained-depth"]
    assert project(*arguments, "--benchmark-autosave").returncode == 0
    # The saved run as if it had been a decade deeper.
    (saved,) = (tmp_path / ".benchmarks").glob("*/*.json")
    content = json.loads(saved.read_text())
    content["benchmarks"][0]["stats"]["mean"] -= 1
    saved.write_text(json.dumps(content))
    worse = project(*arguments, "--benchmark-compare", "--benchmark-compare-fail=mean:0.5")
    assert worse.returncode != 0
    assert "Performance has regressed" in worse.stdout + worse.stderr


def test_a_failed_read_fails_its_test_with_its_error(project):
    done = project("--deadbench", "models.yaml", "--deadbench-models", "broken", "--deadbench-reads", "parameters")
    assert done.returncode == 1
    assert "broken parameters: " in done.stdout
    assert "no such directory" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_bad_registry_is_a_usage_error(project, tmp_path):
    done = project("--deadbench", "none.yaml")
    assert done.returncode == 4
    assert "none.yaml: no such registry file" in done.stdout + done.stderr


def test_unused_it_imports_nothing_heavy(project, tmp_path):
    """Loaded by its entry point, beside no other plugin, whose imports are not ours."""
    script = (
        "import sys, pytest; code = pytest.main(['-q', '-p', 'deadbench', 'test_own.py']); "
        "heavy = {'torch', 'transformers', 'ray', 'polars', 'pyarrow', 'pydantic', 'yaml', 'typer', 'numpy'}; "
        "assert 'deadbench.runners.pytest_plugin' in sys.modules; "
        "sys.exit(code or ', '.join(heavy & set(sys.modules)) or 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
