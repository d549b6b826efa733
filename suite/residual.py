"""The residual stream, block to block: does its smallest singular value survive?

Taps are l = 0 (the embedding output) to L (the stream before the final norm; in a post-LN model, after it). At each tap
the singular values of the centred stream over sqrt(N) are compared with those of the tap before. Shapes: N tokens, D
hidden size, k dead directions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from suite.directions import UNIT_ROUNDOFF, leading_coordinates
from suite.schema import Row
from suite.spectrum import CovarianceFactor, Spectrum

COLLAPSE_RATIO = 0.8  # at random initialisation the ratio is 1.0 to 1.9, spread 0.045 over samples of 4D tokens
SAME_DEAD = 0.9  # containment above which dead directions of two taps are the same
MIN_DISTINCT = 4  # in D: fewer distinct rows, and the rank is that of the input
_FLOORS = {"bfloat16": 8.0, "float16": 8.0, "float32": 32.0, "float64": 32.0}
TAP_BYTES = 40  # in D^2: two halves of at most a Gram matrix, a factor and a whitener each, with room to decompose


class Tap:
    """One place in the stream: the rows of the first and of the second half of the tokens, apart."""

    def __init__(self, hidden_size: int, half_tokens: int, device: torch.device | str = "cpu"):
        """`half_tokens`: how many rows make the first half."""
        self._half_tokens, self._seen = half_tokens, 0
        self.first = CovarianceFactor(hidden_size, device)
        self.second: CovarianceFactor | None = None
        self._marks: list[Tensor] = []  # a random projection of each row: equal rows are equal inputs
        generator = torch.Generator().manual_seed(0)
        self._probe_D = torch.randn(hidden_size, generator=generator, dtype=torch.float64).to(device)

    def update(self, acts_ND: Float[Tensor, "N D"]) -> None:
        """Add rows, in the order of the tokens."""
        rows = acts_ND.to(self.first.device, torch.float64)
        self._marks.append(rows @ self._probe_D)
        head = max(0, min(len(rows), self._half_tokens - self._seen))
        self._seen += len(rows)
        if head:
            self.first.update(rows[:head])
        if head < len(rows):
            if self.second is None:
                self.second = self.first.successor()
            self.second.update(rows[head:])

    def merge(self, other: "Tap") -> None:
        """Add another worker's rows of the same tap: its first half to the first, its second to the second."""
        self._marks += other._marks
        self.first.merge(other.first)
        if other.second is not None:
            if self.second is None:
                self.second = other.second
            else:
                self.second.merge(other.second)

    def num_distinct(self) -> int:
        """Distinct rows seen."""
        return len(torch.cat(self._marks).unique())

    def halves(self) -> tuple[float, float]:
        """Smallest singular value of each half; nan where a half is too short."""
        values = []
        for half in (self.first, self.second):
            enough = half is not None and half.num_rows > half.hidden_size
            values.append(float(np.sqrt(half.bottom()[0])) if half is not None and enough else np.nan)
        return values[0], values[1]

    def finish(self) -> Spectrum:
        """The spectrum of all rows."""
        whole = CovarianceFactor(self.first.hidden_size, self.first.device)
        whole.merge(self.first)
        if self.second is not None:
            whole.merge(self.second)
        return whole.finish()


