"""Activations become rows: padding left out, enough of them, distinct."""

from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from deadbench.suite.spectra.float32_range import LARGEST, beyond_float32
from deadbench.suite.spectra.questions import AT_ONCE, Questions


def token_rows(acts: Tensor, mask_BT: Bool[Tensor, "B T"] | None) -> Float[Tensor, "N D"]:
    """Token rows of `(…, D)` activations, padding left out; a sequence padded inside the model is cut to the mask."""
    if mask_BT is None or acts.ndim < 3:
        return acts.reshape(-1, acts.shape[-1])
    acts = acts[:, : mask_BT.shape[1]]
    if acts.device == mask_BT.device:
        return acts[mask_BT]
    return acts.reshape(-1, acts.shape[-1]).index_select(0, _places(mask_BT, acts.device))


@lru_cache(maxsize=1)  # every tap asks for the same batch's
def _places(mask_BT: Tensor, device: torch.device) -> Tensor:
    """Where a mask is set: a device that found that out by itself would keep the host waiting."""
    return mask_BT.flatten().nonzero()[:, 0].to(device)


def check_rows(acts_ND: Float[Tensor, "N D"], where: str, questions: Questions = AT_ONCE) -> None:
    """The canary before any small eigenvalue is believed: no row may be all zeros, every value finite, also in float32.

    Device maps and tensor parallel have returned silent zeros (transformers#36636), which look like dead directions.

    Raises:
        ValueError: there is such a row.
    """
    norms_N = torch.linalg.vector_norm(acts_ND, dim=-1, dtype=torch.promote_types(acts_ND.dtype, torch.float32))

    def judge(suspects: list[float]) -> None:
        empty, broken = map(int, suspects)
        # Not those whose square merely underflows.
        if empty and (zero := int((acts_ND[norms_N == 0] == 0).all(-1).sum())):
            raise ValueError(
                f"{zero} of {len(acts_ND)} rows {where} are all zeros: a padding token in the input, or a broken shard"
            )
        if broken and not bool(torch.isfinite(acts_ND).all()):
            raise ValueError(f"the residual stream {where} is not finite in {broken} of {len(acts_ND)} rows")
        if broken and (beyond := beyond_float32(acts_ND)):
            raise ValueError(f"values of the residual stream {where} {beyond}")

    questions.ask(torch.stack([(norms_N == 0).sum(), (~(norms_N <= LARGEST)).sum()]), judge)


def check_replay(x_ND: Float[Tensor, "N D"], replay_ND: Float[Tensor, "N D"], questions: Questions = AT_ONCE) -> None:
    """Whether float32 holds what the final norm makes of finite rows: squares that overflow give infinities or zeros.

    Raises:
        ValueError: it does not, in one row at least.
    """
    norms_N = torch.linalg.vector_norm(replay_ND, dim=-1)

    def judge(suspects: list[float]) -> None:
        if not suspects[0]:
            return
        most_N = x_ND.abs().amax(-1).double()
        odd_N = (replay_ND == 0).all(-1) | ~torch.isfinite(replay_ND).all(-1)
        overflows_N = odd_N & ((most_N.square() > LARGEST / x_ND.shape[1]) | torch.isinf(replay_ND).any(-1))
        if count := int(overflows_N.sum()):
            raise ValueError(
                f"the final norm, replayed in float32, overflows in {count} of {len(x_ND)} rows: values before it "
                f"reach {float(most_N.max()):.1e}, and float32 ends at {LARGEST:.1e}, squares at {LARGEST**0.5:.1e}"
            )

    questions.ask((~((norms_N > 0) & torch.isfinite(norms_N))).sum()[None], judge)
