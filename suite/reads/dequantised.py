"""The numbers of a stored linear map, quantised or not, as float64: of AWQ, GPTQ, compressed-tensors, FP8 and int8.

Layouts: AWQ and GPTQ as their packages pack them (4 or 8 bits in int32), compressed-tensors' `pack-quantized`. Shapes:
O outputs, I inputs. What is packed otherwise has no numbers here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deadbench.suite.checkpoints.files import Files
from deadbench.suite.checkpoints.tensors import DTYPE_NAMES, ITEM_BYTES, TensorEntry, read_floats, read_raw

Float64 = NDArray[np.float64]
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 of eight outputs the next one lies
_NARROW = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8"}


def map_values(
    files: Files, entries: Mapping[str, TensorEntry], path: str, settings: Mapping[str, Any] | None, most: int
) -> Float64 | None:
    """The first outputs (at most `most`) of the linear map stored at `path` by its inputs, O x I; None: not known.

    Args:
        files: where it is stored.
        entries: its tensors by name.
        path: of the map, as the checkpoint calls it.
        settings: the `quantization_config`; None where weights are plain.
        most: of the outputs that are taken; the same ones of each form.
    """
    parts = {name: entries[f"{path}.{name}"] for name in _PARTS if f"{path}.{name}" in entries}
    bits = _bits(settings or {})
    if "qweight" in parts and "scales" in parts and bits:
        unpack = _awq if (settings or {}).get("quant_method") == "awq" else _gptq
        return unpack(files, parts, bits)[:most]
    if "weight_packed" in parts and "weight_scale" in parts and bits:
        return _compressed(files, parts, bits, most)
    weight = parts.get("weight")
    if weight is None or len(weight.shape) != 2:
        return None
    if weight.dtype in DTYPE_NAMES:
        return read_floats(files, first_rows(weight, most))
    return _scaled(files, parts, weight, most) if weight.dtype in _NARROW else None


_PARTS = (
    "weight", "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "SCB",
    "weight_zero_point", "weight_shape",
)  # fmt: skip


def first_rows(entry: TensorEntry, most: int) -> TensorEntry:
    """The entry of the first rows of a matrix that lies in one piece; the whole one of others."""
    if entry.pieces or entry.shape[0] <= most:
        return entry
    end = entry.start + most * entry.shape[1] * ITEM_BYTES[entry.dtype]
    return replace(entry, shape=(most, entry.shape[1]), end=end)


def _bits(settings: Mapping[str, Any]) -> int | None:
    """How many bits a packed number has: 4 or 8."""
    groups = settings.get("config_groups")
    found = [settings.get("bits"), settings.get("w_bit")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found.append(weights.get("num_bits") if isinstance(weights, dict) else None)
    return next((bits for bits in found if bits in (4, 8) and not isinstance(bits, bool)), None)


def _unpacked(packed: NDArray[Any], bits: int, axis: int) -> NDArray[np.int64]:
    """Unsigned numbers that lie in int32, lowest bits first, along an axis."""
    whole = np.moveaxis(packed.astype(np.uint32), axis, -1)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = (whole[..., None] >> shifts) & np.uint32(2**bits - 1)
    return np.moveaxis(numbers.reshape(*whole.shape[:-1], -1), -1, axis).astype(np.int64)


def _by_group(values: NDArray[Any], inputs: int) -> NDArray[Any]:
    """A row for each input of what there is a row for each group of."""
    return np.repeat(values, -(-inputs // len(values)), axis=0)[:inputs]


def _awq(files: Files, parts: Mapping[str, TensorEntry], bits: int) -> Float64:
    order = np.array(_AWQ_ORDER if bits == 4 else range(32 // bits))

    def numbers(name: str) -> NDArray[np.int64]:
        plain = _unpacked(read_raw(files, parts[name]), bits, 1)
        return plain.reshape(len(plain), -1, len(order))[:, :, order].reshape(len(plain), -1)

    weight_IO = numbers("qweight")
    zeros_IO = _by_group(numbers("qzeros"), len(weight_IO)) if "qzeros" in parts else 2 ** (bits - 1)
    scales_IO = _by_group(read_floats(files, parts["scales"]), len(weight_IO))
    values_OI: Float64 = ((weight_IO - zeros_IO) * scales_IO).T
    return values_OI


def _gptq(files: Files, parts: Mapping[str, TensorEntry], bits: int) -> Float64:
    weight_IO = _unpacked(read_raw(files, parts["qweight"]), bits, 0)
    scales = read_floats(files, parts["scales"])
    zeros = _unpacked(read_raw(files, parts["qzeros"]), bits, 1) + 1 if "qzeros" in parts else 2 ** (bits - 1)
    zeros = np.broadcast_to(zeros, scales.shape)
    if "g_idx" in parts:
        group_I = read_raw(files, parts["g_idx"]).astype(np.int64)
        zeros_IO, scales_IO = zeros[group_I], scales[group_I]
    else:
        zeros_IO, scales_IO = (_by_group(each, len(weight_IO)) for each in (zeros, scales))
    values_OI: Float64 = ((weight_IO - zeros_IO) * scales_IO).T
    return values_OI


def _compressed(files: Files, parts: Mapping[str, TensorEntry], bits: int, most: int) -> Float64 | None:
    if "weight_zero_point" in parts:
        return None
    weight_OI = _unpacked(read_raw(files, first_rows(parts["weight_packed"], most)), bits, 1) - 2 ** (bits - 1)
    if "weight_shape" in parts:
        weight_OI = weight_OI[:, : int(read_raw(files, parts["weight_shape"])[1])]
    scales_OG = read_floats(files, parts["weight_scale"])[: len(weight_OI)].reshape(len(weight_OI), -1)
    values_OI: Float64 = weight_OI * _by_group(scales_OG.T, weight_OI.shape[1]).T
    return values_OI


def _scaled(files: Files, parts: Mapping[str, TensorEntry], weight: TensorEntry, most: int) -> Float64 | None:
    """Eight-bit numbers with one scale, one an output, or one a block."""
    import torch

    raw = torch.from_numpy(np.array(read_raw(files, first_rows(weight, most))))
    weight_OI: Float64 = raw.view(getattr(torch, _NARROW[weight.dtype])).double().numpy()
    if "SCB" in parts:
        return weight_OI * read_floats(files, parts["SCB"])[: len(weight_OI), None] / 127
    scale = parts.get("weight_scale") or parts.get("weight_scale_inv")
    if scale is None or scale.dtype not in DTYPE_NAMES or "weight_zero_point" in parts:
        return None
    scales = read_floats(files, scale)
    if scales.size == 1:
        return weight_OI * scales.reshape(())
    if scales.size == weight.shape[0]:
        return weight_OI * scales.reshape(-1, 1)[: len(weight_OI)]
    if scales.ndim != 2:
        return None
    rows, columns = (-(-n // k) for n, k in zip(weight.shape, scales.shape, strict=True))
    whole = np.repeat(np.repeat(scales, rows, 0)[: len(weight_OI)], columns, 1)[:, : weight.shape[1]]
    return weight_OI * whole
