"""nanoGPT's checkpoints record the GPT-2 that they are: `model_args` beside the weights."""

from typing import Any

NANOGPT = "nanoGPT"  # the dialect of its tensors
_COUNTS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def recorded_config(value: Any) -> dict[str, Any] | None:
    """The config.json of the same model; None where the saved `value` is not nanoGPT's."""
    told = value.get("model_args") if isinstance(value, dict) else None
    if not isinstance(told, dict) or not all(type(told.get(key)) is int for key in _COUNTS):
        return None
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": told["n_layer"],
        "n_head": told["n_head"],
        "n_embd": told["n_embd"],
        "n_positions": told["block_size"],
        "vocab_size": told["vocab_size"],
        "activation_function": "gelu",
    }
