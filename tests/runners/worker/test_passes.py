"""The passes of a read over a stack of three blocks: what each tap is fed, in how many passes, and from where on."""

import contextlib
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deadbench.runners.engines.base import ForwardPass
from deadbench.runners.jobs.events import Progress, Remark
from deadbench.runners.worker import saved_state
from deadbench.runners.worker.passes import Passes
from deadbench.suite.architectures.kernel_test import live_norm, probe
from deadbench.suite.architectures.norms import FinalNorm
from deadbench.suite.inputs.batches import Batch, Inputs
from deadbench.suite.ranks import RankError, Ranks
from deadbench.suite.read_specs import TAP_BYTES
from tests.runners.sleepers import sleeping_jobs
from tests.suite.spectra.test_arrow_state import in_ranks

D, BLOCKS, TAPS = 8, 3, 4
BATCHES, SEQUENCES, LENGTH = 6, 4, 10
ROWS = SEQUENCES * LENGTH


def make_passes(read, engine, model, final, inputs, norm):
    """The one place that knows how the passes of a read are made."""
    return Passes(read, engine, model, final, inputs, norm, "float32", ROWS)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(D, D)

    def forward(self, x_BTD):
        return x_BTD + torch.tanh(self.map(x_BTD))


class Stack(nn.Module):
    def __init__(self, num_blocks=BLOCKS):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.norm = nn.LayerNorm(D)

    def forward(self, x_BTD):
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD)


class StackEngine:
    """What the passes ask of an engine, for a `Stack`; it notes each batch and can be told to fail at one."""

    tap_by_tap = False
    device = torch.device("cpu")

    def __init__(self, ranks=None, fails_at=None, before=lambda: None):
        self.ranks, self.fails_at, self.before = ranks or Ranks(), fails_at, before
        self.taken = []

    def device_name(self):
        return "cpu"

    @torch.no_grad()
    def passes(self, model, norm, batches, blocks=None):
        self.before()
        for batch in batches:
            if len(self.taken) == self.fails_at:
                raise KeyboardInterrupt
            self.taken.append(batch)
            x_BTD = batch.model_inputs["x_BTD"]
            for call, block in enumerate(model.blocks):
                if block in blocks.modules:
                    blocks.on_input(call, x_BTD, batch)
                x_BTD = block(x_BTD)
            yield batch, ForwardPass(x_BTD, norm(x_BTD), lambda: (1.0, 0.5), len(blocks.modules))


@pytest.fixture(autouse=True)
def one_thread():
    """Eight wide: every thread more is in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Stack().eval()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2.0)
        model.norm.bias.normal_()
    return model


@pytest.fixture(scope="module")
def inputs():
    """Batches of which each has padding at the end of its last sequence."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(BATCHES):
        mask_ST = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
        mask_ST[-1, -2:] = False
        x_BTD = torch.randn(SEQUENCES, LENGTH, D, generator=generator)
        batches.append(Batch({"x_BTD": x_BTD}, mask_ST))
    return Inputs(batches, BATCHES * (ROWS - 2), None, "made")


@pytest.fixture
def read(tmp_path):
    (job,) = sleeping_jobs(tmp_path / "jobs", 1)
    return job.reads[0]


@pytest.fixture
def often(read, tmp_path, monkeypatch):
    """The read, saving after every batch."""
    monkeypatch.setattr(saved_state, "_WRITING_SHARE", 0)
    (tmp_path / "out").mkdir()
    return replace(read, checkpoint_interval=1e-9, checkpoint_location=str(tmp_path / "out"))


def fitting(read, taps):
    """The read with the memory for so many taps at once."""
    return replace(read, accumulator_gb=(taps + 0.5) * TAP_BYTES * D**2 / 1e9)


def final_of(model, placement="pre"):
    return FinalNorm("norm", probe(model.norm, D), placement, D, len(model.blocks))


