"""Of which weights a forward pass can be had, told before they are loaded; and who is told of where one fails."""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from deadbench.runners.engines.registry import ENGINES
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.errors import UndeterminedError, one_line


def refuse_without_pass(checkpoint: Checkpoint, engine: str | None) -> None:
    """Return where a forward pass can be had of a checkpoint by `engine`.

    Raises:
        ValueError: it cannot be translated to transformers' model, what a translation leaves out is not zero, an
            adapter cannot be merged, or a package that unpacks its weights is not installed; one line.
    """
    from deadbench.runners.engines.merged_adapter import why_not_merged
    from deadbench.suite.checkpoints.adapters import AdaptedCheckpoint
    from deadbench.suite.checkpoints.quantised import why_not_run

    translation = checkpoint.translation()
    if translation.unfit:
        raise ValueError(f"{checkpoint.source}: no forward pass: {translation.unfit}, or --reads parameters")
    translation.check(checkpoint)
    reason = why_not_merged(checkpoint) if isinstance(checkpoint, AdaptedCheckpoint) else None
    if engine is None or ENGINES[engine].in_process:  # others unpack weights themselves
        reason = reason or why_not_run(checkpoint.config(), checkpoint.source)
    if reason:
        raise ValueError(reason)


# Modules that show a bar for each model, on stderr, whatever they are told; by what weights are quantised by.
_BARS = {"compressed-tensors": "compressed_tensors.compressors.model_compressors.model_compressor"}


@contextmanager
def naming_who_unpacks(checkpoint: Checkpoint) -> Iterator[None]:
    """Around passes: what a library raises over quantised weights is told with the method that they are quantised by.

    Its package may have no kernel for a width or a device, and says so in terms of its own.
    """
    from deadbench.suite.checkpoints.quantised import method_of

    method = method_of(checkpoint.config())
    try:
        with _without_bars(method):
            yield
    except Exception as error:
        from deadbench.runners.engines.device import cause_of

        ours = isinstance(error, ValueError) or type(error).__module__.startswith("deadbench.")
        if method is None or (ours and not isinstance(error, UndeterminedError)) or cause_of(error):
            raise
        raise ValueError(
            f"{one_line(error)}; the weights are quantised by {method}, which may not run them here: give those that "
            "they were made of, or --reads parameters"
        ) from error


@contextmanager
def _without_bars(method: str | None) -> Iterator[None]:
    """What a run says is its own lines: the bars of who unpacks weights are not shown."""
    module, shown = None, None
    with suppress(ImportError):
        module = importlib.import_module(_BARS[method]) if method in _BARS else None
        shown = getattr(module, "tqdm", None)
    if shown is None:
        yield
        return
    try:
        module.tqdm = functools.partial(shown, disable=True)  # type: ignore[union-attr]
        yield
    finally:
        module.tqdm = shown  # type: ignore[union-attr]
