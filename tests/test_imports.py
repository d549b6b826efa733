"""The rooms and who may import whom: import-linter sees every file through the links, and its contracts can break."""

import ast
import re
import shutil
import subprocess
import sys

import grimp
import pytest

from tests.conftest import ROOT

TOPS = ("suite", "runners", "analysis")
ROOMS = [path.parent for top in TOPS for path in sorted((ROOT / top).rglob("__init__.py"))]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The sources and their contracts, where something may be planted."""
    folder = tmp_path_factory.mktemp("copy")
    for each in ("deadbench", *TOPS):
        ignored = shutil.ignore_patterns("__pycache__", "data")
        shutil.copytree(ROOT / each, folder / each, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(folder):
    command = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache', '--no-logo'])"
    return subprocess.run(
        [sys.executable, "-c", command], cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )


@pytest.mark.subprocess
def test_the_contracts_hold(copy):
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("file", "imported"),
    [
        ("suite/spectra/directions.py", "deadbench.suite.reads.rows"),  # up
        ("suite/reads/rows.py", "deadbench.suite.inputs.specs"),  # sideways
        ("analysis/results.py", "deadbench.analysis.leaderboard"),  # round
        ("suite/schema.py", "deadbench.analysis.cells"),
        ("analysis/cells.py", "deadbench.runners.results.store"),
        ("runners/worker/request.py", "deadbench.analysis.cells"),
        ("runners/engines/base.py", "deadbench.runners.jobs.job"),
        ("runners/jobs/job.py", "deadbench.runners.engines.resident"),
        ("runners/driver/books.py", "deadbench.runners.worker.forward"),
        ("runners/census/census.py", "deadbench.runners.jobs.job"),
        ("suite/unplaced.py", "json"),
    ],
)
def test_a_planted_import_breaks_one(copy, file, imported):
    path = copy / file
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.write_text((before or "") + f"\n\ndef planted():\n    import {imported}\n", encoding="utf-8")
    try:
        done = lint(copy)
    finally:
        path.unlink() if before is None else path.write_text(before, encoding="utf-8")
    assert done.returncode == 1
    assert path.stem in done.stdout.split("Broken contracts")[-1]


def test_every_file_is_seen_through_the_links():
    files = {path.relative_to(ROOT).with_suffix("") for top in TOPS for path in (ROOT / top).rglob("*.py")}
    expected = {"deadbench." + ".".join(path.parts).removesuffix(".__init__") for path in files}
    assert len(expected) > 100
    assert expected <= grimp.build_graph("deadbench", cache_dir=None).modules


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_rooms_door_says_what_it_is_for_and_does_nothing(room):
    source = (room / "__init__.py").read_text(encoding="utf-8")
    (only,) = ast.parse(source).body
    text = ast.literal_eval(only.value)
    assert text.count("\n") == 0
    # The README's tree has the same line.
    name = f"{room.name}/"
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## How it is built")[1].split("```")[1]
    assert re.search(rf"^ *{name} +{re.escape(text.rstrip('.'))}$", tree, re.MULTILINE), f"{name} {text}"


def test_every_folder_with_code_is_a_room():
    folders = {path.parent for top in TOPS for path in (ROOT / top).rglob("*.py")}
    assert folders == set(ROOMS)
