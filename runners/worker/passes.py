"""The passes of a read over its tokens, and where they stand.

The first pass feeds the final norm's read and as many taps of the residual stream as fit in the stated memory; the taps
that are left are read in further passes over the same tokens. Of replicas each runs its share of the batches, and what
they saw is merged at the end of a pass. Now and then all is saved, and a read that was cut off goes on from there.
"""

import contextlib
import sys
from collections.abc import Generator, Iterable
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa
import torch
from torch import nn

from deadbench.runners.engines.base import Blocks, Engine, ForwardPass, SweepingEngine, Swept
from deadbench.runners.engines.device import Moment, free_bytes
from deadbench.runners.engines.registry import ENGINES
from deadbench.runners.jobs.events import Progress, Remark
from deadbench.runners.jobs.job import ReadJob
from deadbench.runners.worker.pass_end import PassEnd
from deadbench.runners.worker.saved_state import Position, SavedRead
from deadbench.suite.architectures.kernel_test import OnRows
from deadbench.suite.architectures.norms import EffectiveNorm, FinalNorm
from deadbench.suite.architectures.parts import norm_and_blocks
from deadbench.suite.inputs.batches import Batch, Inputs
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.reads.residual import ResidualRead
from deadbench.suite.spectra.questions import Questions

_ACCUMULATOR_SHARE = 4  # of the memory that is free, the accumulators of one pass take one part in so many

Events = Generator[Progress | Remark, None, Any]


