"""`import deadbench`: its names, signatures and examples are frozen, and importing it costs nothing."""

import inspect
import re
import subprocess
import sys

import pytest

import deadbench
from tests.conftest import ROOT, TWINS

SIGNATURES = {
    "classify": "(source: str | pathlib.Path, config: str | pathlib.Path | collections.abc.Mapping[str, typing.Any] | "
    "None = None) -> dict[str, typing.Any]",
    "measure": "(model: 'nn.Module', batches: collections.abc.Iterable[typing.Any] | None = None, *, "
    "reads: collections.abc.Sequence[str] | None = None, final_norm: 'str | nn.Module | None' = None, "
    "blocks: 'str | nn.Module | Sequence[nn.Module] | None' = None, taps: str = 'all', max_tokens: int | str = '64D', "
    "accumulator_gb: float | None = None) -> 'Reading'",
    "scan": "(results: str | pathlib.Path | collections.abc.Sequence[str | pathlib.Path], table: str = 'reads') "
    "-> 'pl.LazyFrame'",
    "leaderboard": "(results: str | pathlib.Path, *, sort: str = 'depth', family: str | None = None) -> 'pl.DataFrame'",
    "families": "(results: str | pathlib.Path) -> 'pl.DataFrame'",
    "compare": "(baseline: str | pathlib.Path, candidate: str | pathlib.Path, *, "
    "gate: str | pathlib.Path | None = None) -> 'pl.DataFrame'",
    "trend": "(results: str | pathlib.Path, model: str, *, metrics: collections.abc.Sequence[str] | None = None)"
    " -> 'pl.DataFrame'",
}
HEAVY = {"torch", "transformers", "ray", "polars", "pyarrow", "numpy", "pydantic", "typer", "rich", "yaml", "fsspec"}


def test_the_names_are_frozen():
    assert sorted(deadbench.__all__) == sorted([*SIGNATURES, "__version__"])
    assert deadbench.__version__ == "0.1.0"
    assert sorted(
        name for name in vars(deadbench) if inspect.isfunction(getattr(deadbench, name)) and name[0] != "_"
    ) == (sorted(SIGNATURES))
    with pytest.raises(AttributeError, match="'deadbench' has no attribute 'measured'"):
        deadbench.measured  # noqa: B018


def live():
    """A model and batches for it."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(97, 16), torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))
    return {"model": model, "batches": [torch.randint(97, (8, 32))]}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures_are_frozen(name):
    found = str(inspect.signature(getattr(deadbench, name)))
    assert found.replace("pathlib._local.", "pathlib.") == SIGNATURES[name]  # as Python 3.13 names it


@pytest.mark.parametrize("name", SIGNATURES)
def test_each_example_runs(name, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "quick").symlink_to(ROOT / "tests" / "data" / "quick")
    (tmp_path / "my-checkpoint").symlink_to(TWINS / "layernorm" / "step4096")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"Example: `(.+?)`", getattr(deadbench, name).__doc__)
    assert examples
    for example in examples:
        assert example.startswith(f"deadbench.{name}(")
        answer = eval(example, {"deadbench": deadbench, **(live() if name == "measure" else {})})
        assert (answer if isinstance(answer, float) else len(answer)) > 0


@pytest.mark.subprocess
def test_importing_it_imports_nothing():
    """Nor do the command line and the registry of commands: `deadbench --help` needs Typer and no more."""
    script = "import sys, {module}; heavy = {heavy} & set(sys.modules); sys.exit(', '.join(sorted(heavy)) or 0)"
    for module, allowed in (("deadbench", set()), ("deadbench.runners.cli.main", {"typer", "rich"})):
        command = [sys.executable, "-c", script.format(module=module, heavy=HEAVY - allowed)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
