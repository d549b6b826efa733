"""Errors in one line: whose they are decides what is said, and no secret is."""

import json

import pytest

from deadbench.suite.errors import CheckpointError, first_line, message, one_line, reason_of

LONG = "https://me:hunter2@host/m?sig=abc " + "x" * 900


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CheckpointError("a: no\n such file"), "a: no such file"),
        (ValueError("too\twide"), "too wide"),
        (ValueError(), "ValueError"),
        (RuntimeError("boom\nat x"), "RuntimeError: boom at x"),
        (KeyError(), "KeyError"),
        (json.JSONDecodeError("bad", "{", 0), "JSONDecodeError: bad: line 1 column 1 (char 0)"),
    ],
)
def test_our_own_errors_speak_for_themselves_and_others_name_their_class(error, expected):
    assert one_line(error) == expected


@pytest.mark.parametrize(
    ("error", "line", "reason"),
    [
        (RuntimeError("  sizes differ\nTraceback: x"), "sizes differ", "RuntimeError: sizes differ"),
        (RuntimeError("Errors in loading:\n  size of w"), "Errors in loading: size of w", None),
        (RuntimeError(), "RuntimeError", "RuntimeError"),
    ],
)
def test_a_librarys_first_line_says_why(error, line, reason):
    assert first_line(error) == line
    assert reason_of(error) == (reason or f"RuntimeError: {line}")


@pytest.mark.parametrize("told", [message, one_line, first_line, reason_of])
def test_no_form_tells_a_secret_or_breaks_the_line(told):
    text = told(OSError(LONG))
    assert "hunter2" not in text
    assert "abc" not in text
    assert "\n" not in text


def test_lengths_are_limited_after_the_secrets_are_gone():
    assert len(message(ValueError(LONG))) == 200
    assert message(ValueError(LONG), None).endswith("x" * 900)
    assert len(one_line(ValueError(LONG))) == 300
    assert len(reason_of(OSError(LONG))) == len("OSError: ") + 200
