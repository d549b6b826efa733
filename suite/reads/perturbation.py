"""What a model's outputs say when a linear map that a norm feeds is moved along the norm's dead direction.

A linear map W (out x D) reads `y`, the output of a norm with scale gamma and shift beta. Along the unit direction w it
is moved for real: `W + e u w^T`, and its bias by `-e u (w . beta)`, with u random of root mean square one. With w = v,
the inverse-scale direction of a LayerNorm, nothing changes. The controls are the same v without moving the bias, a
random w, and gamma^-1 of an RMSNorm. Two more are moved where they are found: a zero scale's coordinate, and the
deadest direction of the norm's output that no kernel explains. The output's change is the KL divergence of its softmax,
or, where a model has no logits, the relative change of its last hidden state. Only forward passes; a head is replayed
in float64.
Shapes: N tokens, D hidden size, V vocabulary or classes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from deadbench.suite.architectures.norms import EffectiveNorm
from deadbench.suite.architectures.wiring import Wiring, private_parameters, weight_out_in
from deadbench.suite.reads.verdicts import VERDICT_THRESHOLD
from deadbench.suite.schema import Row
from deadbench.suite.spectra.directions import UNIT_ROUNDOFF, dead_subspace, inverse_scale_direction, zero_scales

# Of the map's output, for an input of size one along w: three a decade, so that the order of a change can be told.
STEPS = (0.001, 0.00215, 0.00464, 0.01, 0.0215, 0.0464, 0.1, 0.215, 0.464, 1.0)
_PLAIN_STEP, _FINE_STEP = 1e-3, 1e-9
MAX_INNER_SITES = 12  # beside the head: evenly spaced in call order
_SERIES_BELOW = 1e-2  # |d| at which exp(d) - 1 - d is taken from its series
_CHUNK_V = 8192
_LEARNED_ROWS = 2  # in D: of fewer, the deadest direction is the sample's
_REPLAY_TOLERANCE = 0.05  # the replayed head against the model's logits, which may be bfloat16: else it is no head


def kl_divergence(logits_NV: Float[Tensor, "N V"], delta_NV: Float[Tensor, "N V"]) -> float:
    """Mean over N of `KL(softmax(logits) || softmax(logits + delta))` in nats, to full relative accuracy.

    With `d = delta - E_p delta` it is `log1p(E_p[exp(d) - 1 - d])`: no term cancels, so that 1e-30 is seen as 1e-30.

    Example:
        >>> kl_divergence(torch.zeros(1, 2).double(), torch.tensor([[1e-15, 0.0]]).double())
        1.25e-31
    """
    p_NV = logits_NV.double().softmax(-1)
    d_NV = delta_NV.double()
    d_NV = d_NV - (p_NV * d_NV).sum(-1, keepdim=True)
    series = d_NV.square() / 2 * (1 + d_NV / 3 * (1 + d_NV / 4 * (1 + d_NV / 5 * (1 + d_NV / 6))))
    excess_NV = torch.where(d_NV.abs() < _SERIES_BELOW, series, torch.expm1(d_NV) - d_NV)
    return float(torch.log1p((p_NV * excess_NV).sum(-1)).mean())


def directional_fisher(
    logits_NV: Float[Tensor, "N V"], along_N: Float[Tensor, " N"], u_V: Float[Tensor, " V"]
) -> float:
    """Fisher information along `u w^T`: `E[(w.y)^2 (sum_k p_k u_k^2 - (p.u)^2)]`, `along_N` what w sees of each input.

    The KL divergence of a small step e is `e^2/2` times this.
    """
    p_NV = logits_NV.double().softmax(-1)
    spread_N = (p_NV * (u_V - (p_NV @ u_V)[:, None]).square()).sum(-1)
    return float((along_N.square() * spread_N).mean())


@dataclass(frozen=True)
class Site:
    """One linear map and the norm that feeds it."""

    path: str
    norm_path: str
    module: nn.Module
    norm: EffectiveNorm
    tied: bool

    @property
    def bias(self) -> Tensor | None:
        """The map's own bias."""
        return self.module.bias  # type: ignore[return-value]


@dataclass(frozen=True)
class Move:
    """One direction at one site: `W + e u w^T`, `b - e u shift`."""

    name: str
    w_D: Tensor
    u_V: Tensor
    shift: float
    compensation: str


