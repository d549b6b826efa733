"""The kernel test: what a normalisation module does, found by feeding it, not by reading its name.

`probe` runs a module alone on seeded synthetic vectors with synthetic parameters and says which family it is, how it
scales, whether it shifts and with which eps. Shapes: N tokens, D hidden size.
"""

import contextlib
import copy
import importlib
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deadbench.suite.architectures.norms import EffectiveNorm, NormBehaviour, effective_norm
from deadbench.suite.errors import first_line, message

_RELATIVE_TOLERANCE = 1e-4  # hypotheses differ by order 1; modules that compute in float32 inside differ by 1e-6
_EPS_IS_ZERO = 1e-18
_DEAD = 1e-12  # of the median standard deviation; float64's rounding is 1e-15 of it
_SHIFT_NAMES = ("bias", "beta", "shift")


def own_vectors(module: nn.Module) -> dict[str, nn.Parameter]:
    """The one-dimensional parameters that `module` owns itself, by name."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 1}


class OnRows(nn.Module):
    """A norm of maps (B, D, H, W) or of sequences (B, D, T), given rows (…, D): each becomes a position.

    Args:
        norm: the norm.
        axes_after: how many axes of positions come behind its channels.
    """

    def __init__(self, norm: nn.Module, axes_after: int):
        super().__init__()
        self.norm, self.axes_after = norm, axes_after

    def forward(self, acts: Tensor) -> Tensor:
        """The norm of every row, in the shape that they came in."""
        D = acts.shape[-1]
        along_1D = acts.reshape(1, -1, D).mT
        normalised: Tensor = self.norm(along_1D.reshape(1, D, -1, *[1] * (self.axes_after - 1)))
        return normalised.flatten(2).mT.reshape(acts.shape)


def probe(module: nn.Module, hidden_size: int, axes_after: int = 0) -> NormBehaviour:
    """Classify `module` by what it does to seeded float64 vectors of width `hidden_size`.

    With `axes_after` axes of positions behind its channels (maps: 2) the vectors are such positions.

    The module is copied; it may live on the meta device. In turn: is the output unchanged by f(x + c) (centring)?
    does it vanish at zero weight (weight or 1+weight)? which eps explains a tiny input? does the formula then
    reproduce the module? Anything that fails is `other`, with the reason in `evidence`.
    """
    try:
        return _probe(bare_copy(module), hidden_size, axes_after)
    except Exception as error:  # any module is tried, a user's own among them: it may raise anything
        return NormBehaviour("other", evidence=(f"cannot be run on plain vectors: {first_line(error)}",))


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module before fully_shard changed it."""
    return next(each for each in type(module).__mro__ if not each.__name__.startswith("FSDP"))


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy without hooks, of whole parameters: what fully_shard divides over ranks is gathered, by all of them."""
    whole = {id(p): p for p in (*module.parameters(), *module.buffers()) if hasattr(p, "full_tensor")}
    if not whole:
        bare = copy.deepcopy(module)
    else:
        memo: dict[int, Any] = {
            key: nn.Parameter(tensor.full_tensor().detach().clone(), requires_grad=False)
            for key, tensor in whole.items()
        }
        kind = plain_type(module)
        bare = kind.__new__(kind)
        for name, value in vars(module).items():
            with contextlib.suppress(AssertionError):  # what fully_shard has hung on a module refuses to be copied
                bare.__dict__[name] = type(value)() if "_hooks" in str(name) else copy.deepcopy(value, memo)
    for each in bare.modules():
        each._forward_hooks.clear()
        each._forward_pre_hooks.clear()
    return bare


def bare_copy(module: nn.Module) -> nn.Module:
    """A float64 CPU copy without hooks."""
    bare = plain_copy(module)
    if any(t.is_meta for t in (*bare.parameters(), *bare.buffers())):
        bare = bare.to_empty(device="cpu")
        for tensor in (*bare.parameters(), *bare.buffers()):
            tensor.detach().zero_()  # else what lay there decides; vectors are filled anew
    return bare.cpu().double().eval().requires_grad_(False)


def _probe(module: nn.Module, D: int, axes_after: int) -> NormBehaviour:
    vectors = own_vectors(module)
    run_module = OnRows(module, axes_after) if axes_after else module
    shifts = [n for n in vectors if any(word in n for word in _SHIFT_NAMES)]
    scales = [n for n in vectors if n not in shifts]
    if len(scales) == 2 and not shifts and all(len(p) == D for p in vectors.values()):
        shifts = [n for n in scales if _is_added(run_module, vectors, n)]  # offset, b: what no name tells
        scales = [n for n in scales if n not in shifts]
    if len(scales) > 1 or len(shifts) > 1:
        return NormBehaviour("other", evidence=(f"owns {len(scales)} scales and {len(shifts)} shifts",))
    if any(len(p) != D for p in vectors.values()):
        return NormBehaviour("other", evidence=(f"its parameters are not of width {D}",))
    scale_name = scales[0] if scales else None
    shift_name = shifts[0] if shifts else None

    generator = torch.Generator().manual_seed(0)
    x = 1.7 * torch.randn(2, 8, D, generator=generator, dtype=torch.float64) + 0.9
    weight_D = 0.5 + torch.rand(D, generator=generator, dtype=torch.float64)

    def run(inputs: Tensor, weight: Tensor | float, shift: float = 0.0) -> Tensor:
        if scale_name:
            vectors[scale_name].copy_(torch.as_tensor(weight, dtype=torch.float64).expand(D))
        if shift_name:
            vectors[shift_name].fill_(shift)
        output = run_module(inputs)
        output = output[0] if isinstance(output, tuple) else output
        if output.shape != inputs.shape:
            raise ValueError(f"output shape {tuple(output.shape)} differs from the input's {tuple(inputs.shape)}")
        doubled: Tensor = output.double()
        return doubled

    at_zero = run(x, 0.0)
    scale = "implicit-one" if scale_name is None else "weight" if size(at_zero) == 0 else "1+weight"
    unit = 0.0 if scale == "1+weight" else 1.0  # the weight at which the effective scale is one

    normalised = run(x, unit)
    if size(normalised) == 0:
        return NormBehaviour("other", evidence=("it returns zeros, whatever it is given",))
    centred = close(run(x + 3.0, unit), normalised)
    family = "layernorm" if centred else "rmsnorm"
    eps = _fit_eps(run, x, unit, centred)
    if 0 < eps <= torch.finfo(torch.float64).eps * 2:  # it is the dtype's own (torch.nn.RMSNorm's default): float32's
        module.float()
        eps = _fit_eps(run, x.float(), unit, centred)
        module.double()
    eps = _as_written(module, eps)

    gain_D = weight_D + (1.0 if scale == "1+weight" else 0.0) if scale_name else torch.ones(D, dtype=torch.float64)
    formula = EffectiveNorm(family, gain_D.numpy(), np.full(D, 0.25) if shift_name else None, eps)
    if not close(run(x, weight_D, 0.25), formula(x)):
        return NormBehaviour("other", evidence=("neither LayerNorm nor RMSNorm reproduces its output",))
    shift_text = "unchanged" if centred else "changed"
    return NormBehaviour(
        family,
        scale,
        scale_name,
        shift_name,
        eps,
        (f"module behaviour: f(x + c) is {shift_text}, effective scale is {scale}",),
        axes_after,
    )


def _is_added(run_module: nn.Module, vectors: dict[str, nn.Parameter], name: str) -> bool:
    """Whether the output grows by this vector, the other at zero."""
    x = torch.randn(4, len(vectors[name]), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    outputs = []
    for value in (0.0, 1.0):
        for each in vectors:
            vectors[each].fill_(value if each == name else 0.0)
        outputs.append(run_module(x))
    return close(outputs[1] - outputs[0], torch.ones_like(x))


def _fit_eps(run: object, x: Tensor, unit: float, centred: bool) -> float:
    """Eps from a tiny input: with mean square s^2, `(s z / f(s x))^2 = s^2 var + eps`."""
    tiny = 1e-10 * x
    output = run(tiny, unit)  # type: ignore[operator]
    base = tiny - tiny.mean(-1, keepdim=True) if centred else tiny
    usable = output.abs() > 0
    if not usable.any():
        return math.inf
    estimate = (base[usable] / output[usable]).square().median() - base.square().mean()
    return float(estimate) if float(estimate) > _EPS_IS_ZERO else 0.0


def _as_written(module: nn.Module, eps: float) -> float:
    """The module's own float attribute that agrees with the fitted `eps`, digit for digit, else the round number."""
    for value in vars(module).values():
        if isinstance(value, float) and math.isclose(value, eps, rel_tol=1e-3):
            return value
    rounded = float(f"{eps:.3g}")
    return rounded if math.isclose(rounded, eps, rel_tol=1e-4) else eps


