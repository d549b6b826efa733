"""Terminals that lack letters: every command and format prints, whatever the encoding of stdout."""

import json
import os
import subprocess
import sys

import pytest

from deadbench.runners.cli.console import FORMATS
from tests.conftest import ROOT, TINY_NEOX, write_checkpoint

pytestmark = pytest.mark.subprocess

QUICK = "tests/data/quick"
TABLES = {
    "leaderboard": ["leaderboard", QUICK],
    "families": ["families", QUICK],
    "dead": ["dead", "tests/data/minilm"],
    "compare": ["compare", f"{QUICK}@step0", f"{QUICK}@step4096"],
    "gate": ["compare", f"{QUICK}@step4096", f"{QUICK}@step16", "--gate", "examples/gate.yaml"],
    "trend": ["trend", QUICK, "--model", "twin-layernorm"],
}
# Every command line in one process: importing takes longer than printing.
ALL = """
import contextlib, json, sys
from deadbench.runners.cli.main import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["deadbench", *command]
    print("===", flush=True)
    try:
        main()
    except SystemExit as done:
        print(f"--- {done.code}", flush=True)
"""


def play(commands, encoding):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", ALL, json.dumps([list(map(str, each)) for each in commands])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert b"codec" not in done.stderr + done.stdout
    outputs = [part.rsplit("--- ", 1) for part in done.stdout.decode(encoding).split("===\n")[1:]]
    return [(text, int(code)) for text, code in outputs], done.stderr.decode(encoding)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_every_command_and_format_prints(tmp_path, encoding):
    folder = write_checkpoint(tmp_path / "模型-é", TINY_NEOX, {})
    commands = {(name, format): [*arguments, "--format", format] for name, arguments in TABLES.items()
                for format in FORMATS}  # fmt: skip
    commands["gate", "github"] = [*TABLES["gate"], "--format", "github"]
    commands["compare", "bencher"] = [*TABLES["compare"], "--format", "bencher"]
    commands["report", None] = ["report", QUICK, "-o", tmp_path / "é模.html"]
    commands["classify", None] = ["classify", folder]
    commands["classify", "json"] = ["classify", folder, "--json"]
    commands["error", None] = ["leaderboard", tmp_path / "没有"]
    commands["help", None] = ["--help"]
    commands["plan", None] = ["plan", "gpt2", "--assume", "1x24GB"]
    played, said = play(commands.values(), encoding)
    printed = dict(zip(commands, played, strict=True))
    wanted = {"gate": 1, "error": 2, "classify": 1}
    assert {key: code for key, (_, code) in printed.items()} == {key: wanted.get(key[0], 0) for key in commands}
    assert "| o.oo## |" in printed["trend", "md"][0]
    assert json.loads(printed["classify", "json"][0])["sources"][0]["source"] == str(folder)
    assert "&#9601;" in printed["trend", "html"][0], "a page keeps its sparks"
    assert "no such result set" in said


def test_a_terminal_that_has_the_letters_gets_them():
    (text, code), *_ = play([TABLES["trend"]], "utf-8")[0]
    assert code == 0
    assert "▇▁▇▇██" in text


def test_a_folder_can_be_told_on_stderr_that_lacks_its_letters():
    _, said = play([["leaderboard", "没有…"]], "latin-1")
    assert "\\u6ca1\\u6709...: no such result set" in said
