"""Activations become rows: padding left out, enough of them, distinct."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def token_rows(acts: Tensor, mask_BT: Bool[Tensor, "B T"] | None) -> Float[Tensor, "N D"]:
    """Token rows of `(…, D)` activations, padding left out; a sequence padded inside the model is cut to the mask."""
    if mask_BT is None or acts.ndim < 3:
        return acts.reshape(-1, acts.shape[-1])
    return acts[:, : mask_BT.shape[1]][mask_BT.to(acts.device)]


def check_rows(acts_ND: Float[Tensor, "N D"], where: str) -> None:
    """The canary before any small eigenvalue is believed: no row may be all zeros, and every value finite.

    Device maps and tensor parallel have returned silent zeros (transformers#36636), which look like dead directions.

    Raises:
        ValueError: there is such a row.
    """
    norms_N = torch.linalg.vector_norm(acts_ND, dim=-1, dtype=torch.promote_types(acts_ND.dtype, torch.float32))
    zero = int((acts_ND[norms_N == 0] == 0).all(-1).sum())  # not those whose square merely underflows
    if zero:
        raise ValueError(
            f"{zero} of {len(acts_ND)} rows {where} are all zeros: a padding token in the input, or a broken shard"
        )
    broken = int((~torch.isfinite(norms_N)).sum())
    if broken and not bool(torch.isfinite(acts_ND).all()):
        raise ValueError(f"the residual stream {where} is not finite in {broken} of {len(acts_ND)} rows")