def sites(model: nn.Module, wiring: Wiring, norms: dict[str, EffectiveNorm], head: str | None) -> list[Site]:
    """The head and at most `MAX_INNER_SITES` other maps that norms feed, evenly spaced in call order."""
    private = private_parameters(model)
    found = []
    for path, norm_path in wiring.reads.items():
        module = model.get_submodule(path)
        found.append(Site(path, norm_path, module, norms[norm_path], id(module.weight) not in private))
    inner = [site for site in found if site.path != head]
    if len(inner) > MAX_INNER_SITES:
        inner = [inner[round(i)] for i in np.linspace(0, len(inner) - 1, MAX_INNER_SITES)]
    return [site for site in found if site.path == head] + inner


def moves(site: Site, seed: list[int], acts_ND: Tensor | None = None) -> list[Move]:
    """The dead directions of a site and its controls, drawn from `seed`.

    With inputs of its norm, enough of them, the deadest direction of the outputs is among them, where it is dead.
    """
    rng = np.random.default_rng(seed)
    out, D = weight_out_in(site.module).shape
    u_V = torch.from_numpy(rng.standard_normal(out))
    u_V = u_V / u_V.square().mean().sqrt()
    random_D = rng.standard_normal(D)
    directions = {"random": torch.from_numpy(random_D / np.linalg.norm(random_D))}
    inverse_D = torch.from_numpy(inverse_scale_direction(site.norm.scale_D))
    if site.norm.family == "layernorm":
        directions = {"compensated": inverse_D, "uncompensated": inverse_D} | directions
    else:
        directions = {"inverse-scale-rms": inverse_D} | directions
    beta_D = None if site.norm.shift_D is None else torch.from_numpy(site.norm.shift_D)
    found = []
    for name, w_D in directions.items():
        shift = 0.0 if beta_D is None or name == "uncompensated" else float(w_D @ beta_D)
        found.append(Move(name, w_D, u_V, shift, _how(site, shift)))
    zeros = zero_scales(site.norm.scale_D)
    if len(zeros):
        zero = zeros[np.argmin(np.abs(site.norm.scale_D[zeros]))]
        shift = 0.0 if beta_D is None else float(beta_D[zero])
        found.append(Move("zero-scale", torch.eye(D, dtype=torch.float64)[zero], u_V, shift, _how(site, shift)))
    learned = _learned_direction(site.norm, acts_ND) if acts_ND is not None else None
    if learned is not None:
        w_D, shift = learned
        found.append(Move("learned", w_D, u_V, shift, _how(site, shift)))
    return found


def _how(site: Site, shift: float) -> str:
    """What takes the shift off."""
    return "none" if shift == 0 else "bias" if site.bias is not None else "added"


def _learned_direction(norm: EffectiveNorm, acts_ND: Tensor) -> tuple[Tensor, float] | None:
    """(w, mean of w . y) of the deadest direction of the outputs beside the kernel; None where none is dead."""
    D = acts_ND.shape[1]
    if len(acts_ND) < _LEARNED_ROWS * D:
        return None
    y_ND = norm(acts_ND).numpy()
    centred_ND, kernel_Dm = y_ND - y_ND.mean(0), dead_subspace(norm.scale_D, norm.family)
    centred_ND = centred_ND - (centred_ND @ kernel_Dm) @ kernel_Dm.T
    _, sigma_D, rows_DD = np.linalg.svd(centred_ND, full_matrices=False)
    place = D - 1 - kernel_Dm.shape[1]  # those of the kernel are zero now, and last
    if place < 0 or sigma_D[place] ** 2 > VERDICT_THRESHOLD * float(np.mean(sigma_D**2)):
        return None
    w_D = rows_DD[place]
    return torch.from_numpy(w_D.copy()), float(y_ND.mean(0) @ w_D)