class Passes:
    """One read of a loaded model, by the process that runs it, or one of several."""

    def __init__(
        self,
        read: ReadJob,
        engine: Engine,
        model: nn.Module,
        final: FinalNorm,
        inputs: Inputs,
        norm: EffectiveNorm,
        dtype: str,
        batch_tokens: int,
        sites: tuple[nn.Module, list[nn.Module]] | None = None,
        most_taps: int | None = None,
    ):
        """`final` was found in `model`, `norm` is its formula; `inputs` came in batches of about `batch_tokens`.

        `sites`: the final norm, to be replayed, and the blocks; None: those of `model`. `most_taps`: as many a pass at
        most, whatever there seems to be room for.
        """
        assert final.path is not None
        assert final.hidden_size is not None
        assert read.engine is not None
        self._read, self._engine, self._model, self._final, self._inputs = read, engine, model, final, inputs
        self._norm, self._dtype, self._ranks = norm, dtype, engine.ranks
        self._module, self._blocks = sites or norm_and_blocks(model, final.path)
        self._of_rows = OnRows(self._module, final.behaviour.axes_after) if final.behaviour.axes_after else self._module
        self._batches, self._first_row = inputs.batches, 0
        if self._ranks.replicas:
            self._batches, self._first_row = inputs.share(self._ranks.rank, self._ranks.size)
        self._num_rows = sum(batch.num_rows for batch in self._batches)
        if not read.protocol.tap_stride:
            self._blocks = []
        facts = {"dtype": dtype, "device": engine.device_name(), "hidden_size": final.hidden_size}
        facts |= {"num_tokens": inputs.num_tokens, "num_batches": len(inputs.batches), "batch_tokens": batch_tokens}
        self._most_taps, self._per_pass = most_taps or sys.maxsize, sys.maxsize
        self._end = PassEnd(read.label(), engine.device, self._num_rows)
        self._sweeps_on = False  # whether a sweep over the blocks goes on from a checkpoint
        self._checkpoint = SavedRead(read, self._ranks, facts, possible=ENGINES[read.engine].resume)

    @property
    def remarks(self) -> list[str]:
        """What the device was found to do wrong."""
        return self._end.remarks

    def fewer_taps(self) -> int | None:
        """Half the taps of a pass, where memory ran out at its end: there a smaller batch would not help."""
        stride = max(1, self._read.protocol.tap_stride)
        taps = min(self._per_pass // stride, len(self._blocks) + 1)
        return taps // 2 if self._end.decomposing and taps > 1 and not self._engine.tap_by_tap else None

    def run(self) -> Generator[Progress | Remark, None, tuple[FinalNormRead, ResidualRead, Position]]:
        """Feed both reads until every tap is read; rank 0's are those of all."""
        begun = yield from self._begin()
        try:
            with self._end:
                return (yield from self._until_read(*begun))
        except ValueError as error:
            if not self._sweeps_on or self._ranks.size > 1:
                raise
            yield Remark(self._read.label(), f"its checkpoint leads nowhere ({error}): begins anew")
        self._sweeps_on = False
        with self._end:
            return (yield from self._until_read(*self._empty(), Position(per_pass=self._per_pass)))

    def _until_read(
        self, measured: FinalNormRead, stream: ResidualRead, position: Position
    ) -> Generator[Progress | Remark, None, tuple[FinalNormRead, ResidualRead, Position]]:
        while position.first < position.num_taps:
            stream.wanted = range(position.first, position.first + position.per_pass)
            # Replicas are each in a batch of their own: what fails in one is told at the end of the pass.
            with self._ranks.together() if self._ranks.replicas else contextlib.nullcontext():
                yield from self._pass(measured, stream, position)
                if self._ranks.replicas:
                    position.num_taps = max(self._ranks.share(position.num_taps))
                    if position.first == 0:
                        self._merge(measured)
                yield from self._end.now(stream, position)
            position.first, position.batch = position.first + position.per_pass, 0
            position.per_pass = self._per_pass
            if position.first < position.num_taps and self._checkpoint.interval:
                yield from self._save(position, measured, stream, in_step=True)
        if self._ranks.replicas:
            times = self._ranks.share((position.forward_seconds, position.spectrum_seconds))
            position.forward_seconds, position.spectrum_seconds = (max(each) for each in zip(*times, strict=True))
        return measured, stream, position

    def _begin(self) -> Generator[Remark, None, tuple[FinalNormRead, ResidualRead, Position]]:
        """Empty reads, or those of the checkpoint, where all ranks have one of the same place."""
        measured, stream = self._empty()
        self._per_pass = self._taps_a_pass(stream)
        position = self._checkpoint.load(measured, stream)
        if self._checkpoint.remark:
            yield Remark(self._read.label(), self._checkpoint.remark)
        found = self._ranks.share(position)
        passes = {(each.first, each.per_pass) for each in found if each is not None}
        batches = {each and (each.batch, each.swept) for each in found}
        if (
            self._ranks.replicas and not self._engine.tap_by_tap
        ):  # each at a batch of its own, but in the same pass; in the first, those without begin
            usable = len(passes) == 1 and (None not in found or passes.pop()[0] == 0)
        else:
            usable = len(passes) == 1 and len(batches) == 1
        if not usable:
            if position is not None:
                yield Remark(self._read.label(), "the ranks' checkpoints are of different places: all begin anew")
            measured, stream = self._empty()
            return measured, stream, Position(per_pass=self._per_pass)
        if position is None:
            measured, stream = self._empty()
            return measured, stream, Position(per_pass=next(each.per_pass for each in found if each is not None))
        if self._engine.tap_by_tap:
            self._sweeps_on, where = True, f"after block {position.swept}"
        else:
            done = sum(batch.num_rows for batch in self._batches[: position.batch])
            where = f"at {done} of {self._num_rows} tokens" + (
                f", taps from {position.first}" if position.first else ""
            )
        yield Remark(self._read.label(), f"goes on from its checkpoint, {where}")
        return measured, stream, position

    def _empty(self) -> tuple[FinalNormRead, ResidualRead]:
        assert self._final.hidden_size is not None
        self._questions = Questions(self._engine.device)
        stream = ResidualRead(
            self._final.hidden_size,
            self._inputs.num_tokens,
            self._dtype,
            str(self._final.placement),
            self._engine.device,
            self._ranks,
            self._first_row,
            self._read.protocol.tap_stride,
            self._questions,
        )
        place = self._first_row, self._engine.device, self._questions
        return FinalNormRead(self._of_rows, self._norm, *place), stream

    def _taps_a_pass(self, stream: ResidualRead) -> int:
        """Through how many taps a pass goes, by all ranks together where they divide those that are read."""
        if self._engine.tap_by_tap:
            return sys.maxsize
        budget = min(self._ranks.share(accumulator_bytes(self._read, free_bytes(self._engine.device))))
        if self._ranks.replicas and self._engine.device.type == "cpu":
            budget /= self._ranks.size  # they may be on one node
        taps = min(self._most_taps, stream.taps_within(budget, stream.hidden_size)) * max(1, stream.stride)
        return taps if self._ranks.replicas else self._ranks.size * taps

    def _pass(self, measured: FinalNormRead, stream: ResidualRead, position: Position) -> Events:
        """The batches of this pass that are not done."""

        def enters(tap: int, acts: torch.Tensor, batch: Batch) -> None:
            stream.update(tap, acts, batch.mask_ST)
            if self._engine.tap_by_tap:  # else the batch is asked at its end
                self._questions.settle()

        blocks = Blocks(self._blocks, enters)
        label, first = self._read.label(), position.first
        done = sum(batch.num_rows for batch in self._batches[: position.batch])
        torch.manual_seed(self._read.seed)  # ViT-MAE and ViLT draw what they look at: every pass sees the same
        left = self._batches[position.batch :]
        if self._engine.tap_by_tap:
            left = self._batches  # it knows itself which are done
            if self._sweeps_on:
                cast(SweepingEngine, self._engine).go_on_from(self._checkpoint.sweep())
        for step in self._engine.passes(self._model, self._module, left, blocks):
            if isinstance(step, Swept):
                yield from self._through_a_block(step, measured, stream, position)
                continue
            started, (batch, traffic) = Moment.on(self._engine.device), step
            with contextlib.nullcontext() if self._ranks.replicas else self._ranks.together():
                self._take(batch, traffic, measured, stream, position)
            position.batch += 1
            forward, taps = traffic.seconds()
            position.forward_seconds += forward
            position.spectrum_seconds += taps + started.seconds_to(Moment.on(self._engine.device))
            done += batch.num_rows
            several = position.num_taps > position.per_pass
            phase = f"taps {first} to {min(first + position.per_pass, position.num_taps) - 1}" if several else "forward"
            yield Progress(label, phase, done, self._num_rows)
            in_step = not self._ranks.replicas
            sweeps = self._engine.tap_by_tap
            if not sweeps and position.batch < len(self._batches) and self._checkpoint.is_due(in_step=in_step):
                yield from self._save(position, measured, stream, in_step=in_step)
        yield Progress(label, "spectrum", done, self._num_rows)

    def _through_a_block(
        self, step: Swept, measured: FinalNormRead, stream: ResidualRead, position: Position
    ) -> Events:
        """One more batch, of an engine that runs block by block; replicas are in step after each block."""
        position.forward_seconds += step.seconds
        if not step.num_ahead:  # all of this tap's rows are there, and nothing of the next tap's
            yield from self._end.beside(stream, position)
        position.spectrum_seconds += step.tap_seconds
        position.swept = step.num_done
        done = step.num_done + step.num_ahead / step.num_batches
        yield Progress(self._read.label(), "blocks", done, step.num_blocks, unit="blocks")
        replicas = self._ranks.replicas
        if position.batch == len(self._batches) or (replicas and step.num_ahead):
            return
        if self._checkpoint.is_due(in_step=replicas):
            yield from self._save(position, measured, stream, step.state(), in_step=replicas)

    def _take(
        self,
        batch: Batch,
        traffic: ForwardPass,
        measured: FinalNormRead,
        stream: ResidualRead,
        position: Position,
    ) -> None:
        """What left the blocks in one batch, to both reads."""
        if self._final.behaviour.axes_after:
            before, after = (maps.movedim(1, -1) for maps in (traffic.input_BTD, traffic.output_BTD))
            traffic = replace(traffic, input_BTD=before, output_BTD=after)
        rows = traffic.output_BTD.numel() // traffic.output_BTD.shape[-1]
        if self._ranks.replicas and batch.mask_ST is None and rows != batch.num_rows:
            raise ValueError(f"{rows} rows came of a batch of {batch.num_rows}: give --replicas 1")
        if position.first == 0 and (self._ranks.replicas or self._ranks.rank == 0):
            measured.update(traffic.input_BTD, traffic.output_BTD, batch.mask_ST)
        if self._blocks:
            # A post-LN model's stream leaves its last block through the final norm.
            last = traffic.output_BTD if self._final.placement == "post" else traffic.input_BTD
            stream.update(traffic.num_block_calls, last, batch.mask_ST, is_last=True)
            position.num_taps = traffic.num_block_calls + 1
        self._questions.settle()

    def _merge(self, measured: FinalNormRead) -> None:
        """What the other replicas read of the final norm, to the first, in the order of the tokens."""
        with self._ranks.together():
            mine = measured.to_arrow()
        for state in self._ranks.collect(mine, 0)[1:]:
            other = FinalNormRead(self._of_rows, self._norm, device=self._engine.device)
            assert state is not None
            other.restore(state)
            measured.merge(other)

    def _save(
        self,
        position: Position,
        measured: FinalNormRead,
        stream: ResidualRead,
        sweep: Iterable[pa.RecordBatch] = (),
        *,
        in_step: bool,
    ) -> Events:
        label = self._read.label()
        yield from self._end.taken_up(stream, position)
        yield Progress(label, "checkpoint")
        self._checkpoint.save(position, measured, stream, sweep, in_step=in_step)
        if self._checkpoint.remark:
            yield Remark(label, self._checkpoint.remark)


def accumulator_bytes(read: ReadJob, free: int) -> float:
    """What the taps of one pass may take, where the model lives: as asked, else a part of what is free there."""
    if read.accumulator_gb is not None:
        return read.accumulator_gb * 1e9
    return float(free) / _ACCUMULATOR_SHARE
