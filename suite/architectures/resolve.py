"""What a read must know of an architecture beside its weights, found once by running it once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from deadbench.suite.architectures.build import build_model
from deadbench.suite.architectures.locate import Inputs, search, search_without_weights
from deadbench.suite.architectures.norms import FinalNorm
from deadbench.suite.architectures.parts import part_of
from deadbench.suite.architectures.stored_names import naming
from deadbench.suite.tracing.minimal_inputs import takes_large


@dataclass(frozen=True)
class Resolved:
    """Which part of a model is read, where its final norm is, and in what form the part takes its input.

    Attributes:
        part: path of the part that is read, "" for the whole model.
        final: its final norm, by its path in the part; `rows_per_item` are those that `form` gives.
        form: the tensors of the minimal input that it was found on, on the CPU; empty where none was of use.
        skeleton: the whole model on the meta device; None where the part was looked into as it was loaded.
    """

    part: str
    final: FinalNorm
    form: Mapping[str, Tensor]
    skeleton: nn.Module | None = None

    @property
    def final_in_whole(self) -> FinalNorm:
        """The final norm by its path in the whole model."""
        return self.in_whole(self.final)

    def in_whole(self, norm: FinalNorm) -> FinalNorm:
        """A norm of the part by its path in the whole model."""
        return replace(norm, path=f"{self.part}.{norm.path}") if self.part and norm.path is not None else norm


def resolve(model: nn.Module, modality: str, stack: str, config: Any = None) -> Resolved:
    """Look into a loaded model; `modality` and `stack` name the part, as `part_of` has it.

    What the modules return is kept meanwhile, of large pictures and films gigabytes (V-JEPA 2: 12). Such a model is
    looked into without its values, as `config` gives it, if that shows its norm.
    """
    path, part = part_of(model, modality, stack)
    if config is not None and takes_large(part):
        final, inputs = search(build_model(config, "meta").get_submodule(path))
        if final.path is not None:
            return Resolved(path, final.named(naming(model)), _tensors(inputs))
    final, inputs = search(part)
    return Resolved(path, final.named(naming(model)), _tensors(inputs))


def resolve_without_weights(config: Any, modality: str = "text", stack: str = "encoder") -> Resolved:
    """The same of a configuration, for a model that no process ever has whole with its values.

    Raises:
        ArchitectureError: transformers cannot build it.
    """
    skeleton = build_model(config, "meta")
    path, _ = part_of(skeleton, modality, stack)
    final, inputs = search_without_weights(skeleton, config, path)
    return Resolved(path, final, _tensors(inputs), skeleton)


def _tensors(inputs: Inputs | None) -> Mapping[str, Tensor]:
    return {name: value for name, value in (inputs or {}).items() if isinstance(value, Tensor)}
