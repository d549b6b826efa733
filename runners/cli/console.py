"""What the commands share: exit codes, options, one-line errors, tables on a terminal."""

import codecs
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deadbench.suite.plain_text import plain

EXIT_FALSE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
FORMATS = ("table", "json", "csv", "md", "html", "latex")
_LAID_OUT = ("table", "html", "latex")  # a millisecond or more a row
MOST_ROWS = 2000  # of a table so laid out
PLAIN_WIDTH = 150  # columns of a table that is not printed to a terminal

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Format = Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")]
Results = Annotated[list[str], typer.Argument(metavar="RESULTS...", help="Result sets: folders or URIs.")]

# How a terminal whose encoding lacks them shows our own signs; of any other letter it shows a question mark.
_ASCII = dict(zip("▁▂▃▄▅▆▇█", ".:-~=+o#", strict=True)) | {
    "…": "...", "±": "+/-", "×": "x", "−": "-", "γ": "gamma", "λ": "lambda", "✅": "passed:", "❌": "failed:",
}  # fmt: skip
_LENIENT = ("replace", "backslashreplace", "namereplace", "xmlcharrefreplace", "ignore")


class UserError(Exception):
    """A mistake of the user's, in one line; exit code 2."""


def one_of(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """Refuse a `value` of `option` that is not `allowed`; None is."""
    if value is not None and value not in allowed:
        raise UserError(f"{option} {value!r} is unknown; choose {', '.join(allowed)}")


def check_out(out: str) -> None:
    """Refuse what RESULTS calls the set that comes with deadbench, and a relative folder of a Ray job, which goes."""
    from deadbench.suite.secrets import shown_place
    from deadbench.suite.storage import REFERENCE, is_url

    if out == REFERENCE:
        raise UserError(f"--out {out}: so the result set that comes with deadbench is called; give another, or ./{out}")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not is_url(out) and not Path(out).is_absolute():
        raise UserError(
            f"--out {shown_place(out)}: a Ray job runs in a folder that Ray deletes; give an absolute path or a URI (s3://…)"
        )


def print_anywhere() -> None:
    """Let stdout and stderr take every letter, whatever their encoding."""
    codecs.register_error("deadbench", lambda error: _in_ascii(error, lambda letter: "?"))
    codecs.register_error("deadbench escaped", lambda error: _in_ascii(error, _escaped))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "backslashreplace":  # stderr, if nobody asked else
            stream.reconfigure(errors="deadbench escaped")
        elif isinstance(stream, io.TextIOWrapper) and stream.errors not in _LENIENT:
            stream.reconfigure(errors="deadbench")


def _in_ascii(error: UnicodeError, otherwise: Callable[[str], str]) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join(_ASCII.get(letter) or otherwise(letter) for letter in letters), error.end


def _escaped(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode()


def console() -> Any:
    """The terminal on stdout; a wide one where stdout is a file."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)


def print_frames(frames: dict[str, Any], format: str, keep: Sequence[str] = ()) -> None:
    """Data frames by title, on stdout: tables, one JSON document, or text one after another.

    A terminal shows the columns that fit it, those in `keep` always. csv has no place for a second table and prints the
    first one only. What is laid out for eyes has the first rows of a table, and stderr says how many are left out.
    """
    from deadbench.analysis.formats import render, rich_table

    one_of("--format", format, FORMATS)
    if format in _LAID_OUT:
        for title, frame in frames.items():
            if len(frame) > MOST_ROWS:
                say(f"deadbench: {title}: the first {MOST_ROWS:,} of {len(frame):,} rows; --format json has all")
        frames = {title: frame.head(MOST_ROWS) for title, frame in frames.items()}
    if format == "table":
        terminal = console()
        for title, frame in frames.items():
            terminal.print(rich_table(frame, title, width=terminal.width, keep=keep))
        return
    text = render(frames, format)
    if format == "html" and "utf" not in (sys.stdout.encoding or "").lower():
        text = text.encode("ascii", "xmlcharrefreplace").decode()  # the page itself says that it is UTF-8
    print(text)


def model_named(results: Any, name: str) -> str:
    """The model of `results` that `name` means: its own spelling, another one of its folder, or the folder's last part.

    A name that means none, or several, comes back as it is.
    """
    from deadbench.analysis.lines import distinct
    from deadbench.analysis.results import collected
    from deadbench.suite.secrets import shown_place

    name = shown_place(name)  # as rows name it
    known = distinct(collected(results.select("model"))["model"])
    plain = os.path.normpath(name)
    for fits in (
        lambda model: model == name,
        lambda model: os.path.normpath(model) == plain,
        lambda model: os.path.abspath(model) == os.path.abspath(plain),
        lambda model: f"/{os.path.normpath(model)}".endswith(f"/{plain}"),
    ):
        found = [model for model in known if fits(model)]
        if len(found) == 1:
            return str(found[0])
    return name


def check_folder(option: str, path: Path | None) -> None:
    """Raise UserError where the folder of the file at `path` is not there."""
    if path is not None and not path.resolve().parent.is_dir():
        raise UserError(f"{option} {path}: no such directory")


def say(words: Any) -> None:
    """One line on stderr."""
    typer.echo(plain(str(words), None), err=True)