@dataclass(frozen=True)
class Ranks:
    """Processes that share one model and all see its whole stream: rank r reads the taps r, r + size, r + 2 size, ….

    `gather` gives every rank the list of what each gave. By default a process is alone.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda mine: [mine]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises inside, all raise: none is left waiting for another."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if self.size == 1:
                raise
            error = raised
        told = [text for text in self.gather(error and f"{error}") if text is not None]
        if error:
            raise error
        if told:
            raise ValueError(told[0])


@dataclass(frozen=True)
class _Reading:
    """What is compared of one tap: small, and it travels between ranks."""

    eigenvalues_D: NDArray[np.float64]
    bottom_D: NDArray[np.float64]
    floor: float
    dead_kD: NDArray[np.float64]
    rank_limited: bool

    @property
    def sigma_min(self) -> float:
        return float(np.sqrt(self.eigenvalues_D[-1]))

    def fell_from(self, before: "_Reading") -> bool:
        """Whether the bottom is lower than it was, neither being dead: the halves must then say by how much."""
        comparable = not (before.rank_limited or len(self.dead_kD) or len(before.dead_kD))
        return comparable and self.sigma_min < before.sigma_min


class ResidualRead:
    """Accumulates the taps of one model and says block by block what became of the bottom.

    Accumulators of all taps of a large model do not fit beside it. The taps are then read in several passes over the
    same tokens: `wanted` says which are read now, `end_pass` ends a pass. The rows do not depend on the cut.
    """

    def __init__(
        self,
        hidden_size: int,
        num_tokens: int,
        dtype: str,
        placement: str,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
    ):
        """Read taps of a model that runs in `dtype` over `num_tokens` tokens; `placement` as in `reads`.

        With `ranks`, every rank gives its taps and all end their passes together; each has all the rows then.
        """
        self.hidden_size, self.num_tokens, self.dtype, self.placement = hidden_size, num_tokens, dtype, placement
        self.device, self.ranks = device, ranks or Ranks()
        self.wanted = range(0)
        self._taps: dict[int, Tap] = {}
        self._last_tap: dict[int, Tap] = {}  # of the pass before: its halves may yet be asked for
        self._before: tuple[int, _Reading] | None = None
        self._blocks: list[Row] = []
        self._spectra: list[Row] = []

    @staticmethod
    def taps_within(budget_bytes: float, hidden_size: int) -> int:
        """How many taps of this width fit in `budget_bytes`, at least one."""
        return max(1, int(budget_bytes // (TAP_BYTES * hidden_size**2)))

    def update(self, tap: int, acts: Tensor, mask: Bool[Tensor, "B T"] | None = None) -> None:
        """Add one forward pass's stream at `tap`; a stream of another width (a merger's, a pyramid's) is left out.

        Raises:
            ValueError: values that are not finite, or rows of zeros after the first block.
        """
        if tap not in self.wanted or tap % self.ranks.size != self.ranks.rank or acts.shape[-1] != self.hidden_size:
            return
        rows = token_rows(acts, mask)
        if tap:
            check_rows(rows, f"after block {tap}")
        if tap not in self._taps:
            self._taps[tap] = Tap(self.hidden_size, self.num_tokens // 2, self.device)
        self._taps[tap].update(rows)

    def merge(self, other: "ResidualRead") -> None:
        """Add what another worker accumulated in this pass: of the same taps on other tokens, or of other taps."""
        for index, tap in other._taps.items():
            if index in self._taps:
                self._taps[index].merge(tap)
            else:
                self._taps[index] = tap

    def end_pass(self) -> None:
        """Decompose the taps of this pass; their accumulators are given back."""
        now = self._shared({index: self._reading(tap) for index, tap in self._taps.items()})
        known = dict([self._before] if self._before else []) | {index: now[index] for index in sorted(now)}
        pairs = list(zip(known, list(known)[1:], strict=False))
        asked = {tap for ahead, tap in pairs if known[tap].fell_from(known[ahead])}
        asked |= {ahead for ahead, tap in pairs if tap in asked}
        taps = self._last_tap | self._taps
        halves = self._shared({index: taps[index].halves() for index in asked if index in taps})
        for index, reading in ((i, known[i]) for i in sorted(now)):
            before = next((ahead for ahead, tap in pairs if tap == index), None)
            self._blocks.append(self._row(index, reading, before, known, halves))
            self._spectra.append({"site": f"tap {index}", "eigenvalues": reading.eigenvalues_D.tolist()})
        if now:
            last = max(now)
            self._before = last, now[last]
            self._last_tap = {last: self._taps[last]} if last in self._taps else {}
        self._taps = {}

    def _shared(self, mine: dict[int, Any]) -> dict[int, Any]:
        """What all ranks have, by tap."""
        return {index: value for part in self.ranks.gather(mine) for index, value in part.items()}

    def finish(self) -> tuple[Row, list[Row], list[Row]]:
        """(columns of `reads`, rows of `blocks`, rows of `spectra`)."""
        judged = [row for row in self._blocks if row["state"] is not None]
        rated = [row for row in judged if row["ratio"] is not None]
        worst = min(rated, key=lambda row: (row["state"] != "collapsed", float(row["ratio"])), default=None)
        columns: Row = {
            "blocks_preserved": all(row["state"] != "collapsed" for row in judged) if judged else None,
            "worst_block": worst["block"] if worst else None,
            "worst_block_ratio": worst["ratio"] if worst else None,
        }
        return columns, self._blocks, self._spectra

    def _reading(self, tap: Tap) -> _Reading:
        spectrum = tap.finish()
        sigma_D = np.sqrt(spectrum.eigenvalues_D)
        # Rounding of each coordinate, seen along every eigenvector: 0.42 u sqrt(sum w_i^2 E x_i^2).
        floors_D = 0.42 * UNIT_ROUNDOFF[self.dtype] * np.sqrt(spectrum.eigenvectors_DD**2 @ spectrum.mean_square_D)
        resolution = float(np.sqrt(spectrum.resolution))  # what the accumulator itself can tell from zero
        dead_D = sigma_D <= np.maximum(_FLOORS[self.dtype] * floors_D, resolution)
        return _Reading(
            spectrum.eigenvalues_D,
            spectrum.eigenvectors_DD[-1].copy(),
            max(float(floors_D[-1]), resolution),
            spectrum.eigenvectors_DD[dead_D],
            tap.num_distinct() < MIN_DISTINCT * self.hidden_size,
        )

    def _row(
        self,
        index: int,
        now: _Reading,
        ahead: int | None,
        known: dict[int, _Reading],
        halves: dict[int, tuple[float, float]],
    ) -> Row:
        sigma_D = np.sqrt(now.eigenvalues_D)
        coordinates, weights = leading_coordinates(now.bottom_D)
        before = None if ahead is None or known[ahead].rank_limited else known[ahead]
        ratio = now.sigma_min / before.sigma_min if before is not None and before.sigma_min > 0 else None
        state = None
        if before is not None and ahead is not None:
            state = self._state(now, before, halves.get(index), halves.get(ahead))
        return {
            "block": index,
            "sigma_min": now.sigma_min,
            "sigma_median": float(np.median(sigma_D)),
            "sigma_max": float(sigma_D[0]),
            "ratio": ratio,
            "floor": now.floor,
            "state": state,
            "rank_limited": now.rank_limited,
            "preserved": None if state is None else state in ("preserved", "preserved-dead"),
            "bottom_coordinates": coordinates,
            "bottom_weights": weights,
            "participation": float(1 / np.sum(now.bottom_D**4)),
            "bottom_direction": now.bottom_D.tolist() if state == "collapsed" else None,
        }

    def _state(
        self,
        now: _Reading,
        before: _Reading,
        halves_now: tuple[float, float] | None,
        halves_before: tuple[float, float] | None,
    ) -> str:
        """preserved, collapsed, preserved-dead or revived, from one tap to the next."""
        if len(now.dead_kD):
            # In a post-LN model every tap is a norm's output and carries that norm's own kernel.
            return "preserved-dead" if self.placement == "post" or _same_dead(now, before) else "collapsed"
        if len(before.dead_kD):
            return "revived"
        if not now.fell_from(before):
            return "preserved"
        assert halves_now is not None
        assert halves_before is not None
        pairs = zip(halves_now, halves_before, strict=True)
        return "collapsed" if all(after < COLLAPSE_RATIO * earlier for after, earlier in pairs) else "preserved"


def _same_dead(now: _Reading, before: _Reading) -> bool:
    """Whether every direction dead now was dead before: smallest singular value of `U_before U_now^T`."""
    if len(now.dead_kD) > len(before.dead_kD):
        return False
    overlaps = np.linalg.svd(before.dead_kD @ now.dead_kD.T, compute_uv=False)
    return bool(overlaps.min() >= SAME_DEAD)


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