def run(read, model, inputs, engine=None, placement="pre"):
    """(what both reads say, position, events) after all passes."""
    engine, final = engine or StackEngine(), final_of(model, placement)
    passes = make_passes(read, engine, model, final, inputs, live_norm(model.norm, final.behaviour, D))
    events, running = [], passes.run()
    while True:
        try:
            events.append(next(running))
        except StopIteration as end:
            measured, stream, position = end.value
            said = [*measured.finish(), *stream.finish()] if engine.ranks.rank == 0 else []
            return said, position, events


def bits(said):
    """Every number as it is written to its last digit."""
    return json.dumps(said)


def covariances(model, inputs, placement="pre"):
    """Eigenvalues of each tap by numpy alone, descending."""
    taps = [[] for _ in range(len(model.blocks) + 1)]
    with torch.no_grad():
        for batch in inputs.batches:
            x_BTD = batch.model_inputs["x_BTD"]
            for tap, block in enumerate(model.blocks):
                taps[tap].append(x_BTD[batch.mask_ST])
                x_BTD = block(x_BTD)
            taps[-1].append((model.norm(x_BTD) if placement == "post" else x_BTD)[batch.mask_ST])
    return [np.linalg.eigvalsh(np.cov(torch.cat(rows).double().numpy().T, bias=True))[::-1] for rows in taps]


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_every_tap_is_what_entered_its_block_and_the_last_what_the_norm_makes_of_it(read, model, inputs, placement):
    (_, final, _, blocks, spectra), position, _ = run(read, model, inputs, placement=placement)
    assert [row["block"] for row in blocks] == [0, 1, 2, 3]
    assert [row["site"] for row in spectra] == ["tap 0", "tap 1", "tap 2", "tap 3"]
    expected = covariances(model, inputs, placement)
    for row, eigenvalues_D in zip(spectra, expected, strict=True):
        assert row["eigenvalues"][:-1] == pytest.approx(eigenvalues_D[:-1], rel=1e-6)
    assert position.num_taps == TAPS
    # A post-LN stream ends in the norm's own output, which is what the final norm's spectrum is of.
    of_output = spectra[-1]["eigenvalues"][:-1] == pytest.approx(final["eigenvalues"][:-1], rel=1e-4)
    assert of_output == (placement == "post")


