"""What may go wrong with what a user gives, as classes; any error as one line; and the boundary around a source."""

import contextlib
from collections.abc import Iterator

from deadbench.suite.plain_text import MAX_LINE, MAX_VALUE, plain
from deadbench.suite.secrets import scrubbed


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file, what is wrong and what to do."""


class UnreachableError(CheckpointError):
    """A checkpoint whose server cannot be reached, or must not be: of the checkpoint itself it says nothing."""


class ChangedError(CheckpointError):
    """A file is another one than when it was first asked for."""


class ArchitectureError(ValueError):
    """A configuration that transformers cannot build."""


class RemoteCodeError(ArchitectureError):
    """A configuration that needs code from the checkpoint, which is never run."""


class ElsewhereError(ArchitectureError):
    """A stranger's file that names something outside the checkpoint, which would have to be fetched."""


class UndeterminedError(ValueError):
    """A model whose final norm its behaviour does not tell; one line."""


class InputError(ValueError):
    """An input that cannot be had or does not fit the model; one line."""


@contextlib.contextmanager
def one_source(called: str) -> Iterator[None]:
    """The boundary around what one source makes others raise: our own errors pass, any other is a CheckpointError.

    What a stranger's configuration, file or name makes a library raise is nobody's to foresee, and the other sources of
    a command go on.
    """
    try:
        yield
    except BaseException as error:
        if not is_of_work(error) or type(error).__module__.startswith("deadbench."):
            raise
        raise CheckpointError(plain(f"{plain(scrubbed(called))}: {one_line(error, MAX_VALUE)}", None)) from error


def is_of_work(error: BaseException) -> bool:
    """Whether an error is of what was done: an Exception, or a panic of a library in Rust, which is none."""
    return isinstance(error, Exception) or is_panic(error)


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust has panicked; each has such a class of its own."""
    return type(error).__name__ == "PanicException"


def one_line(error: BaseException, limit: int | None = MAX_LINE) -> str:
    """What went wrong, in one line; our own errors speak for themselves, others name their class."""
    text = message(error, limit)
    ours = type(error).__module__.startswith("deadbench.") or type(error) is ValueError
    return text if ours or text == type(error).__name__ else plain(f"{type(error).__name__}: {text}", limit)


def message(error: BaseException, limit: int | None = MAX_VALUE) -> str:
    """All that an error says, in one line of at most `limit` characters and without secrets; its class if nothing."""
    return plain(scrubbed(" ".join(_words(error).split())), limit) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of a library's error, which says why and is followed by where; its class if there is none."""
    lines = [line.strip() for line in _words(error).strip().splitlines()] or [""]
    # A heading says nothing without the line below it.
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return plain(scrubbed(text)) or type(error).__name__


def reason_of(error: BaseException) -> str:
    """The class of a library's error and its first line."""
    text = first_line(error)
    return plain(text if text == type(error).__name__ else f"{type(error).__name__}: {text}", MAX_LINE)


def _words(error: BaseException) -> str:
    """What an error says; its class where it cannot."""
    try:
        return str(error)
    except Exception:  # of an object that a stranger's bytes made
        return type(error).__name__
