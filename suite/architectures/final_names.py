"""What other libraries call the final norm of a model that transformers has too, where its own name is not stored."""

import re
from collections.abc import Mapping

from deadbench.suite.architectures.norms import FinalNorm
from deadbench.suite.architectures.stored_names import Renaming, unwrapped
from deadbench.suite.architectures.stored_tensors import StoredTensors
from deadbench.suite.checkpoints.tensors import TensorEntry

# (module, scale, shift), the surest first. A norm of a block, whose path has a number, is none of them.
_CALLED = (
    ("ln_final", "w", "b"),  # TransformerLens
    ("ln_final", "weight", "bias"),  # open_clip's text tower
    ("final_layernorm", "weight", "bias"),  # Megatron
    ("final_norm", "weight", "bias"),
    ("ln_f", "weight", "bias"),  # litGPT, whatever the architecture
    ("ln_post", "weight", "bias"),  # open_clip's visual tower
    ("decoder.layer_norm", "weight", "bias"),  # fairseq
    ("encoder.layer_norm", "weight", "bias"),
    ("fc_norm", "weight", "bias"),  # timm
    ("norm", "weight", "bias"),
    ("norm", "scale", "bias"),  # GPT-NeoX
)


def by_other_names(final: FinalNorm, entries: Mapping[str, TensorEntry]) -> tuple[Renaming, ...]:
    """Rules that give the stored final norm its name in transformers; none where it has that, or nothing is like it."""
    behaviour = final.behaviour
    scale = behaviour.scale_parameter
    if scale is None or final.placement != "pre" or final.path is None:
        return ()
    if StoredTensors(entries, final.naming).find(final.path, scale):
        return ()
    outside = {unwrapped(name): e for name, e in entries.items() if not re.search(r"(^|\.)\d+\.", unwrapped(name))}
    width = (final.hidden_size,)
    for module, weight, bias in _CALLED:
        ending = rf"(^|\.){re.escape(module)}\.{weight}$"
        found = [name for name, e in outside.items() if re.search(ending, name) and width in (e.shape, (None,))]
        if len(found) == 1:
            path = found[0].removesuffix(weight)
            names = ((weight, scale), (bias, behaviour.shift_parameter))
            return tuple(
                Renaming(f"^{re.escape(path + stored)}$", f"{final.path}.{ours}") for stored, ours in names if ours
            )
    return ()
