"""Megatron-LM's own checkpoints: a Namespace of the command's arguments beside the weights says what the norms are."""

from collections.abc import Iterable
from typing import Any

from deadbench.suite.checkpoints.formats.pickled_names import Record
from deadbench.suite.checkpoints.tensors import StoredNorm

_FAMILIES = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}
_FINAL = ("final_layernorm", "final_norm")


def recorded_norm(value: Any, names: Iterable[str]) -> StoredNorm | None:
    """What Megatron's arguments tell of the final norm; None where the saved `value` is not Megatron's."""
    args = value.get("args") if isinstance(value, dict) else None
    told = args.fields if isinstance(args, Record) and args.kind == "argparse.Namespace" else {}
    family = _FAMILIES.get(str(told.get("normalization", "LayerNorm")))
    if family is None or not all(type(told.get(key)) is int for key in ("num_layers", "hidden_size")):
        return None
    scales = [name.removesuffix(".weight") for name in names if name.endswith(tuple(f"{f}.weight" for f in _FINAL))]
    outside = [name for name in scales if ".layers." not in name]
    eps = told.get("norm_epsilon", told.get("layernorm_epsilon"))
    return StoredNorm(
        name=outside[0] if len(outside) == 1 else None,
        family=family,
        eps=eps if isinstance(eps, float) else None,
        hidden_size=told["hidden_size"],
        num_blocks=told["num_layers"],
        adds_one=told.get("apply_layernorm_1p") is True,
    )


def recorded_config(norm: StoredNorm) -> dict[str, Any]:
    """As much of a config.json as the arguments are; transformers has no such architecture."""
    return {"model_type": "megatron", "hidden_size": norm.hidden_size, "num_hidden_layers": norm.num_blocks}
