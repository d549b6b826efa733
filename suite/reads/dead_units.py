"""Hidden units planted dead: the weights into them and out of them zero, and moved jointly.

Apart from each other these weights are dead, whatever their size; together they move the outputs in second order, and
where a gate multiplies the unit, its weights zero too, in third. The order is known, and so the read can be judged by
it. Shapes: D width of the stream, H hidden units.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deadbench.suite.architectures.norms import EffectiveNorm
from deadbench.suite.architectures.wiring import Wiring, is_linear, private_parameters, weight_out_in
from deadbench.suite.reads.kl_order import ROUNDINGS
from deadbench.suite.reads.perturbation import STEPS, kl_divergence, relative_change
from deadbench.suite.schema import Row

UNIT, CHAIN = "planted-unit", "planted-chain"  # of two factors and of three
_BLOCK = re.compile(r"^(.*?\.\d+)\.")


class InFloat64(TorchDispatchMode):
    """What a model in float64 would cast to float32 stays float64: norms and softmaxes of many are written so."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        narrowing = func.overloadpacket.__name__ == "_to_copy" and kwargs.get("dtype") == torch.float32
        if narrowing and args[0].dtype == torch.float64:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@dataclass(frozen=True)
class HiddenLayer:
    """The maps into one hidden layer, a plain one or a gate and its values, and the map out of it."""

    path: str
    norm_path: str
    norm: EffectiveNorm
    into: tuple[nn.Module, ...]
    out: nn.Module


def hidden_layer(model: nn.Module, wiring: Wiring, norms: dict[str, EffectiveNorm]) -> HiddenLayer | None:
    """The first hidden layer, wider than the stream, that a norm feeds; None where there is none that is known."""
    private, read = private_parameters(model), wiring.reads
    maps = [(path, m) for path, m in model.named_modules() if is_linear(m) and id(m.weight) in private]
    for out_path, out in maps:
        block = _BLOCK.match(out_path)
        D, H = weight_out_in(out).shape
        if block is None or out_path in read or H <= D:
            continue
        found = [
            path for path, m in maps
            if path in read and path.startswith(f"{block[1]}.") and weight_out_in(m).shape == (H, D)
        ]  # fmt: skip
        if found and len(found) <= 2 and len({read[path] for path in found}) == 1:
            into = tuple(model.get_submodule(path) for path in found)
            return HiddenLayer(found[0], read[found[0]], norms[read[found[0]]], into, out)
    return None


def read_units(
    layer: HiddenLayer, run: Callable[[], Tensor], seed: list[int], roundoff: float, *, has_logits: bool
) -> Iterator[Row]:
    """Rows of one unit of the layer planted dead and moved at each step: as a unit, and as a chain where it is gated.

    The weights are put back. Nothing is told of a layer whose unit is not dead when only its weights out are moved: its
    activation is not zero at zero.

    Args:
        layer: the hidden layer.
        run: the model's output rows now (N, V or D), float64.
        seed: of the unit and of its weights.
        roundoff: u of the dtype that the model runs in.
        has_logits: the output is logits, so that a KL divergence is defined.
    """
    rng = np.random.default_rng(seed)
    H, D = weight_out_in(layer.into[0]).shape
    unit = int(rng.integers(H))
    incoming = [torch.from_numpy(each / np.linalg.norm(each)) for each in rng.standard_normal((len(layer.into), D))]
    outgoing = torch.from_numpy(rng.standard_normal(weight_out_in(layer.out).shape[0]))
    outgoing = outgoing / outgoing.square().mean().sqrt()
    # Of a gated layer one of the two maps stays as it is for the unit, both are zero for the chain.
    for name, moved in ((UNIT, layer.into[-1:]), (CHAIN, layer.into)):
        if name == CHAIN and len(layer.into) == 1:
            return
        with _planted(moved, layer.out, unit) as place:
            before = run()
            place(0.0, STEPS[-1], incoming, outgoing)
            if relative_change(before, run()) > ROUNDINGS * roundoff:
                return
            for step in STEPS:
                place(step, step, incoming, outgoing)
                after = run()
                yield {
                    "site": layer.path,
                    "norm": layer.norm_path,
                    "family": layer.norm.family,
                    "direction": name,
                    "step": step,
                    "kl": kl_divergence(before, after - before) if has_logits else None,
                    "output_change": relative_change(before, after),
                    "compensation": "none",
                    "has_bias": layer.into[0].bias is not None,
                    "tied": False,
                    "num_tokens": len(before),
                }


@contextlib.contextmanager
def _planted(
    into: tuple[nn.Module, ...], out: nn.Module, unit: int
) -> Iterator[Callable[[float, float, list[Tensor], Tensor], None]]:
    """The unit with weights of zero; gives what sets them, in and out, to so many times two directions."""
    rows = [weight_out_in(each)[unit] for each in into] + [weight_out_in(out)[:, unit]]
    biases = [each.bias[unit : unit + 1] for each in into if isinstance(each.bias, Tensor)]
    kept = [each.detach().clone() for each in (*rows, *biases)]

    def place(step_in: float, step_out: float, incoming: list[Tensor], outgoing: Tensor) -> None:
        with torch.no_grad():
            for row, direction in zip(rows[:-1], incoming[-len(into) :], strict=True):
                row.copy_(step_in * direction)
            rows[-1].copy_(step_out * outgoing)

    try:
        with torch.no_grad():
            for each in (*rows, *biases):
                each.zero_()
        yield place
    finally:
        with torch.no_grad():
            for each, value in zip((*rows, *biases), kept, strict=True):
                each.copy_(value)
