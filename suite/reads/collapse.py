"""From which fall on a direction of the residual stream counts as collapsed, and not as what chance does to it."""

import math

COLLAPSE_RATIO = 0.8  # at random initialisation the ratio is 1.0 to 1.9, spread 0.045 over samples of 4D tokens
# Not so below this width: a block then writes about as much as it reads, x + A x with a random A near one in norm, and
# gpt2, gpt_neox and opt of 16 to 384 dimensions fall to 0.34 to 0.85 at random initialisation, with nothing lost.
FULL_WIDTH = 512
NOISE_DEVIATIONS = 3  # standard errors, by what the halves differ in, that a fall must exceed


def collapse_limit(hidden_size: int, ratios: tuple[float, float]) -> float | None:
    """Below which ratio, in both halves of the tokens, a fall is a collapse; null where a half is too short to tell.

    `min(0.8 min(1, D/512), 1 - 3 s)`, s the standard error of a half's ratio, `|r_1 - r_2| / sqrt 2`: neither what
    random weights of this width do nor the noise of the sample explains a fall below it.

    Args:
        hidden_size: D, in dimensions.
        ratios: of each half, the smallest singular value against the same half's at the tap before.

    Example:
        >>> collapse_limit(768, (0.7, 0.7)), collapse_limit(128, (0.59, 0.59))
        (0.8, 0.2)
    """
    if any(map(math.isnan, ratios)):
        return None
    by_width = COLLAPSE_RATIO * min(1.0, hidden_size / FULL_WIDTH)
    by_noise = 1 - NOISE_DEVIATIONS * abs(ratios[0] - ratios[1]) / math.sqrt(2)
    return min(by_width, by_noise)


def is_nondecreasing(state: str, ratio: float | None, ratios: tuple[float, float] | None) -> bool | None:
    """Whether a block left the smallest singular value no smaller; null where it fell and the halves are too short.

    A fall counts as noise up to three standard errors of the whole read's ratio, `|r_1 - r_2| / 2`. A direction that
    was dead before and is dead after stayed at zero; one that died has fallen.

    Args:
        state: of the block, as in `blocks`.
        ratio: the smallest singular value against that of the tap before.
        ratios: the same of each half of the tokens; None where it did not fall, or one of the two is dead.

    Example:
        >>> is_nondecreasing("preserved", 0.97, (0.95, 0.99)), is_nondecreasing("preserved", 0.9, (0.9, 0.9))
        (True, False)
    """
    if ratios is None or ratio is None:
        return state != "collapsed"
    if any(map(math.isnan, ratios)):
        return None
    return ratio >= 1 - NOISE_DEVIATIONS * abs(ratios[0] - ratios[1]) / 2
