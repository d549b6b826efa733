"""Activations become rows: padding left out, enough of them, distinct."""

from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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
    """The canary before any small eigenvalue is believed: no row may be all zeros, and every value finite.

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

    questions.ask(torch.stack([(norms_N == 0).sum(), (~torch.isfinite(norms_N)).sum()]), judge)
