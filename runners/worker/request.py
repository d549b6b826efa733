"""What a read asks of an engine: weights, inputs, names, parts."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from deadbench.runners.jobs.job import ReadJob
from deadbench.suite.architectures.norms import FinalNorm
from deadbench.suite.architectures.resolve import Resolved
from deadbench.suite.architectures.stored_tensors import StoredTensors
from deadbench.suite.checkpoints.tensors import TensorEntry
from deadbench.suite.inputs.batches import Inputs
from deadbench.suite.inputs.feed import feed


@dataclass(frozen=True)
class RandomWeights:
    """Weights as transformers initialises them; `folder` has the tokenizer or processor, None where none is needed."""

    seed: int
    folder: Path | None = None


@dataclass(frozen=True)
class StoredWeights:
    """A checkpoint in a local folder, its tokenizer or processor beside it, the headers of its tensors, its format.

    Raises:
        TypeError, ValueError: no folder. Without one there are no weights, and random ones never take their place.
    """

    folder: Path
    entries: dict[str, TensorEntry]
    format: str = "safetensors"

    def __post_init__(self) -> None:
        if not Path(self.folder).is_dir():
            raise ValueError(f"{self.folder}: no folder with weights")


Weights = RandomWeights | StoredWeights


def entries_of(weights: Weights) -> dict[str, TensorEntry] | None:
    """The stored tensors, where there are any."""
    return weights.entries if isinstance(weights, StoredWeights) else None


def make_inputs(
    read: ReadJob,
    part: nn.Module,
    folder: Path | None,
    num_tokens: int,
    batch_tokens: int,
    *,
    least_items: int = 1,
    resolved: Resolved | None = None,
) -> Inputs:
    """What the part of the model that is read is fed, in batches of about `batch_tokens`.

    What is `resolved` of it is not looked for again.
    """
    assert read.input is not None
    return feed(
        part,
        read.input,
        modality=read.model.modality,
        num_tokens=num_tokens,
        sequence_length=read.protocol.sequence_length,
        skip_positions=read.protocol.skip_positions,
        seed=read.seed,
        folder=folder,
        batch_tokens=batch_tokens,
        least_items=least_items,
        form=resolved.form if resolved else None,
        final=resolved.final if resolved else None,
    )


def tensor_name(entries: dict[str, TensorEntry] | None, final: FinalNorm) -> str | None:
    """The name of the final norm's scale in the checkpoint."""
    if entries is None or final.path is None:
        return None
    found = StoredTensors(entries, final.naming).find(final.path, final.behaviour.scale_parameter)
    return found[0].stored_name if len(found) == 1 else None
