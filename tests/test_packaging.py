"""What is built and installed: `deadbench/` alone, whole, and at peace with other people's folders."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import polars as pl
import pytest
import yaml

from tests.conftest import ROOT, TWINS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ROOMS = ("suite", "runners", "analysis")
TWIN = TWINS / "layernorm" / "step4096"

# Imported and not declared: what an extra brings, and what only pytest imports.
OPTIONAL = {
    "vllm": "the extra [vllm]",
    "peft": "the extra [peft]",
    "gguf": "the extra [gguf]",
    "lightning": "the extra [lightning]",
    "mlflow": "the extra [mlflow]",
    "tensorboard": "the extra [tensorboard]",
    "wandb": "the extra [wandb]",
    "pytest": "runners/pytest_plugin.py, which pytest itself loads",
    "aiohttp": "fsspec's own way to the web: fsspec[http]",
    "aiobotocore": "the extra [s3], by s3fs",
    "botocore": "the extra [s3], by s3fs",
}


def run(*command, cwd, path=None, **environment):
    """A process of its own, which sees `path` and no other folder of ours; its output."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PYTEST_"))}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheels(sdist, tmp_path_factory):
    """The wheel of this folder, and that of the sdist."""
    built = []
    for source in (ROOT, sdist):
        folder = tmp_path_factory.mktemp("wheel")
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", folder)
        run("-m", "pip", "wheel", *options, source, cwd=folder)
        built += folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory):
    """A folder that holds what `pip install` of the wheel adds to site-packages."""
    target = tmp_path_factory.mktemp("site-packages")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheels[0], cwd=target)
    return target


@pytest.fixture(params=["folders", "a file"])
def repository(request, tmp_path):
    """Somebody's repository with names like those of our folders, none of which we may import."""
    ours = "raise RuntimeError(f'{__name__}: imported by somebody whom it is not for')\n"
    if request.param == "folders":
        for room in ROOMS:
            (tmp_path / room).mkdir()
            (tmp_path / room / "__init__.py").write_text(ours)
    else:
        (tmp_path / "suite.py").write_text(ours)
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\naddopts = -p no:cacheprovider\n")
    registry = {
        "protocols": {"standard": {"tokens": "4D"}},
        "suites": {"quick": {"protocol": "standard", "models": ["twin"], "reads": ["parameters"]}},
        "models": [{"id": "twin", "source": str(TWIN), "dtype": "float32", "input": "tokens:random"}],
    }
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(registry))
    return tmp_path


@pytest.mark.subprocess
def test_a_wheel_holds_one_package_whole(wheels):
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"deadbench", "deadbench-0.1.0.dist-info"}
    tracked = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    expected = {f"deadbench/{path.relative_to(ROOT)}" for path in tracked if "__pycache__" not in path.parts}
    assert len(expected) > 200
    expected |= {
        f"deadbench/{name}" for name in ("__init__.py", "__main__.py", "lightning.py", "py.typed", "transformers.py")
    }
    assert {name for name in names if name.startswith("deadbench/")} == expected
    assert {"deadbench/suite/data/models.yaml", "deadbench/suite/data/atlas.json"} <= expected


@pytest.mark.subprocess
def test_an_sdist_builds_the_same_wheel(wheels, sdist):
    contents = []
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            contents.append({name: wheel.read(name) for name in wheel.namelist()})
    assert contents[0] == contents[1]
    with tarfile.open(sdist) as opened:
        assert [member.name for member in opened if not member.isfile()] == [], "links would not survive everywhere"


@pytest.mark.subprocess
def test_it_works_beside_folders_of_the_same_names(installed, repository):
    where = "import deadbench.suite; print(deadbench.suite.__file__)"
    assert run("-c", where, cwd=repository, path=installed).strip() == str(installed / "deadbench/suite/__init__.py")
    (source,) = json.loads(run("-m", "deadbench", "classify", TWIN, "--json", cwd=repository, path=installed))[
        "sources"
    ]
    assert source["family"] == "layernorm"
    script = "from importlib.metadata import entry_points as e; (c,) = e(group='console_scripts', name='deadbench'); "
    script += "import sys; sys.argv[1:] = ['--version']; c.load()()"
    assert run("-c", script, cwd=repository, path=installed) == "0.1.0\n"


@pytest.mark.subprocess
def test_a_pytest_that_does_not_ask_for_us_is_left_alone(installed, repository):
    """With warnings as errors, from the command line and from a program that uses deadbench."""
    (repository / "conftest.py").write_text(
        "import sys\n\n\ndef pytest_unconfigure(config):\n    assert 'deadbench.runners.pytest_plugin' in sys.modules\n"
    )
    assert "1 passed" in run("-m", "pytest", cwd=repository, path=installed)
    script = "import sys, deadbench, pytest; sys.exit(pytest.main())"
    assert "1 passed" in run("-c", script, cwd=repository, path=installed)


@pytest.mark.subprocess
@pytest.mark.parametrize("repository", ["folders"], indirect=True)
def test_the_plugin_beside_folders_of_the_same_names(installed, repository):
    """Loaded by its entry point, in a repository whose warnings are errors."""
    said = run("-m", "pytest", "--deadbench", "models.yaml", "-v", cwd=repository, path=installed)
    assert "models.yaml::twin[parameters] PASSED" in said
    assert "2 passed" in said


