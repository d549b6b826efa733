"""The documents do what they say: every example is run on a stored quick result set, and its output compared.

`UPDATE_DOCS=1 pytest tests/test_docs.py` writes the output of this version into the documents.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
STORED = Path(__file__).parent / "data"  # what the documents' runs wrote: results/quick, results/minilm
INSIDE_VLLM = re.compile(r"^(?:from|import) vllm\b", re.MULTILINE)  # what runs there imports it
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)
SHOWING = [  # a document that calls python starts it
    pytest.param(path, marks=pytest.mark.subprocess if "\n$ python" in path.read_text("utf-8") else pytest.mark.slow)
    for path in DOCS
]
MEASURES = (
    "deadbench run",
    "deadbench export",
    "deadbench census",
    "deadbench reproduce",
    "deadbench doctor",
    "deadbench attach",
    "deadbench watch",
    "--bisect",
)  # takes minutes, and has tests of its own


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder as the documents take it to be."""
    shutil.copytree(STORED, tmp_path / "results")
    shutil.copy(ROOT / "examples" / "gate.yaml", tmp_path)
    for folder in ("suite", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deadbench.runners.cli.console.PLAIN_WIDTH", 150)
    return tmp_path


@pytest.mark.parametrize("path", SHOWING, ids=lambda path: path.name)
def test_commands_print_what_the_document_shows(workplace, deadbench, path):
    text = path.read_text(encoding="utf-8")
    shown = [block.group(1) for block in CONSOLE.finditer(text)]
    ran = [_played(block, deadbench) for block in shown]
    if os.environ.get("UPDATE_DOCS"):
        replacements = iter(ran)
        path.write_text(CONSOLE.sub(lambda _: f"```console\n{next(replacements)}```", text), encoding="utf-8")
    assert ran == shown


def _played(block, deadbench):
    """The block with each command's real output; `…` stands for whatever is left out."""
    played = []
    for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
        played.append(f"$ {command}\n")
        program, *arguments = shlex.split(command)
        if any(word in command for word in MEASURES):
            flags = [word for word in arguments if word.startswith("--")]
            _, usage, _ = deadbench(arguments[0], "--help")
            assert [flag for flag in flags if flag not in usage] == []
            played.append(output)
            continue
        if program == "python":
            environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            out, err = done.stdout, ""
        else:
            code, out, err = deadbench(*arguments)
            assert code == ("checks broke" in err), err
        lines = [line.rstrip() for line in (out + err).splitlines()]
        lines = [line for before, line in zip(["", *lines], lines, strict=False) if line or before]  # no double blanks
        real = "\n".join(lines).strip("\n") + "\n"
        start = output.split("…\n")[0]
        played.append(output if "…\n" in output and real.startswith(start) else real)
    return "".join(played)


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md"], ids=lambda path: path.name)
def test_python_examples_run(workplace, monkeypatch, path):
    from deadbench.analysis.claims import CLAIMS

    monkeypatch.setattr("deadbench.analysis.families.CLAIMS", CLAIMS)
    before = dict(CLAIMS)
    try:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            exec(compile(block, path.name, "exec"), {})
    finally:
        CLAIMS.clear()
        CLAIMS.update(before)


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_gate_in_the_document_is_valid(tmp_path):
    from deadbench.analysis.gate import load_gate

    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "gate.yaml").write_text(shown, encoding="utf-8")
    assert set(load_gate(tmp_path / "gate.yaml").metrics) == {"depth", "num_learned", "worst_block_ratio"}


def test_the_registries_in_the_document_hold(tmp_path):
    from deadbench.suite.registry.loading import load_registry

    shown = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "registry.md").read_text(encoding="utf-8"), re.DOTALL)
    path, ids = tmp_path / "models.yaml", []
    for text in shown:
        path.write_text(text, encoding="utf-8")
        ids += [model.id for model in load_registry(path).models]
    assert ids == ["run0", "pythia-160m", "olmo", *(f"pythia-14m-seed{seed}" for seed in range(1, 10)), "run0"]
    assert len(shown[0].splitlines()) == 3


def test_the_glossary_is_the_programs_own():
    from deadbench.analysis.glossary import TERMS

    shown = re.findall(
        r"^- \*\*(.+?)\*\*: (.*)$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert dict(shown) == TERMS
    assert list(TERMS) == sorted(TERMS)


def test_every_command_has_an_example_in_the_documents():
    from typer.main import get_command

    from deadbench.runners.cli.main import app

    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCS)
    commands = get_command(app).commands
    assert {"leaderboard", "families", "compare", "trend", "report", "publish"} <= set(commands)
    assert [name for name in commands if f"$ deadbench {name}" not in text] == []


@pytest.mark.subprocess
def test_every_module_has_a_page_of_its_interface(tmp_path):
    """As `make docs` makes them; a module that does not import alone, or a broken docstring, fails here."""
    (recipe,) = re.findall(r"\$\(BIN\)/pdoc (.*) -o site", (ROOT / "Makefile").read_text(encoding="utf-8"))
    files = [path for room in ("suite", "runners", "analysis") for path in (ROOT / room).rglob("*.py")]
    modules = {path.relative_to(ROOT).with_suffix("") for path in files if path.stem not in ("__init__", "__main__")}
    assert len(modules) > 100
    inside = {each for each in modules if INSIDE_VLLM.search((ROOT / each).with_suffix(".py").read_text("utf-8"))}
    left_out = inside if importlib.util.find_spec("vllm") is None else set()
    names, options = recipe.split(" --", 1)
    apart = [f"!deadbench.{'.'.join(each.parts)}" for each in left_out]
    command = [sys.executable, "-m", "pdoc", *names.split(), *apart, *f"--{options}".split(), "-o", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).with_suffix("") for path in tmp_path.rglob("*.html")}
    assert {Path("deadbench", module) for module in modules - left_out} <= pages
    assert [page for page in pages if "tests" in page.parts] == []
    assert "inverse_scale_direction" in (tmp_path / "deadbench/suite/spectra/directions.html").read_text()
