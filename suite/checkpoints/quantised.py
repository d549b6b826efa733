"""Quantised weights: what of them is no weight but a part of one, and which package takes them apart again.

Norms are stored plain in all of these. Which packages transformers wants: its `quantizers/quantizer_*.py`, of 5.19.
"""

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

# By `quant_method`: the modules that must be there, and how they are had.
_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "gptq": (("gptqmodel", "optimum"), "pip install gptqmodel optimum"),
    "awq": (("gptqmodel",), "pip install gptqmodel"),
    "bitsandbytes": (("bitsandbytes",), "pip install bitsandbytes"),
    "compressed-tensors": (("compressed_tensors",), "pip install compressed-tensors"),
    "fp8": ((), ""),
    "mxfp8": ((), ""),
    "bitnet": ((), ""),
    "fbgemm_fp8": (("fbgemm_gpu",), "pip install fbgemm-gpu"),
    "mxfp4": (("kernels",), "pip install kernels"),
    "nvfp4": (("kernels",), "pip install kernels"),
    "eetq": (("kernels",), "pip install kernels"),
    "auto-round": (("auto_round",), "pip install auto-round"),
    "hqq": (("hqq",), "pip install hqq"),
    "quanto": (("optimum", "quanto"), "pip install optimum-quanto"),
    "torchao": (("torchao",), "pip install torchao"),
    "aqlm": (("aqlm",), "pip install 'aqlm[gpu,cpu]'"),
    "vptq": (("vptq",), "pip install vptq"),
    "spqr": (("spqr_quant",), "pip install 'spqr_quant[gpu]'"),
    "higgs": (("flute",), "pip install flute-kernel"),
    "fp_quant": (("fp_quant",), "pip install fp_quant"),
    "quark": (("quark",), "pip install amd-quark"),
    "sinq": (("sinq",), "pip install sinq"),
}  # fmt: skip
# Those of which all parts of a weight have names that are known.
_NAMED = ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "fbgemm_fp8")
_PART = re.compile(
    r"(^|\.)(qweight|qzeros|scales|g_idx|perm|SCB|weight_format"
    r"|(weight|input|output)_(packed|scale|scale_inv|scale_ub|zero_point|shape|g_idx|global_scale|format)"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))$"
)


def quantisation(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a configuration, or of a part of it; None where its weights are plain."""
    told = config.get("quantization_config")
    if isinstance(told, dict) and told:
        return told
    below = (quantisation(value) for value in config.values() if isinstance(value, dict))
    return next((each for each in below if each), None)


def method_of(config: Mapping[str, Any]) -> str | None:
    """The `quant_method` of a configuration, None where its weights are plain."""
    told = quantisation(config)
    if told is None:
        return None
    if told.get("load_in_8bit") or told.get("load_in_4bit"):
        return "bitsandbytes"
    return str(told.get("quant_method"))[:40]


def described(config: Mapping[str, Any]) -> str | None:
    """How weights are quantised, in words; None where they are plain."""
    told, method = quantisation(config), method_of(config)
    if told is None or method is None:
        return None
    bits = told.get("bits") or (4 if told.get("load_in_4bit") else 8 if told.get("load_in_8bit") else None)
    return f"{method}, {bits} bits" if isinstance(bits, int) else method


def why_not_run(config: Mapping[str, Any], source: str) -> str | None:
    """Why no forward pass can be had of quantised weights here, in one line; None where they are plain, or it can."""
    method = method_of(config)
    if method is None:
        return None
    instead = "or give the weights that they were made of, or --reads parameters"
    if method not in _NEEDS:
        return f"{source}: weights quantised by {method!r} are not run; give those that they were made of"
    modules, install = _NEEDS[method]
    missing = [name for name in modules if find_spec(name) is None]
    if not missing:
        return None
    needed = " and ".join(missing)
    return f"{source}: weights quantised by {method} need {needed}, not installed here; {install}, {instead}"


def is_part(name: str) -> bool:
    """Whether a stored tensor is a part of a quantised weight, by its name: packed numbers, their scales, an order."""
    return _PART.search(name) is not None


def without_parts(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Those of `names` that say something of a model whose weights are quantised as `config` says.

    Parts of weights do not, nor does what lies beside them in the same module (GPTQ stores shifts that are zero); where
    the parts' names are not known, nothing does.
    """
    method, left = method_of(config), list(names)
    if method is None:
        return left
    if method not in _NAMED:
        return []
    packed = {_owner(name) for name in left if is_part(name)}
    return [name for name in left if not is_part(name) and _owner(name) not in packed]


def _owner(name: str) -> str:
    """The path of the module that a tensor, or a part of its weight, belongs to."""
    before, below, _ = name.rpartition(".weight.")
    return before if below else name.rpartition(".")[0]
