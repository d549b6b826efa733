"""Configurations that training scripts save with the weights, as the config.json of the same architecture."""

from typing import Any


def recorded_config(value: Any) -> dict[str, Any] | None:
    """What a saved value tells of its architecture; None where it does not.

    nanoGPT's `model_args`: a GPT-2 whose norms and maps may be without shift.
    """
    told = value.get("model_args") if isinstance(value, dict) else None
    wanted = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    if not isinstance(told, dict) or not all(type(told.get(key)) is int for key in wanted):
        return None
    layers, heads, width, length, vocabulary = (told[key] for key in wanted)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": layers,
        "n_head": heads,
        "n_embd": width,
        "n_positions": length,
        "vocab_size": vocabulary,
        "activation_function": "gelu",
    }