@pytest.mark.subprocess
def test_the_models_that_come_with_a_wheel_are_found(installed, tmp_path):
    command = ("run", "twin-layernorm", "--reads", "parameters", "--address", "none", "--out", tmp_path / "out")
    assert "6 ok, 0 failed" in run("-m", "deadbench", *command, cwd=tmp_path, path=installed)
    assert "pythia-160m" in run("-m", "deadbench", "leaderboard", "reference", cwd=tmp_path, path=installed)


@pytest.mark.ray
@pytest.mark.subprocess
@pytest.mark.parametrize("repository", ["folders"], indirect=True)
def test_ray_workers_whose_folder_has_the_same_names(installed, repository):
    """Ray puts the working directory in front of a worker's path."""
    (repository / "job.py").write_text(
        "import ray\n"
        "from deadbench.runners.cli.main import main\n"
        "ray.init('local', num_cpus=1, include_dashboard=False, runtime_env={'working_dir': '.'})\n"
        "main()\n"
    )
    command = ("run", "--registry", "models.yaml", "--reads", "parameters", "--out", repository / "out")
    said = run("job.py", *command, cwd=repository, path=installed, RAY_USAGE_STATS_ENABLED="0")
    assert "1 ok, 0 failed" in said
    (row,) = pl.read_parquet(repository / "out" / "reads" / "*.parquet").to_dicts()
    assert (row["family"], row["status"]) == ("layernorm", "ok")


@pytest.mark.subprocess
def test_a_clone_without_links_runs(tmp_path):
    """As an archive or Windows leaves it: each link is a file that says where it led."""
    clone = tmp_path / "clone"
    for folder in ("deadbench", *ROOMS):
        shutil.copytree(ROOT / folder, clone / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "models.yaml", clone)
    links = [path for path in clone.rglob("*") if path.is_symlink()]
    assert len(links) == len(ROOMS) + 1
    for link in links:
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)
    where = "import deadbench.suite; print(deadbench.suite.__file__)"
    assert Path(run("-c", where, cwd=clone).strip()) == clone / "suite" / "__init__.py"
    assert run("-m", "deadbench", "--version", cwd=clone) == "0.1.0\n"
    (source,) = json.loads(run("-m", "deadbench", "classify", TWIN, "--json", cwd=clone))["sources"]
    assert source["family"] == "layernorm"
    assert "gpt2" in run("-m", "deadbench", "plan", "gpt2", "--reads", "parameters", "--assume", "1x24GB", cwd=clone)


@pytest.mark.subprocess
def test_python_m_imports_nothing_of_the_folder_that_it_is_started_in(tmp_path):
    for name in ("typer", "polars", "suite", "runners", "sitecustomize", "usercustomize", "conftest"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the checkpoint')\n")
    (tmp_path / "a.pth").write_text("import polars\n")
    assert run("-m", "deadbench", "--version", cwd=tmp_path, path=ROOT / ".editable") == "0.1.0\n"


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    files = [path for folder in ("deadbench", *ROOMS) for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    imported = set().union(*map(_imported, files)) - set(sys.stdlib_module_names) - {"deadbench"}
    assert set(OPTIONAL) <= imported
    distributions = metadata.packages_distributions()
    needed = {_normal(name) for module in imported - set(OPTIONAL) for name in distributions[module]}
    declared = {_normal(re.match(r"[\w-]+", line)[0]) for line in PROJECT["dependencies"]}
    assert needed == declared


def _imported(path):
    """Top-level names that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}}


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_has_its_tested_version():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_normal(line.split("==")[0]) for line in lines if not line.startswith("#")}
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    assert {_normal(re.match(r"[\w-]+", line)[0]) for line in asked} <= pinned


def test_the_lock_has_every_requirement_at_its_tested_version_and_by_its_hashes():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {_normal(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}
    locked, cuda = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("requirements.lock", "requirements-cuda.lock")
    )
    pins = {_normal(name): version for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", locked, re.MULTILINE)}
    assert {name: tested.get(name) for name in pins} == pins, "make lock"
    assert {_normal(re.match(r"[\w-]+", line)[0]) for line in PROJECT["dependencies"]} <= pins.keys()
    assert cuda.startswith("-r requirements.lock\n")
    assert tested.keys().isdisjoint(re.findall(r"^([\w.-]+)==", cuda, re.MULTILINE))
    for text in (locked, cuda.partition("\n")[2]):
        entries = re.split(r"\n(?=\w)", text.strip())
        assert entries
        for entry in entries:
            assert re.fullmatch(r"[\w.-]+==[\w.]+( ;[^\\]*)?( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry[:80]


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_there_are_workflows():
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_of_the_makefile(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    commands = [step["run"].split() for job in jobs for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        assert command[0] == "make"
        assert command[1] in targets


def test_the_tested_versions_of_python_are_those_that_are_promised():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == ">=3.11"


def test_a_release_is_uploaded_without_a_token():
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))["jobs"]
    publish = jobs["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert "secrets" not in json.dumps(jobs)


@pytest.mark.subprocess
def test_hooks_run_before_a_commit_what_make_check_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    checked = {" ".join(line.split()[0:2]) for line in recipe.replace("$(BIN)", ".venv/bin").splitlines()}
    assert {re.sub(r" \.$", "", " ".join(hook["entry"].split()[:2])) for hook in hooks} == checked
    run("-m", "pre_commit", "validate-config", ".pre-commit-config.yaml", cwd=ROOT)
