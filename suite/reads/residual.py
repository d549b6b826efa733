"""The residual stream, block to block: does its smallest singular value survive?

Taps are l = 0 (the embedding output) to L (the stream before the final norm; in a post-LN model, after it). At each tap
the singular values of the centred stream over sqrt(N) are compared with those of the tap before. Shapes: N tokens, D
hidden size, k dead directions.
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool
from torch import Tensor

from deadbench.suite.ranks import Ranks
from deadbench.suite.read_specs import TAP_BYTES
from deadbench.suite.reads.collapse import collapse_limit, is_nondecreasing
from deadbench.suite.reads.distinct_rows import MIN_DISTINCT
from deadbench.suite.reads.rows import check_rows, token_rows
from deadbench.suite.reads.stream_moments import massive_coordinates
from deadbench.suite.reads.tap import TAP_STATE, Tap
from deadbench.suite.reads.tap_spectrum import TapSpectrum
from deadbench.suite.schema import Row
from deadbench.suite.spectra.arrow_state import StateError, fields, struct
from deadbench.suite.spectra.directions import UNIT_ROUNDOFF, leading_coordinates
from deadbench.suite.spectra.questions import AT_ONCE, Questions

SAME_DEAD = 0.9  # containment above which dead directions of two taps are the same
_FLOORS = {"bfloat16": 8.0, "float16": 8.0, "float32": 32.0, "float64": 32.0}
STREAM_STATE = pa.schema(
    {"results": pa.string(), "tap": pa.int64(), "of_pass_before": pa.bool_(), "state": pa.struct(TAP_STATE)}
)


class ResidualRead:
    """Accumulates the taps of one model and says block by block what became of the bottom.

    Accumulators of all taps of a large model do not fit beside it. The taps are then read in several passes over the
    same tokens: `wanted` says which may be read now, `end_pass` ends a pass. The rows do not depend on the cut.

    A pass ends in three steps, and where there is a place for it the next may begin after the first: `close_pass`,
    `decompose`, which may be another thread's, and `conclude`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_tokens: int,
        dtype: str,
        placement: str,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
        first_row: int = 0,
        stride: int = 1,
        questions: Questions = AT_ONCE,
    ):
        """Read taps of a model that runs in `dtype` over `num_tokens` tokens; `placement` as in `reads`.

        With `ranks`, every rank gives its taps and all end their passes together; each has all the rows then.
        `first_row` is how many rows of each tap come before the first that is given here, to another rank.
        Each `stride`-th tap is read, and the last (0: none); a tap is then compared with the one that was read before.
        `questions` are asked of each batch, and the caller's to settle when it is through.
        """
        self.hidden_size, self.num_tokens, self.dtype, self.placement = hidden_size, num_tokens, dtype, placement
        self._half_tokens = max(0, num_tokens // 2 - first_row)
        self.device, self.ranks, self.stride = device, ranks or Ranks(), stride
        self.questions = questions
        self.wanted = range(0)
        self._taps: dict[int, Tap] = {}
        self._closed: dict[int, Tap] = {}  # of a pass that is ending
        self._decomposed: dict[int, TapSpectrum] = {}
        self._last_tap: dict[int, Tap] = {}  # of the pass before: its halves may yet be asked for
        self._before: tuple[int, TapSpectrum] | None = None
        self._blocks: list[Row] = []
        self._spectra: list[Row] = []

    @staticmethod
    def taps_within(budget_bytes: float, hidden_size: int) -> int:
        """How many taps of this width fit in `budget_bytes`, at least one."""
        return max(1, int(budget_bytes // (TAP_BYTES * hidden_size**2)))

    def update(self, tap: int, acts: Tensor, mask: Bool[Tensor, "B T"] | None = None, *, is_last: bool = False) -> None:
        """Add one forward pass's stream at `tap`; a stream of another width (a merger's, a pyramid's) is left out.

        `is_last`: no tap comes after it.

        Raises:
            ValueError: values that are not finite, or rows of zeros after the first block.
        """
        if not self.stride or tap not in self.wanted or (tap % self.stride and not is_last):
            return
        if not (self.ranks.replicas or self._owner(tap) == self.ranks.rank) or acts.shape[-1] != self.hidden_size:
            return
        rows = token_rows(acts, mask)
        if not self.questions.at_once:
            rows = rows.clone()  # models write into their streams, and these rows may be asked for again
        if tap:
            check_rows(rows, f"after block {tap}", self.questions)
        if tap not in self._taps:
            self._taps[tap] = Tap(self.hidden_size, self._half_tokens, self.device)
        self._taps[tap].update(rows, self.questions)

    def end_pass(self) -> None:
        """Decompose the taps of this pass; their accumulators are given back."""
        for _ in self.ending():
            pass

    def ending(self) -> Iterator[int]:
        """`end_pass`, that stops after each tap to say which it was: a wide one takes a while."""
        self.close_pass()
        yield from self.decompose()
        self.conclude()

    def close_pass(self) -> list[Tap]:
        """Take no more rows of this pass; replicas merge what they saw. The pass before must be concluded.

        Gives the taps that its end will look at.
        """
        assert not self._closed
        if self.ranks.replicas:
            self._merge_replicas()
        self._closed, self._taps = self._taps, {}
        return [*self._last_tap.values(), *self._closed.values()]

    def decompose(self) -> Iterator[int]:
        """Decompose the taps of the closed pass, and say which it was after each; no other rank is asked."""
        for index, tap in self._closed.items():
            self._decomposed[index] = self._spectrum(tap)
            yield index

    def conclude(self) -> None:
        """Compare the taps of the closed pass, all ranks together; their accumulators are given back."""
        now, self._decomposed = self._shared(self._decomposed), {}
        known = dict([self._before] if self._before else []) | {index: now[index] for index in sorted(now)}
        pairs = list(zip(known, list(known)[1:], strict=False))
        asked = {tap for ahead, tap in pairs if known[tap].fell_from(known[ahead])}
        asked |= {ahead for ahead, tap in pairs if tap in asked}
        taps = self._last_tap | self._closed
        halves = self._shared({index: taps[index].halves() for index in asked if index in taps})
        for index, spectrum in ((i, known[i]) for i in sorted(now)):
            before = next((ahead for ahead, tap in pairs if tap == index), None)
            self._blocks.append(self._row(index, spectrum, before, known, halves))
            self._spectra.append({"site": f"tap {index}", "eigenvalues": spectrum.eigenvalues_D.tolist()})
        if now:
            last = max(now)
            self._before = last, now[last]
            self._last_tap = {last: self._closed[last]} if last in self._closed else {}
        self._closed = {}

    def _merge_replicas(self) -> None:
        """What the ranks saw of a tap is brought to one of them and merged there, in the order of the tokens."""
        for index in sorted({index for part in self.ranks.share(list(self._taps)) for index in part}):
            owner, state = self._owner(index), None
            with self.ranks.together():
                if index in self._taps:
                    state = self._taps.pop(index).to_arrow()
            states = self.ranks.collect(state, owner)
            if owner == self.ranks.rank:
                merged, *others = (Tap.from_arrow(state, self.device) for state in states if state is not None)
                for other in others:
                    merged.merge(other)
                self._taps[index] = merged

    def _owner(self, tap: int) -> int:
        """The rank of a tap: taps that are read go to one rank after another."""
        return -(-tap // self.stride) % self.ranks.size

    def _shared(self, mine: dict[int, Any]) -> dict[int, Any]:
        """What all ranks have, by tap."""
        return {index: value for part in self.ranks.share(mine) for index, value in part.items()}

    def to_arrow(self) -> Iterator[pa.RecordBatch]:
        """The exact state in the middle of a pass, one tap a batch: no more than one is packed at a time.

        Of no pass that is closed and not concluded.
        """
        assert not self._closed
        before = None if self._before is None else (self._before[0], self._before[1].plain())
        results = {"blocks": self._blocks, "spectra": self._spectra, "before": before}
        yield struct({"results": json.dumps(results), "tap": None, "of_pass_before": None, "state": None}, STREAM_STATE)
        for of_pass_before, taps in ((True, self._last_tap), (False, self._taps)):
            for index, tap in taps.items():
                columns = {"results": None, "tap": index, "of_pass_before": of_pass_before, "state": tap.to_arrow()}
                yield struct(columns, STREAM_STATE)

    def restore(self, states: Iterable[pa.RecordBatch]) -> None:
        """Take the state that `to_arrow` packed in the place of one's own; `wanted` is the caller's to set.

        Raises:
            StateError: it is not whole, or of another width.
        """
        for batch in states:
            row = fields(batch, STREAM_STATE)
            if row["results"].is_valid:
                results = json.loads(row["results"].as_py())
                self._blocks, self._spectra = results["blocks"], results["spectra"]
                if results["before"] is not None:
                    index, plain = results["before"]
                    self._before = index, TapSpectrum.from_plain(plain)
                continue
            tap = Tap.from_arrow(row["state"], self.device)
            if tap.first.hidden_size != self.hidden_size:
                raise StateError(f"a state of width {tap.first.hidden_size}; the stream's is {self.hidden_size}")
            taps = self._last_tap if row["of_pass_before"].as_py() else self._taps
            taps[row["tap"].as_py()] = tap

    def finish(self) -> tuple[Row, list[Row], list[Row]]:
        """(columns of `reads`, rows of `blocks`, rows of `spectra`)."""
        judged = [row for row in self._blocks if row["state"] is not None]
        rated = [row for row in judged if row["ratio"] is not None]
        worst = min(rated, key=lambda row: (row["state"] != "collapsed", float(row["ratio"])), default=None)
        columns: Row = {
            "blocks_preserved": all(row["state"] != "collapsed" for row in judged) if judged else None,
            "blocks_nondecreasing": sum(bool(row["nondecreasing"]) for row in judged) if judged else None,
            "worst_block": worst["block"] if worst else None,
            "worst_block_ratio": worst["ratio"] if worst else None,
        }
        return columns, self._blocks, self._spectra

    def _spectrum(self, tap: Tap) -> TapSpectrum:
        spectrum = tap.finish()
        sigma_D = np.sqrt(spectrum.eigenvalues_D)
        # Rounding of each coordinate, seen along every eigenvector: 0.42 u sqrt(sum w_i^2 E x_i^2).
        floors_D = 0.42 * UNIT_ROUNDOFF[self.dtype] * np.sqrt(spectrum.eigenvectors_DD**2 @ spectrum.mean_square_D)
        resolution = float(np.sqrt(spectrum.resolution))  # what the accumulator itself can tell from zero
        dead_D = sigma_D <= np.maximum(_FLOORS[self.dtype] * floors_D, resolution)
        return TapSpectrum(
            spectrum.eigenvalues_D,
            spectrum.eigenvectors_DD[-1].copy(),
            max(float(floors_D[-1]), resolution),
            spectrum.eigenvectors_DD[dead_D],
            tap.num_distinct() < MIN_DISTINCT * self.hidden_size,
            massive_coordinates(spectrum.mean_square_D),
        )

    def _row(
        self,
        index: int,
        now: TapSpectrum,
        ahead: int | None,
        known: dict[int, TapSpectrum],
        halves: dict[int, tuple[float, float]],
    ) -> Row:
        sigma_D = np.sqrt(now.eigenvalues_D)
        coordinates, weights = leading_coordinates(now.bottom_D)
        before = None if ahead is None or known[ahead].rank_limited else known[ahead]
        ratio = now.sigma_min / before.sigma_min if before is not None and before.sigma_min > 0 else None
        state, limit, nondecreasing = None, None, None
        if before is not None and ahead is not None:
            ratios = _ratios(halves.get(index), halves.get(ahead)) if now.fell_from(before) else None
            limit = collapse_limit(self.hidden_size, ratios) if ratios else None
            state = self._state(now, before, ratios, limit)
            nondecreasing = is_nondecreasing(state, ratio, ratios)
        return {
            "block": index,
            "sigma_min": now.sigma_min,
            "sigma_median": float(np.median(sigma_D)),
            "sigma_max": float(sigma_D[0]),
            "ratio": ratio,
            "floor": now.floor,
            "state": state,
            "collapse_below": limit,
            "rank_limited": now.rank_limited,
            "preserved": None if state is None else state in ("preserved", "preserved-dead"),
            "bottom_coordinates": coordinates,
            "bottom_weights": weights,
            "nondecreasing": nondecreasing,
            "participation": float(1 / np.sum(now.bottom_D**4)),
            "massive_coordinates": now.massive,
            "bottom_direction": now.bottom_D.tolist() if state == "collapsed" else None,
        }

    def _state(
        self, now: TapSpectrum, before: TapSpectrum, ratios: tuple[float, float] | None, limit: float | None
    ) -> str:
        """preserved, collapsed, preserved-dead or revived, from one tap to the next."""
        if len(now.dead_kD):
            # In a post-LN model every tap is a norm's output and carries that norm's own kernel.
            return "preserved-dead" if self.placement == "post" or _same_dead(now, before) else "collapsed"
        if len(before.dead_kD):
            return "revived"
        if ratios is None or limit is None:
            return "preserved"
        return "collapsed" if max(ratios) < limit else "preserved"


def _ratios(now: tuple[float, float] | None, before: tuple[float, float] | None) -> tuple[float, float]:
    """Each half's smallest singular value against the same half's at the tap before."""
    assert now is not None
    assert before is not None
    first, second = (after / earlier if earlier > 0 else math.nan for after, earlier in zip(now, before, strict=True))
    return first, second


def _same_dead(now: TapSpectrum, before: TapSpectrum) -> bool:
    """Whether every direction dead now was dead before: smallest singular value of `U_before U_now^T`."""
    if len(now.dead_kD) > len(before.dead_kD):
        return False
    overlaps = np.linalg.svd(before.dead_kD @ now.dead_kD.T, compute_uv=False)
    return bool(overlaps.min() >= SAME_DEAD)
