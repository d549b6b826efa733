"""Every command's tables on narrow terminals: a number is whole or absent, a name may fold and is never cut."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from deadbench.runners.cli import console
from tests.conftest import ROOT

QUICK, MINILM = ROOT / "tests" / "data" / "quick", ROOT / "tests" / "data" / "minilm"
GATE = ROOT / "examples" / "gate.yaml"
TWIN = "suite/data/twins/layernorm/step4096"
COMMANDS = {
    "leaderboard": ["leaderboard", QUICK],
    "leaderboard of zero scales": ["leaderboard", MINILM],
    "leaderboard of two": ["leaderboard", QUICK, MINILM, "--sort", "hidden_size"],
    "families": ["families", QUICK],
    "families of zero scales": ["families", MINILM],
    "dead": ["dead", MINILM],
    "dead in every checkpoint": ["dead", QUICK, "--all"],
    "compare": ["compare", f"{QUICK}@step0", f"{QUICK}@step4096"],
    "gate": ["compare", f"{QUICK}@step4096", f"{QUICK}@step16", "--gate", GATE, "--all"],
    "trend": ["trend", QUICK, "--model", "twin-layernorm"],
    "trend of asked metrics": ["trend", QUICK, "--model", "twin-rmsnorm", "--metric", "lambda_v", "--metric", "depth"],
    "classify": ["classify", TWIN, "suite/data/twins/rmsnorm/step0", "/no/such"],
    "plan": ["plan", "gpt2", "pythia-160m", "twin-layernorm", "--assume", "1x24GB"],
}
HEADLINES = {
    "leaderboard": ["#", "model", "depth"],
    "leaderboard of two": ["model", "D"],
    "families": ["claim", "holds"],
    "dead": ["model", "coordinates", "depth"],
    "compare": ["model", "metric", "baseline", "candidate"],
    "gate": ["verdict", "metric", "baseline", "candidate"],
    "trend": ["step", "depth"],
    "trend of asked metrics": ["step", "lambda v", "depth"],
    "classify": ["source", "family", "depth"],
    "plan": ["model", "peak"],
}
NUMBER = re.compile(r"-?[\d.]+(e[+-]\d+)?[kMBT]?( %)?|-")


def printed(deadbench, monkeypatch, command, width):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("deadbench.runners.cli.console.PLAIN_WIDTH", width)
    return deadbench(*COMMANDS[command])[1]


def tables(text):
    """Each table as (header, joined cells, list of its lines' cells) from left to right; notes below are left out."""
    lines = [line.rstrip() for line in text.splitlines()]
    found = []
    for place in (i for i, line in enumerate(lines) if line.strip() and not line.strip("─ ")):
        end = next((i for i in range(place, len(lines)) if lines[i][:1].strip()), len(lines))  # a note, or a title
        top = max(i for i in range(place) if not lines[i].strip())
        heads = lines[top + 1 : place]
        rows = [line for line in lines[place + 1 : end] if line.strip()]
        length = max(map(len, [*heads, *rows]))
        taken = [any(line.ljust(length)[i] != " " for line in [*heads, *rows]) for i in range(length)]
        columns, start = [], None
        for i in range(length + 2):
            if i < length and taken[i]:
                start = i if start is None else start
            elif start is not None and not any(taken[i : i + 2]):
                columns.append((start, i))
                start = None
        cut = [[line.ljust(length)[a:b].strip() for line in rows] for a, b in columns]
        names = [" ".join(line.ljust(length)[a:b].strip() for line in heads).strip() for a, b in columns]
        found.append([(n, "".join(c).replace(" ", ""), c) for n, c in zip(names, cut, strict=True)])
    return found


def blocks(text):
    """The (header, value) pairs of a vertical table, folded values joined."""
    pairs = []
    for line in text.splitlines():
        if match := re.match(r"(\S[^\n]*?)(?:  +)(\S.*)$", line.rstrip()):
            pairs.append([match[1], match[2]])
        elif pairs and line.startswith("   "):
            pairs[-1][1] += line.strip()
    return [(header, value.replace(" ", "")) for header, value in pairs]


@pytest.mark.parametrize("width", [40, 80, *(pytest.param(each, marks=pytest.mark.slow) for each in (60, 100, 140))])
@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_are_whole_and_names_fold(deadbench, monkeypatch, command, width):
    wide = tables(printed(deadbench, monkeypatch, command, 1000))
    narrow = printed(deadbench, monkeypatch, command, width)
    assert wide
    assert max(map(len, narrow.splitlines())) <= width
    assert "…" not in narrow.replace("(s3://…)", "")
    shown = tables(narrow)
    vertical = blocks(narrow) if len(shown) < len(wide) else []
    for expected in wide:
        titles = {name for name, _, _ in expected}
        same = [t for t in shown if {name for name, _, _ in t} <= titles and _fits(t, expected)]
        if not same:
            whole = {(name, cell.replace(" ", "")) for name, _, cells in expected for cell in cells}
            told = [pair for pair in vertical if pair in whole]
            count = len(expected[0][2])
            assert len(told) >= count * min(3, len(expected)), f"{expected} is not in\n{narrow}"
    if width < 100:
        for name in HEADLINES.get(command, []):
            assert any(name == n for t in shown for n, _, _ in t) or any(name == n for n, _ in vertical), name


def _fits(table, expected):
    """Every column that is shown has its cells whole: a number in one line, a text over several."""
    cells = {}
    for name, joined, lines in expected:  # two may have the same header
        cells.setdefault(name, []).append((joined, lines))
    for name, joined, lines in table:
        of_name = cells[name]
        if all(NUMBER.fullmatch(line) for line in of_name[0][1]):
            if [line for line in lines if line] not in [whole for _, whole in of_name]:
                return False
        elif joined not in [whole for whole, _ in of_name]:
            return False
    return True


@pytest.mark.parametrize("width", [40, 60, 80])
def test_every_model_is_there(deadbench, monkeypatch, width):
    monkeypatch.setattr("deadbench.runners.cli.console.PLAIN_WIDTH", width)
    models = {row["model"] for row in json.loads(deadbench("leaderboard", QUICK, MINILM, "--json")[1])["leaderboard"]}
    (table,) = tables(deadbench("leaderboard", QUICK, MINILM)[1])
    column = next(joined for name, joined, _ in table if name == "model")
    assert len(models) > 6
    assert all(model in column for model in models)


def test_what_is_left_out_is_named_with_the_way_to_see_it(deadbench, monkeypatch):
    out = " ".join(printed(deadbench, monkeypatch, "leaderboard", 80).split())
    (named,) = re.findall(r"not shown, for want of width: (.*); --format json or csv has all", out)
    assert "worst_block_ratio" in named.split(", ")
    row = json.loads(deadbench("leaderboard", QUICK, "--json")[1])["leaderboard"][0]
    assert set(named.split(", ")) <= set(row)
    assert "not shown" not in printed(deadbench, monkeypatch, "leaderboard", 1000)


@pytest.mark.subprocess
def test_a_terminals_own_width_counts():
    """As on a screen: a pseudo-terminal, with its width in COLUMNS."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "60", "PYTHONPATH": str(ROOT), "TERM": "xterm", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "deadbench", *map(str, COMMANDS["compare"])]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    text = b""
    try:
        while piece := os.read(ours, 65536):
            text += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    words = re.sub(r"\x1b\[[\d;]*m", "", text.decode()).replace("\r", "")
    assert max(map(len, words.splitlines())) <= 60
    assert "4.24e-14" in words


def test_a_plan_that_is_piped_has_engine_and_gpus_beside_long_notes(deadbench):
    out = deadbench("plan", "qwen3-8b", "gemma-4-31b", "--assume", "8x80GB", "--replicas", "2")[1]
    (shown,) = tables(out)
    assert {"engine", "GPUs", "peak", "note"} <= {name for name, _, _ in shown}
    assert max(map(len, out.splitlines())) <= 150


def test_of_a_long_table_the_first_rows_are_laid_out_and_the_rest_is_told(deadbench, monkeypatch):
    monkeypatch.setattr(console, "MOST_ROWS", 3)
    whole = json.loads(deadbench("leaderboard", QUICK, "--json")[1])["leaderboard"]
    assert len(whole) > 3
    told = f"deadbench: leaderboard: the first 3 of {len(whole)} rows; --format json has all\n"
    for format in ("table", "html", "latex"):
        _, out, err = deadbench("leaderboard", QUICK, "--format", format)
        assert err == told
        assert str(whole[2]["model"]) in out
    for format in ("json", "csv", "md"):
        assert deadbench("leaderboard", QUICK, "--format", format)[2] == ""
