"""What float32 has: rows are read with a float32 taken off, and squared; of what is larger no spectrum is had.

Shapes: N tokens, D hidden size.
"""

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def beyond_float32(rows_ND: Float[Tensor, "N D"]) -> str | None:
    """That finite rows have values which float32 has not, in words that follow what they are; None where none has."""
    most_N = rows_ND.abs().amax(-1).double()
    if not (count := int((most_N > LARGEST).sum())):
        return None
    return (
        f"reach {float(most_N.max()):.1e} in {count} of {len(rows_ND)} rows; only what float32 has can be read, "
        f"up to {LARGEST:.1e}"
    )


def check_range(parts: tuple[Float[Tensor, "N D"], ...], rows_ND: Float[Tensor, "M D"]) -> None:
    """Refuse `rows_ND`, which `parts` make up, where a value is not finite or none that float32 has.

    Raises:
        ValueError: there is such a value.
    """
    # Norms are cheap, but may overflow where the row does not.
    if all(bool((torch.linalg.vector_norm(part, dim=-1).double() <= LARGEST).all()) for part in parts):
        return
    if unfinite := int((~torch.isfinite(rows_ND).all(-1)).sum()):
        raise ValueError(f"activations are not finite in {unfinite} of {len(rows_ND)} rows")
    if beyond := beyond_float32(rows_ND):
        raise ValueError(f"activations {beyond}")