def size(tensor: Tensor) -> float:
    """The largest number in a tensor, without its sign."""
    return float(tensor.abs().max())


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to a relative 1e-4 of the larger."""
    return size(a - b) <= _RELATIVE_TOLERANCE * max(size(a), size(b))


def kernel_dimension(module: nn.Module, hidden_size: int) -> int | None:
    """How many directions of its output never vary, measured on seeded float64 vectors; None where it cannot be run.

    Its parameters are drawn at random, so that nothing is dead by a value: what is left is the module's own algebra.
    A direction counts as dead where its standard deviation is rounding, below 1e-12 of the median.
    """
    D = hidden_size
    generator = torch.Generator().manual_seed(1)
    bare = bare_copy(module)
    for parameter in bare.parameters():
        parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
    x_ND = 1.7 * torch.randn(8 * D, D, generator=generator, dtype=torch.float64) + 0.9
    try:
        with torch.no_grad():
            output = bare(x_ND)
    except Exception:  # whatever a stranger's code raises
        return None
    y_ND = output[0] if isinstance(output, tuple) else output
    if not isinstance(y_ND, Tensor) or y_ND.shape != x_ND.shape or not bool(torch.isfinite(y_ND).all()):
        return None
    sigma_D = torch.linalg.svdvals(y_ND.double() - y_ND.double().mean(0))
    return int((sigma_D <= _DEAD * sigma_D.median()).sum())


def load_norm_class(name: str, hidden_size: int) -> nn.Module:
    """An instance of the user's own norm class, `package:Class`, built as `Class(hidden_size)`.

    This imports and runs the named code: only ever call it with a name that the user gave.

    Raises:
        ValueError: no such module or class, or a class that is no `nn.Module` of one width; one line.
    """
    package, _, attribute = name.partition(":")
    if not package or not attribute:
        raise ValueError(f"{name!r} names no class; write it as package.module:Class")
    try:
        module_class = getattr(importlib.import_module(package), attribute)
    except (Exception, SystemExit) as error:  # the user's code runs: whatever it raises is told in one line
        raise ValueError(f"{name}: cannot be imported ({message(error)}); it must be importable from here") from error
    try:
        module = module_class(hidden_size)
    except Exception as error:
        reason = message(error)
        raise ValueError(f"{name}: {attribute}({hidden_size}) fails ({type(error).__name__}: {reason})") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name}: {attribute}({hidden_size}) is a {type(module).__name__}, not a torch.nn.Module")
    return module


def live_norm(module: nn.Module, behaviour: NormBehaviour, hidden_size: int) -> EffectiveNorm:
    """The formula of a loaded module with the parameters that it holds now."""

    def vector(name: str | None) -> NDArray[np.float64] | None:
        return None if name is None else getattr(module, name).detach().cpu().double().numpy()

    return effective_norm(behaviour, vector(behaviour.scale_parameter), vector(behaviour.shift_parameter), hidden_size)
