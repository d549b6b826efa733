"""open_clip's two towers as transformers' CLIP, and the configuration that its `open_clip_config.json` is.

Names: github.com/mlfoundations/open_clip, `src/open_clip/transformer.py`; queries, keys and values are one map.
"""

from collections.abc import Mapping
from typing import Any

from deadbench.suite.checkpoints.dialects.tensors import Tensors, rows
from deadbench.suite.errors import CheckpointError

CONFIG_FILE = "open_clip_config.json"
_EPS = 1e-5  # of torch's LayerNorm
_OUTSIDE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_BEYOND = ("no_causal_mask", "embed_cls")  # of the text tower, and what makes it another function
_TURNED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_TEXT = ("", "text.")  # before the text tower's names, the latter of a `CustomTextCLIP`
_TOWERS = {
    **{f"{begin}transformer.resblocks.": "text_model" for begin in _TEXT},
    "visual.transformer.resblocks.": "vision_model",
}
_PARTS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip


def is_open_clip(tensors: Tensors) -> bool:
    """Whether both towers are there under open_clip's names."""
    seen = any(f"visual.{name}" in tensors for name in ("ln_post.weight", "conv1.weight"))
    return seen and any(f"{begin}ln_final.weight" in tensors for begin in _TEXT)


def as_clip(tensors: Tensors, config: Mapping[str, Any]) -> None:
    """The tensors as transformers' CLIP has them.

    Raises:
        CheckpointError: the text tower is read otherwise than transformers' is.
    """
    text = config.get("text_config")
    if beyond := [name for name in _BEYOND if isinstance(text, dict) and text.get(name)]:
        raise CheckpointError(f"{CONFIG_FILE}: text_cfg has {beyond[0]}, which transformers' text tower does not")
    tensors.leave_out(r"(^|\.)attn_mask$")
    for begin in _TEXT:
        tensors.rename({begin + stored: name for stored, name in _OUTSIDE.items()})
        tensors.turn({begin + stored: name for stored, name in _TURNED.items()})
    for begin, tower in _TOWERS.items():
        for block in tensors.blocks(begin):
            layer = f"{tower}.encoder.layers.{block}."
            for which in ("weight", "bias"):
                for ours, own in _PARTS.items():
                    tensors.rename({f"{begin}{block}.{ours}.{which}": f"{layer}{own}.{which}"})
                stored = f"{begin}{block}.attn.in_proj_{which}"
                if stored in tensors and tensors[stored].shape:
                    each, behind = tensors[stored].shape[0] // 3, tensors[stored].shape[1:]
                    for number, kind in enumerate("qkv"):
                        take = rows(number * each, (number + 1) * each)
                        tensors.make(f"{layer}self_attn.{kind}_proj.{which}", (stored,), (each, *behind), take)


def config_of(told: Any) -> dict[str, Any] | None:
    """The config.json of transformers' CLIP; None where a tower is timm's, of transformers, or of convolutions."""
    told = told.get("model_cfg") if isinstance(told, dict) else None
    vision, text = (told.get(key) if isinstance(told, dict) else None for key in ("vision_cfg", "text_cfg"))
    if not isinstance(told, dict) or not isinstance(vision, dict) or not isinstance(text, dict):
        return None
    plain = all(type(each.get("layers")) is int and type(each.get("width")) is int for each in (vision, text))
    if not plain or "timm_model_name" in vision or "hf_model_name" in text or "ls_init_value" in (*vision, *text):
        return None

    def tower(cfg: Mapping[str, Any], heads: int) -> dict[str, Any]:
        tanh = cfg.get("act_kwargs") == {"approximate": "tanh"}
        act = "quick_gelu" if told.get("quick_gelu") else "gelu_pytorch_tanh" if tanh else "gelu"
        return {
            "hidden_size": cfg["width"], "num_hidden_layers": cfg["layers"], "num_attention_heads": heads,
            "intermediate_size": int(cfg["width"] * cfg.get("mlp_ratio", 4)), "hidden_act": act,
            "layer_norm_eps": _eps(cfg), "projection_dim": told["embed_dim"],
        }  # fmt: skip

    try:
        return {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "projection_dim": told["embed_dim"],
            "text_config": tower(text, int(text.get("heads", 8)))
            | {
                "vocab_size": text.get("vocab_size", 49408), "max_position_embeddings": text.get("context_length", 77),
                "model_type": "clip_text_model", **{name: True for name in _BEYOND if text.get(name)},
            },
            "vision_config": tower(vision, vision["width"] // int(vision.get("head_width", 64)))
            | {
                "image_size": vision.get("image_size", 224), "patch_size": vision.get("patch_size", 32),
                "model_type": "clip_vision_model",
            },
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None


def _eps(cfg: Mapping[str, Any]) -> float:
    told = cfg.get("norm_kwargs")
    eps = told.get("eps", _EPS) if isinstance(told, dict) else _EPS
    return eps if isinstance(eps, float) else _EPS
