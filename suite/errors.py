"""What may go wrong with what a user gives, as classes; and any error as one line."""

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


class InputError(ValueError):
    """An input that cannot be had or does not fit the model; one line."""


def one_line(error: BaseException, limit: int | None = 500) -> str:
    """What went wrong, in one line; our own errors speak for themselves, others name their class."""
    text = message(error, limit)
    ours = type(error).__module__.startswith("deadbench.") or type(error) is ValueError
    return text if ours or text == type(error).__name__ else f"{type(error).__name__}: {text}"


def message(error: BaseException, limit: int | None = 200) -> str:
    """All that an error says, in one line of at most `limit` characters and without secrets; its class if nothing."""
    return scrubbed(" ".join(str(error).split()))[:limit] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of a library's error, which says why and is followed by where; its class if there is none."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    # A heading says nothing without the line below it.
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return scrubbed(text) or type(error).__name__


def reason_of(error: BaseException) -> str:
    """The class of a library's error and its first line."""
    text = first_line(error)
    return (text if text == type(error).__name__ else f"{type(error).__name__}: {text}")[:300]