@pytest.mark.parametrize(("fit", "passes"), [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_taps_that_do_not_fit_are_read_in_further_passes_and_no_bit_moves(read, model, inputs, fit, passes):
    engine = StackEngine()
    said, position, events = run(fitting(read, fit), model, inputs, engine)
    assert len(engine.taken) == passes * BATCHES
    assert bits(said) == bits(run(fitting(read, TAPS), model, inputs)[0])
    phases = list(dict.fromkeys(e.phase for e in events if e.phase != "spectrum"))
    last = [min(first + fit, TAPS) - 1 for first in range(0, TAPS, fit)]
    several = [f"taps {first} to {end}" for first, end in zip(range(0, TAPS, fit), last, strict=True)]
    assert phases == (several if passes > 1 else ["forward"])
    assert position.forward_seconds == pytest.approx(passes * BATCHES * 1.0)


def test_the_final_norm_is_read_in_the_first_pass_alone(read, model, inputs):
    (columns, *_), _, _ = run(fitting(read, 1), model, inputs)
    assert columns["num_tokens"] == inputs.num_tokens


def test_progress_adds_up_in_every_pass(read, model, inputs):
    _, _, events = run(fitting(read, 2), model, inputs)
    assert all(isinstance(event, Progress) for event in events)
    assert {event.total for event in events} == {inputs.num_tokens}
    steps = [(ROWS - 2) * number for number in range(1, BATCHES + 1)]
    a_pass = [*steps, inputs.num_tokens]
    decomposed = [inputs.num_tokens] * 2  # a word after each of its two taps: silence is taken for a hang
    assert [event.done for event in events] == 2 * [*a_pass, *decomposed]
    assert [event.phase for event in events].count("spectrum") == 2 * 3


def test_a_stack_without_blocks_has_a_final_norm_and_no_stream(read, inputs):
    torch.manual_seed(0)
    (columns, _, of_stream, blocks, spectra), position, _ = run(read, Stack(0).eval(), inputs)
    assert columns["num_tokens"] == inputs.num_tokens
    assert (blocks, spectra, of_stream["blocks_preserved"]) == ([], [], None)
    assert position.num_taps == 1


def tapped(read, taps):
    """The read of those taps."""
    return replace(read, protocol=read.protocol.model_copy(update={"taps": taps}))


@pytest.mark.parametrize(("fit", "passes"), [(1, 2), (2, 1)])
def test_each_second_tap_and_the_last_in_as_many_passes_as_they_need(read, model, inputs, fit, passes):
    engine = StackEngine()
    said, _, _ = run(tapped(fitting(read, fit), "every:2"), model, inputs, engine)
    assert [row["block"] for row in said[3]] == [0, 2, 3]
    assert len(engine.taken) == passes * BATCHES
    assert said[0] == run(read, model, inputs)[0][0], "the final norm is the same"


def test_without_taps_one_pass_and_the_final_norm_alone(read, model, inputs):
    engine = StackEngine()
    said, _, _ = run(tapped(fitting(read, 1), "none"), model, inputs, engine)
    assert len(engine.taken) == BATCHES
    assert said[0] == run(read, model, inputs)[0][0]
    assert said[3:] == [[], []]


def test_replicas_read_the_taps_that_are_asked_for(read, model, inputs):
    for taps, blocks in (("every:2", [0, 2, 3]), ("none", [])):
        said, *_ = replicas(2, tapped(read, taps), model, inputs)[0]
        assert [row["block"] for row in said[3]] == blocks


@pytest.mark.parametrize(("fit", "cut"), [(1, 1), (1, 6), (1, 20), (3, 5), (3, 6), (3, 8), (4, 1), (4, 5)])
def test_a_read_that_was_cut_off_goes_on_and_no_bit_moves(often, model, inputs, fit, cut):
    job, whole = fitting(often, fit), -(-TAPS // fit) * BATCHES
    first = StackEngine(fails_at=cut)
    with pytest.raises(KeyboardInterrupt):
        run(job, model, inputs, first)
    second = StackEngine()
    said, position, events = run(job, model, inputs, second)
    assert len(second.taken) == whole - cut, "no batch is run twice"
    assert second.taken[0] is inputs.batches[cut % BATCHES]
    undisturbed, _, _ = run(fitting(replace(often, checkpoint_interval=0.0), fit), model, inputs)
    assert bits(said) == bits(undisturbed)
    assert position.forward_seconds == pytest.approx(whole * 1.0), "of both attempts"
    (remark,) = (event for event in events if isinstance(event, Remark))
    done = (cut % BATCHES) * (ROWS - 2)
    taps = f", taps from {cut // BATCHES * fit}" if cut >= BATCHES else ""
    assert remark.text == f"goes on from its checkpoint, at {done} of {inputs.num_tokens} tokens{taps}"
    assert next(e for e in events if isinstance(e, Progress) and e.done).done == done + ROWS - 2


def test_without_an_interval_nothing_is_saved(read, model, inputs, tmp_path):
    _, _, events = run(replace(read, checkpoint_location=str(tmp_path)), model, inputs)
    assert not (tmp_path / saved_state.FOLDER).exists()
    assert not [event for event in events if event.phase == "checkpoint"]


def replicas(size, read, model, inputs, order=None):
    """What the first of `size` replicas says; with `order` each begins its pass when the one before it has begun."""
    begun = [threading.Event() for _ in range(size)]

    def work(ranks):
        def before():
            if order is not None:
                place = order.index(ranks.rank)
                assert place == 0 or begun[order[place - 1]].wait(60)
                begun[ranks.rank].set()

        engine = StackEngine(ranks, before=before)
        return *run(read, model, inputs, engine), engine

    return in_ranks(size, work)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_replicas_divide_the_batches_and_their_first_has_all_rows(read, model, inputs, size):
    alone, _, _ = run(fitting(read, 2), model, inputs)
    found = replicas(size, fitting(read, 2 * size), model, inputs)  # they may be on one node: 2 taps each
    said, position, _, _ = found[0]
    taken = [batch for *_, engine in found for batch in engine.taken[: len(engine.taken) // 2]]
    assert [id(batch) for batch in taken] == [id(batch) for batch in inputs.batches], "consecutive, in order"
    assert said[0]["num_tokens"] == alone[0]["num_tokens"]
    for name in ("lambda_v", "lambda_mean", "depth", "alignment"):
        assert said[0][name] == pytest.approx(alone[0][name], rel=1e-6)
    for one, other in zip(said[4], alone[4], strict=True):
        assert one["eigenvalues"][:-1] == pytest.approx(other["eigenvalues"][:-1], rel=1e-6)
    # The slowest tells how long it took, and all say so.
    most = max(len(engine.taken) for *_, engine in found)
    assert {each[1].forward_seconds for each in found} == {most * 1.0}
    assert position.num_taps == TAPS


def test_what_replicas_saw_is_merged_in_the_order_of_the_tokens_whoever_is_first(read, model, inputs):
    said = [bits(replicas(3, read, model, inputs, order)[0][0]) for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0])]
    assert said[0] == said[1] == said[2]


def test_a_batch_that_gives_other_rows_than_it_says_cannot_be_divided(read, model, inputs):
    wrong = [Batch(batch.model_inputs, rows=ROWS - 1) for batch in inputs.batches]
    found = replicas(2, read, model, Inputs(wrong, BATCHES * (ROWS - 1), None, "made"))
    assert all(isinstance(each, RankError) for each in found)
    assert str(found[0]) == f"{ROWS} rows came of a batch of {ROWS - 1}: give --replicas 1"


def test_a_replica_without_a_checkpoint_begins_where_the_other_goes_on(often, model, inputs):
    """In the first pass each is at a batch of its own."""

    def cut_off(ranks):
        with contextlib.suppress(KeyboardInterrupt):
            run(often, model, inputs, StackEngine(ranks, fails_at=1))

    assert in_ranks(2, cut_off) == [None, None]
    (lost,) = (Path(often.checkpoint_location) / saved_state.FOLDER).glob("*-1of2.arrow")
    lost.unlink()
    found = replicas(2, often, model, inputs)
    assert [len(engine.taken) for *_, engine in found] == [2, 3]
    undisturbed = replicas(2, replace(often, checkpoint_interval=0.0), model, inputs)
    assert bits(found[0][0]) == bits(undisturbed[0][0])


def test_memory_that_ends_while_taps_are_decomposed_asks_for_fewer_taps(read, model, inputs, monkeypatch):
    final = final_of(model, "pre")
    norm = live_norm(model.norm, final.behaviour, D)
    passes = make_passes(fitting(read, TAPS), StackEngine(), model, final, inputs, norm)
    monkeypatch.setattr("deadbench.suite.reads.residual.ResidualRead._spectrum", lambda self, tap: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(passes.run())
    assert passes.fewer_taps() == TAPS // 2


def test_memory_that_ends_in_the_forward_pass_asks_for_a_smaller_batch(read, model, inputs):
    final = final_of(model, "pre")
    norm = live_norm(model.norm, final.behaviour, D)
    passes = make_passes(fitting(read, TAPS), StackEngine(fails_at=2), model, final, inputs, norm)
    with pytest.raises(KeyboardInterrupt):
        list(passes.run())
    assert passes.fewer_taps() is None
