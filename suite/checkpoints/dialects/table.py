"""The dialects, a line each: how one is known, and into which architectures of transformers it is translated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deadbench.suite.checkpoints.dialects import (
    fairseq,
    litgpt,
    llama_cpp,
    megatron,
    nanogpt,
    open_clip,
    transformer_bridge,
    transformer_lens,
)
from deadbench.suite.checkpoints.dialects.tensors import Tensors, as_floats
from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.tensors import Contents, TensorEntry, read_raw
from deadbench.suite.errors import CheckpointError

_Into = Callable[[Tensors, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Dialect:
    """One library's names and forms.

    Attributes:
        name: in messages.
        is_it: whether tensors have its names.
        into: by transformers' model types, what makes that model's tensors of them.
        alone: nothing else has its names; else only checkpoints of those model types are taken for it.
    """

    name: str
    is_it: Callable[[Tensors], bool]
    into: Mapping[str, _Into]
    alone: bool = True


_LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
DIALECTS = (
    Dialect("nanoGPT", nanogpt.is_nanogpt, {"gpt2": nanogpt.as_gpt2}, alone=False),
    Dialect(
        "litGPT",
        litgpt.is_litgpt,
        dict.fromkeys(_LLAMAS, litgpt.as_llama) | {"gpt_neox": litgpt.as_neox, "phi": litgpt.as_phi},
    ),
    Dialect(
        transformer_lens.TRANSFORMER_LENS,
        transformer_lens.is_transformer_lens,
        {
            "gpt2": transformer_lens.as_gpt2,
            "gpt_neox": transformer_lens.as_neox,
            **dict.fromkeys(("llama", "mistral", "qwen2"), transformer_lens.as_llama),
        },
    ),
    Dialect(
        "TransformerLens 4",
        transformer_bridge.is_transformer_bridge,
        {
            "gpt2": transformer_bridge.as_gpt2,
            "gpt_neox": transformer_bridge.as_neox,
            **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), transformer_bridge.as_llama),
        },
    ),
    Dialect("fairseq", fairseq.is_fairseq, {"opt": fairseq.as_opt}, alone=False),
    Dialect("open_clip", open_clip.is_open_clip, {"clip": open_clip.as_clip}, alone=False),
    Dialect(
        "Megatron-LM",
        megatron.is_megatron,
        {"gpt2": megatron.as_gpt2, "llama": megatron.as_llama, "mixtral": megatron.as_mixtral},
    ),
    Dialect(
        "llama.cpp",
        llama_cpp.is_llama_cpp,
        {
            "llama": llama_cpp.as_llama,
            **dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma"), llama_cpp.as_qwen),
            "gpt2": llama_cpp.as_gpt2,
            "gpt_neox": llama_cpp.as_neox,
        },
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Translation:
    """The tensors of a checkpoint under transformers' names, as far as that is known.

    Attributes:
        entries: the tensors.
        dialect: whose names they had; None where they were transformers' own.
        unfit: why no forward pass of transformers' model can be had of them; None where one can.
        remark: what is to be said of them.
        folded: no norm has a scale, as after folding it into the maps that follow.
        without_place: tensors that transformers' model has no place for, and that do nothing where they are zero.
    """

    entries: list[TensorEntry]
    dialect: str | None = None
    unfit: str | None = None
    remark: str | None = None
    folded: bool = False
    without_place: list[TensorEntry] = field(default_factory=list)

    def check(self, files: Files) -> None:
        """Read what has no place in transformers' model, which must be zero.

        Raises:
            CheckpointError: it is not.
        """
        for entry in self.without_place:
            if as_floats(read_raw(files, entry), entry.dtype).any():
                raise CheckpointError(
                    f"{entry.file}: {entry.stored_name} is not zero, and transformers' model of this architecture has "
                    "no place for it; give the checkpoint before it was folded, or --reads parameters"
                )


def translate(contents: Contents, config: Callable[[], Mapping[str, Any]]) -> Translation:
    """The tensors of a checkpoint as the model of its `config` has them, which is asked for where it matters."""
    tensors = Tensors(contents.entries)
    told = contents.dialect
    dialect = next((each for each in DIALECTS if each.name == told or (told is None and each.is_it(tensors))), None)
    if dialect is None:
        return Translation(contents.entries, unfit=contents.unfit)
    folded = dialect.name == transformer_lens.TRANSFORMER_LENS and transformer_lens.is_folded(tensors)
    of = config()
    model_type = of.get("model_type")
    into = dialect.into.get(str(model_type))
    if into is None and not (told or dialect.alone):
        return Translation(contents.entries, unfit=contents.unfit)
    if into is None:
        known = ", ".join(sorted(dialect.into))
        reason = f"{dialect.name}'s tensors are not translated to {model_type}, only to {known}"
        return Translation(contents.entries, dialect.name, contents.unfit or reason, folded=folded)
    try:
        into(tensors, of)
    except CheckpointError as error:
        reason = f"{dialect.name}'s tensors are no {model_type}: {error}"
        return Translation(contents.entries, dialect.name, contents.unfit or reason, folded=folded)
    remark = f"the tensors have {dialect.name}'s names, and are read as those of {model_type}"
    if folded:
        remark += "; no norm has a scale: folded into the maps after it (LayerNormPre), which leaves scales of one"
    return Translation(tensors.all(), dialect.name, contents.unfit, remark, folded, tensors.without_place)
