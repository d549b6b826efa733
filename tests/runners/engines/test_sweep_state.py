"""A sweep over blocks that is cut off at any moment goes on in another engine, and no bit moves."""

import json

import pyarrow as pa
import pytest
import torch

from deadbench.runners.engines import deferred_init
from deadbench.runners.engines.base import Blocks, Swept
from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.engines.streaming import StreamingEngine
from deadbench.suite.architectures.build import build_config
from deadbench.suite.architectures.parts import block_list
from deadbench.suite.architectures.resolve import resolve
from deadbench.suite.spectra.arrow_state import StateError
from tests.runners.engines.test_streaming import ARCHITECTURES, CPU, TEXT, batches_for


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch):
    monkeypatch.setattr(deferred_init, "_DEFERRED_ELEMENTS", 64)


def through_a_file(states):
    """As another process gets them: bytes alone."""
    sink = pa.BufferOutputStream()
    writer = None
    for state in states:
        writer = writer or pa.ipc.new_stream(sink, state.schema)
        writer.write_batch(state)
    if writer is None:
        return []
    writer.close()
    return list(pa.ipc.open_stream(sink.getvalue()))


def sweep(engine, whole, batches, *, stop_after=None):
    """(what entered each block, what passed the final norm, both by batch, number of steps, states at the end)."""
    found = engine.resolved or resolve(whole, "text", "encoder")
    norm, model = found.final.path, whole.get_submodule(found.part)
    path, _ = block_list(model, norm)
    taps, out, steps = {}, {}, 0
    number = {id(batch): index for index, batch in enumerate(batches)}
    blocks = Blocks(
        list(model.get_submodule(path).children()),
        lambda tap, acts, batch: taps.update({(tap, number[id(batch)]): acts.clone()}),
    )
    for step in engine.passes(model, model.get_submodule(norm), batches, blocks):
        if not isinstance(step, Swept):
            batch, traffic = step
            out[number[id(batch)]] = traffic.output_BTD.clone()
            continue
        steps += 1
        if steps == stop_after:
            return taps, out, steps, through_a_file(step.state())
    return taps, out, steps, []


def assert_bits(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8)), key


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_sweep_that_was_cut_goes_on_to_the_same_bits(model_type, tmp_path):
    settings = {"model_type": model_type} | ARCHITECTURES[model_type]
    batches = batches_for(model_type)
    trained = len(model_type) % 2 == 0
    if trained:
        TorchEngine(CPU).load_random(build_config(settings), 3, torch.float32).save_pretrained(tmp_path)

    def loaded(parked):
        engine = StreamingEngine(CPU, parked_bytes=parked)
        if trained:
            return engine, engine.load_trained(tmp_path, torch.float32)
        return engine, engine.load_random(build_config(settings), 3, torch.float32)

    engine, model = loaded(1e9)
    taps, out, steps, _ = sweep(engine, model, batches)
    for cut in range(1, steps):
        parked = 0 if cut % 2 else 1e9  # the streams on disk, or in memory
        engine.parked_bytes = parked
        before, out_before, _, states = sweep(engine, model, batches, stop_after=cut)
        other, again = loaded(1e9 - parked) if cut == 1 else (engine, model)
        other.go_on_from(states)
        after, out_after, left, _ = sweep(other, again, batches)
        assert left == steps - cut, "no block is run twice"
        assert not before.keys() & after.keys()
        assert_bits(before | after, taps)
        assert_bits(out_before | out_after, out)


class Beside(torch.nn.Module):
    """A block that returns more than its stream."""

    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def forward(self, x):
        return x + 1, *self.returned(x)


def stepped(model, x=None):
    from deadbench.runners.engines.stepped_pass import SteppedPass, handed_over
    from deadbench.suite.inputs.batches import Batch

    x = torch.zeros(2, 3) if x is None else x
    return SteppedPass(Batch({}), model, {"x": x}), handed_over(model.blocks)


class Model(torch.nn.Module):
    def __init__(self, returned, after=lambda x, *rest: x):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Beside(returned) for _ in range(3))
        self.after, self.got = after, None

    def forward(self, x):
        first = None
        for block in self.blocks:
            x, *rest = block(x)
            first = rest if first is None else first
            x = self.after(x, *first)
        self.got = (x, *first)


def run_to(model, call):
    """The pass of `model` before block `call`, and what is there to hand blocks over."""
    run, handed = stepped(model)
    with handed:
        run.go_on(None)
        for block in list(model.blocks)[:call]:
            run.go_on(Beside.forward(block, *run.standing().args))
    return run


def brought_back(model, state):
    from deadbench.runners.engines.sweep_state import Packed

    run, handed = stepped(model)
    with handed:
        run.go_on(None)
        run.come_to(Packed(state, CPU))
        while not run.finished:
            run.go_on(Beside.forward(run.standing().module, *run.standing().args))
    return model.got


def test_what_the_first_block_gives_beside_the_stream_is_there_after_the_cut():
    def returned(x):
        return {"bias": torch.arange(4.0)[::2]}, None, 7, [True]

    model = Model(returned)
    x, bias, none, number, flags = brought_back(model, run_to(model, 2).state(0))
    assert torch.equal(x, torch.full((2, 3), 3.0))
    assert (bias["bias"].tolist(), none, number, flags) == ([0.0, 2.0], None, 7, [True])


def test_a_stream_that_the_model_changes_between_blocks_is_the_one_that_was_there():
    model = Model(lambda x: (), after=lambda x: x * 2)
    x, *_ = brought_back(model, run_to(model, 2).state(0))
    assert torch.equal(x, torch.full((2, 3), 14.0))


def test_what_came_of_a_result_that_is_gone_is_not_a_number():
    """The model keeps a sum of what the first block gave, which no state holds: nothing is made up in its place."""
    kept = []

    def after(x, *_):
        kept.append(x.sum())
        return x

    model = Model(lambda x: (), after)
    state = run_to(model, 2).state(0)
    kept.clear()
    brought_back(model, state)
    assert kept[0].isnan()
    assert kept[1] == 12


def test_what_no_file_holds_is_said():
    model = Model(lambda x: (torch.Generator(),))
    with pytest.raises(StateError, match="a block returns a Generator, which no file holds"):
        run_to(model, 1).state(0)


def test_another_model_does_not_take_the_state():
    state = run_to(Model(lambda x: ()), 2).state(0)
    wider = Model(lambda x: (), after=lambda x: x.repeat(1, 2))
    with pytest.raises(StateError, match="does not come to the place"):
        brought_back(wider, state)
    place = json.loads(state.column("place")[0].as_py())
    shorter = state.set_column(2, state.schema.field(2), pa.array([b""], pa.large_binary()))
    with pytest.raises(StateError, match="another size"):
        brought_back(Model(lambda x: ()), shorter)
    assert sum(place["bytes"]) == 2 * 3 * 4, "the stream alone"


def test_the_stream_of_another_input_is_seen_by_what_stands_beside_it():
    engine = StreamingEngine(CPU)
    model = engine.load_random(build_config({"model_type": "gpt_neox"} | TEXT), 0, torch.float32)
    batches = batches_for("gpt_neox")
    *_, states = sweep(engine, model, batches, stop_after=4)
    padded = batches[-1]
    padded.model_inputs["attention_mask"][1, 2:] = 0
    engine.go_on_from(states)
    with pytest.raises(StateError, match="does not come to the place"):
        sweep(engine, model, batches)
