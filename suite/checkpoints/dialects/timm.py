"""timm's checkpoints: a config.json with `architecture`, whose model timm alone builds, and norms that tables tell of.

eps: github.com/huggingface/pytorch-image-models, the `norm_layer` of each of these model files.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from deadbench.suite.checkpoints.tensors import StoredNorm, TensorEntry

MODEL_TYPE = "timm_wrapper"  # of transformers
# Architectures with LayerNorm behind their last block, and its eps, the surest first.
_EPSILONS = (
    (r"vit_.*_clip_", 1e-5),
    (r"(flexi)?vit_|deit|beit|eva(02)?_|cait|xcit|mixer_|gmixer_|resmlp_|convnext|hiera_|twins_|samvit_", 1e-6),
    (r"swin|swinv2|focalnet", 1e-5),
)
# Where it is, the surest first: of tokens, of what was pooled, in the head.
_PLACES = ("norm", "fc_norm", "head.norm")


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether the contents of a config.json are timm's."""
    own = any(key in config for key in ("pretrained_cfg", "num_features", "global_pool"))
    return "model_type" not in config and isinstance(config.get("architecture"), str) and own


def as_wrapped(config: Mapping[str, Any]) -> dict[str, Any]:
    """timm's configuration as transformers' wrapper takes it, which gives the number of classes itself.

    Without classes there is no head, and transformers' wrapper with one is not built.
    """
    classes = config.get("num_classes")
    published = "TimmWrapperModel" if classes == 0 else "TimmWrapperForImageClassification"
    told = dict(config) | {"model_type": MODEL_TYPE, "architectures": [published]}
    told |= {"num_labels": classes} if type(classes) is int else {}
    if isinstance(args := told.get("model_args"), dict):
        told["model_args"] = {key: value for key, value in args.items() if key != "num_classes"}
    return told


def stored_norm(config: Mapping[str, Any], entries: Iterable[TensorEntry]) -> StoredNorm | None:
    """What timm's tables tell of the final norm; None where the architecture is in none of them."""
    architecture = str(config.get("architecture"))
    eps = next((eps for form, eps in _EPSILONS if re.match(form, architecture)), None)
    shapes = {entry.name: entry.shape for entry in entries}
    name = next((each for each in _PLACES if len(shapes.get(f"{each}.weight", ())) == 1), None)
    if eps is None or name is None or f"{name}.bias" not in shapes:
        return None
    blocks = {int(found[1]) for each in shapes if (found := re.match(r"blocks\.(\d{1,4})\.", each))}
    return StoredNorm(
        name=name,
        family="layernorm",
        eps=eps,
        hidden_size=shapes[f"{name}.weight"][0],
        num_blocks=len(blocks) or None,
        module=f"timm_model.{name}",
    )
