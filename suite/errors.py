"""What may go wrong with what a user gives, as classes; and any error as one line."""

from deadbench.suite.secrets import scrubbed


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file, what is wrong and what to do."""


class ArchitectureError(ValueError):
    """A configuration that transformers cannot build."""


class RemoteCodeError(ArchitectureError):
    """A configuration that needs code from the checkpoint, which is never run."""


class InputError(ValueError):
    """An input that cannot be had or does not fit the model; one line."""


def one_line(error: BaseException) -> str:
    """What went wrong, in one line; our own errors speak for themselves, others name their class."""
    text = scrubbed(" ".join(str(error).split()))[:500]
    ours = type(error).__module__.startswith("deadbench.") or type(error) is ValueError
    return text if ours and text else f"{type(error).__name__}: {text}".rstrip(": ")