def read_head(site: Site, acts_ND: Float[Tensor, "N D"], own_logits_NV: Tensor, seed: list[int]) -> list[Row] | None:
    """Rows of a map whose outputs are the logits: norm and map replayed in float64, once for every move.

    Args:
        site: the head.
        acts_ND: inputs of its norm.
        own_logits_NV: the model's logits; None is returned where the replay is not about equal to them.
        seed: of the directions.
    """
    y_ND = site.norm(acts_ND)
    weight_VD = weight_out_in(site.module).detach().cpu()
    bias_V = None if site.bias is None else site.bias.detach().cpu().double()

    def logits(move: Move | None, step: float) -> Tensor:
        parts = []
        for start in range(0, len(weight_VD), _CHUNK_V):
            rows = slice(start, start + _CHUNK_V)
            W, b = weight_VD[rows].double(), 0.0 if bias_V is None else bias_V[rows]
            if move is not None:
                W = W + step * torch.outer(move.u_V[rows], move.w_D)
                b = b - step * move.u_V[rows] * move.shift
            parts.append(y_ND @ W.T + b)
        return torch.cat(parts, 1)

    before_NV = logits(None, 0.0)
    if before_NV.shape != own_logits_NV.shape or relative_change(own_logits_NV, before_NV) > _REPLAY_TOLERANCE:
        return None
    rows = []
    for move in moves(site, seed, acts_ND):
        fisher = directional_fisher(before_NV, y_ND @ move.w_D - move.shift, move.u_V)
        for step in STEPS:
            after_NV = logits(move, step)
            kl = kl_divergence(before_NV, after_NV - before_NV)
            rows.append(
                _row(site, move, step, len(y_ND), kl, relative_change(before_NV, after_NV)) | {"fisher": fisher}
            )
    return rows


def read_inner(
    site: Site,
    before: Tensor,
    run: Callable[[], Tensor],
    seed: list[int],
    *,
    has_logits: bool,
    acts_ND: Tensor | None = None,
) -> Iterator[Row]:
    """Rows of a map inside the model: its parameters are moved in place, the model runs, and they are put back.

    Args:
        site: the map.
        before: the model's output rows (N, V or D), float64.
        run: the model's output rows now.
        seed: of the directions.
        has_logits: the output is logits, so that a KL divergence is defined.
        acts_ND: inputs of its norm, where they are known.
    """
    for move in moves(site, seed, acts_ND):
        for step in STEPS:
            with _moved(site, move, step):
                after = run()
            kl = kl_divergence(before, after - before) if has_logits else None
            yield _row(site, move, step, len(before), kl, relative_change(before, after))


def finest_roundoff(site: Site, before: Tensor, run: Callable[[], Tensor], seed: list[int], dtype: str) -> float:
    """u of the coarsest dtype that a model in `dtype` computes its stream in: many norms are in float32 whatever it is.

    A step so small that only float64 resolves it then moves the outputs by rounding, and not in proportion.
    """
    roundoff = UNIT_ROUNDOFF[dtype]
    move = next(each for each in moves(site, seed) if each.name == "random")
    changes = []
    for step in (_PLAIN_STEP, _FINE_STEP):
        with _moved(site, move, step):
            changes.append(relative_change(before, run()))
    proportional = abs(changes[1] / _FINE_STEP - changes[0] / _PLAIN_STEP) <= 0.1 * changes[0] / _PLAIN_STEP
    return roundoff if proportional else max(roundoff, UNIT_ROUNDOFF["float32"])


@contextlib.contextmanager
def _moved(site: Site, move: Move, step: float) -> Iterator[None]:
    """The map moved in place, and put back."""
    weight = weight_out_in(site.module)
    kept, kept_bias = weight.detach().clone(), None if site.bias is None else site.bias.detach().clone()
    handle, shift_V = None, step * move.shift * move.u_V
    try:
        with torch.no_grad():
            change = step * torch.outer(move.u_V, move.w_D).to(weight.device)
            weight.copy_(kept.double() + change)
            if move.compensation == "bias":
                assert site.bias is not None
                assert kept_bias is not None
                site.bias.copy_(kept_bias.double() - shift_V.to(weight.device))
            elif move.compensation == "added":
                handle = site.module.register_forward_hook(_added(-shift_V.to(weight.device)))
        yield
    finally:
        if handle is not None:
            handle.remove()
        with torch.no_grad():
            weight.copy_(kept)
            if site.bias is not None and kept_bias is not None:
                site.bias.copy_(kept_bias)


def _added(bias_V: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return (output.double() + bias_V).to(output.dtype)

    return hook


def relative_change(before: Tensor, after: Tensor) -> float:
    """`||after - before|| / ||before||`."""
    before, after = before.double(), after.double()
    return float((after - before).norm() / before.norm())


def _row(site: Site, move: Move, step: float, num_tokens: int, kl: float | None, change: float) -> Row:
    return {
        "site": site.path,
        "norm": site.norm_path,
        "family": site.norm.family,
        "direction": move.name,
        "step": step,
        "kl": kl,
        "output_change": change,
        "compensation": move.compensation,
        "has_bias": site.bias is not None,
        "tied": site.tied,
        "num_tokens": num_tokens,
    }
