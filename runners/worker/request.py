"""What a read asks of an engine: inputs, names, parts."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from deadbench.runners.jobs.job import ReadJob
from deadbench.suite.architectures.norms import FinalNorm
from deadbench.suite.architectures.stored_names import stored_tensor
from deadbench.suite.checkpoints.tensors import TensorEntry
from deadbench.suite.inputs.batches import Inputs
from deadbench.suite.inputs.feed import feed


def make_inputs(
    read: ReadJob, part: nn.Module, folder: Path | None, num_tokens: int, batch_tokens: int, least_items: int = 1
) -> Inputs:
    """What the part of the model that is read is fed, in batches of about `batch_tokens`."""
    assert read.input is not None
    return feed(
        part,
        read.input,
        modality=read.model.modality,
        num_tokens=num_tokens,
        sequence_length=read.protocol.sequence_length,
        seed=read.seed,
        folder=folder,
        batch_tokens=batch_tokens,
        least_items=least_items,
    )


def below(path: str, final: FinalNorm) -> FinalNorm:
    """`final`, found in the part at `path`, as the whole model calls it."""
    return final if final.path is None or not path else replace(final, path=f"{path}.{final.path}")


def tensor_name(entries: dict[str, TensorEntry] | None, final: FinalNorm) -> str | None:
    """The name of the final norm's scale in the checkpoint."""
    if entries is None or final.path is None:
        return None
    entry = stored_tensor(entries, final.path, final.behaviour.scale_parameter, final.renamings)
    return entry.name if entry else None
