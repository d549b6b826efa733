"""Of which weights a forward pass can be had, told before they are loaded."""

from deadbench.runners.engines.registry import ENGINES
from deadbench.suite.checkpoints.checkpoint import Checkpoint


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
