"""torch's CPU generator moved on by many draws at once: what it would have drawn is never computed.

It is a Mersenne Twister: its sequence of words is linear over GF(2), so that the words after c steps are a sum of those
now, by the coefficients of `t^c` modulo the twister's characteristic polynomial (Haramoto, Matsumoto, Nishimura,
Panneton, L'Ecuyer 2008). The polynomial is the one in appendix A of Matsumoto and Nishimura (1998).
"""

from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORDS, _MIDDLE, _SEPARATION = 624, 397, 31  # n, m, r of MT19937
_TWIST = 0x9908B0DF  # a
_GROUP = 16  # values that normal_ draws together; where some are left over, the last group is drawn anew
_UNIFORM, _NORMAL = torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default
FILLS = frozenset({_UNIFORM, _NORMAL})  # of float32, that lies in order
_UPPER = np.uint32(1 << _SEPARATION)
_DEGREE = 32 * _WORDS - _SEPARATION
_AT_ONCE = 512  # windows that are added in the cache
# Of a saved state: the seed, then these, then words of 64 bits of which 32 are used.
_LEFT, _NEXT, _FIRST_WORD = slice(8, 12), slice(16, 24), 24
_STATE_BYTES = 5056  # the words, and the numbers that are kept for the next draw


def moved_on(state: Tensor, draws: int) -> Tensor:
    """What `torch.get_rng_state()` says after `draws` words of 32 bits, at least one, if it says `state` now.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> before = torch.get_rng_state()
        >>> _ = torch.rand(5000)  # a word each
        >>> torch.equal(moved_on(before, 5000), torch.get_rng_state())
        True
    """
    after = state.numpy().copy()
    words = after[_FIRST_WORD : _FIRST_WORD + 8 * _WORDS].view(np.uint64)
    block, taken = words.astype(np.uint32), int(after[_NEXT].view(np.int64)[0])
    if after[_LEFT].view(np.int32)[0] == 1:  # the next draw makes a new block first
        block, taken = _following(block), 0
    blocks, taken = divmod(taken + draws - 1, _WORDS)
    words[:] = _steps_later(block, _WORDS * blocks) if blocks else block
    after[_NEXT].view(np.int64)[0] = taken + 1
    after[_LEFT].view(np.int32)[0] = _WORDS - taken
    return torch.from_numpy(after)


def words_drawn(fill: Any, size: int) -> int | None:
    """How many words of 32 bits one of `FILLS` draws for so many values, at least 16; None: not known of this torch."""
    return _words(fill, size) if _are_as_known() else None


def _words(fill: Any, size: int) -> int:
    return size + (_GROUP if fill is _NORMAL and size % _GROUP else 0)


@cache
def _are_as_known() -> bool:
    """Whether fills draw as is written here: torch says so nowhere, and another version may do it otherwise."""
    if len(torch.get_rng_state()) != _STATE_BYTES:
        return False
    with torch.random.fork_rng(devices=[]):
        for fill in FILLS:
            for size in (2 * _WORDS, 2 * _WORDS + 1):
                before = torch.get_rng_state()
                fill(torch.empty(size))
                if not torch.equal(torch.get_rng_state(), moved_on(before, _words(fill, size))):
                    return False
    return True


def _following(block: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The next 624 words."""
    words = np.concatenate([block, np.empty(_WORDS, np.uint32)])
    reach = _WORDS - _MIDDLE  # as many depend on none of each other
    for start in range(0, _WORDS, reach):
        old = slice(start, min(start + reach, _WORDS))
        mixed = (words[old] & _UPPER) | (words[old.start + 1 : old.stop + 1] & ~_UPPER)
        twisted = (mixed >> 1) ^ np.where(mixed & 1, np.uint32(_TWIST), np.uint32(0))
        words[old.start + _WORDS : old.stop + _WORDS] = words[old.start + _MIDDLE : old.stop + _MIDDLE] ^ twisted
    return words[_WORDS:]


def _steps_later(block: NDArray[np.uint32], steps: int) -> NDArray[np.uint32]:
    """The 624 words that begin so many steps after a block's first."""
    sequence = [block]
    while _WORDS * len(sequence) < _DEGREE + _WORDS:
        sequence.append(_following(sequence[-1]))
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate(sequence), _WORDS)
    powers, later = _powers(steps), np.zeros(_WORDS, np.uint32)
    for start in range(0, len(powers), _AT_ONCE):
        later ^= np.bitwise_xor.reduce(windows[powers[start : start + _AT_ONCE]], axis=0)
    return later


@lru_cache(maxsize=256)  # a model has few sizes of weights
def _powers(steps: int) -> NDArray[np.int64]:
    """The powers of t in `t^steps` modulo the characteristic polynomial, which is over GF(2)."""
    remainder = 1
    for bit in bin(steps)[2:]:
        remainder = _modulo(_squared(remainder) << int(bit))
    return np.flatnonzero(np.unpackbits(_bytes(remainder), bitorder="little"))


@cache
def _characteristic() -> tuple[int, ...]:
    """The powers of t in the characteristic polynomial, but for the highest, descending."""
    bits = [_TWIST >> i & 1 for i in range(32)]  # a_0 ... a_31
    inner = 1  # v^31 + a_0 v^30 + ... + a_30, v = t^623 + t^396
    for bit in bits[:_SEPARATION]:
        inner = (inner << _WORDS - 1) ^ (inner << _MIDDLE - 1) ^ bit
    whole = (inner << _WORDS) ^ (inner << _MIDDLE) ^ bits[_SEPARATION]  # times t^624 + t^397, + a_31
    return tuple(np.flatnonzero(np.unpackbits(_bytes(whole), bitorder="little"))[-2::-1].tolist())


def _modulo(polynomial: int) -> int:
    """The remainder by the characteristic polynomial; bit i is the coefficient of t^i."""
    while excess := polynomial >> _DEGREE:
        polynomial ^= excess << _DEGREE
        for power in _characteristic():
            polynomial ^= excess << power
    return polynomial


def _squared(polynomial: int) -> int:
    """Over GF(2): every coefficient to twice its power."""
    return int.from_bytes(_spread()[_bytes(polynomial)].tobytes(), "little")


@cache
def _spread() -> NDArray[np.uint16]:
    """Of each byte the number whose bit 2i is its bit i."""
    values = np.arange(256, dtype=np.uint16)
    return sum((values >> i & 1) << 2 * i for i in range(8)).astype("<u2")  # type: ignore[union-attr]


def _bytes(polynomial: int) -> NDArray[np.uint8]:
    return np.frombuffer(polynomial.to_bytes((polynomial.bit_length() + 7) // 8, "little"), np.uint8)
