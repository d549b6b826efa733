"""What of a stranger's words is shown, and that no path leads around it."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadbench.suite.plain_text import MAX_VALUE, plain
from tests.conftest import ROOT

SHOWS = {"plain", "message", "one_line", "first_line", "reason_of", "refusal", "_told", "_explain"}
PRINTS = {"print", "echo"}


@given(st.text(st.characters(codec=None, exclude_categories=())), st.sampled_from([None, 60, MAX_VALUE]))
def test_it_is_one_printable_line_of_that_length(words, limit):
    line = plain(words, limit)
    assert line.isprintable()
    assert limit is None or len(line) <= limit


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a\nb\t c", "a b c"), ("\x1b[31m", "\\x1b[31m"), ("m\u202eodel", "m\\u202eodel"), ("\ud800", "\\ud800"),
        ("a\u2028b", "a b"), ("模型", "模型"), ("", ""),
    ],
)  # fmt: skip
def test_what_is_not_printable_is_escaped(words, expected):
    assert plain(words) == expected


def test_the_end_stays_where_the_advice_is():
    long = plain("x" * 10_000_000 + "; download it again")
    assert len(long) == MAX_VALUE
    assert long.endswith("; download it again")


def raw_names(node, caught):
    """Names of caught errors in an expression, outside of a function that shows them."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in SHOWS:
        return []
    here = [node.id] if isinstance(node, ast.Name) and node.id in caught else []
    return here + [name for child in ast.iter_child_nodes(node) for name in raw_names(child, caught)]


def around(tree):
    """Lines that print a caught error as it is."""
    lines = []
    for handler in (each for each in ast.walk(tree) if isinstance(each, ast.ExceptHandler) and each.name):
        for call in (each for each in ast.walk(handler) if isinstance(each, ast.Call)):
            if getattr(call.func, "id", getattr(call.func, "attr", "")) in PRINTS:
                lines += [call.lineno for each in call.args if raw_names(each, {handler.name})]
    return lines


def test_no_error_is_printed_around_it():
    assert around(ast.parse("try: x()\nexcept E as e:\n  print(f'no: {e}')")) == [3], "the walk finds what it looks for"
    assert around(ast.parse("try: x()\nexcept E as e:\n  print(message(e))")) == []
    files = [path for room in ("suite", "runners", "analysis", "deadbench") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    assert [(str(f.relative_to(ROOT)), n) for f in files for n in around(ast.parse(f.read_text("utf-8")))] == []
