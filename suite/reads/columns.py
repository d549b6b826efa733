"""Columns that the architecture and the scales alone decide; every read has them."""

from deadbench.suite.architectures.norms import EffectiveNorm, FinalNorm
from deadbench.suite.schema import Row
from deadbench.suite.spectra.directions import dead_subspace, harmonic_scale, predicted_depth, zero_scales


def architecture_columns(final: FinalNorm) -> Row:
    """Columns that the architecture alone decides; null where there is no final norm."""
    found = final.path is not None
    behaviour = final.behaviour
    return {
        "family": final.family,
        "final_norm": final.path,
        "placement": final.placement,
        "scale": behaviour.scale,
        "has_bias": behaviour.shift_parameter is not None if found else None,
        "eps": behaviour.eps,
        "hidden_size": final.hidden_size,
        "num_blocks": final.num_blocks,
    }


def scale_columns(norm: EffectiveNorm | None, dtype: str | None = None) -> Row:
    """Columns that the effective scale and shift decide, for a model that runs in `dtype`; null without a norm."""
    if norm is None:
        return {"num_zero_scales": None, "scale_harmonic": None, "predicted_dim": None, "depth_predicted": None}
    executed = None if dtype is None else predicted_depth(norm.scale_D, norm.shift_D, norm.family, dtype)
    return {
        "num_zero_scales": len(zero_scales(norm.scale_D)),
        "scale_harmonic": harmonic_scale(norm.scale_D),
        "predicted_dim": dead_subspace(norm.scale_D, norm.family).shape[1],
        "depth_predicted": predicted_depth(norm.scale_D, norm.shift_D, norm.family),
        "depth_predicted_as_executed": executed,
    }
