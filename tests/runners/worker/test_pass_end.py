"""Where the end of a pass has a place beside the model: what runs there, and that nothing else comes of it."""

import contextlib
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from deadbench.runners.engines.block_weights import Block as StreamedBlock
from deadbench.runners.engines.streaming import StreamingEngine
from deadbench.runners.worker import aside, saved_state
from deadbench.runners.worker.aside import Aside, tensors_within
from deadbench.suite.architectures.kernel_test import live_norm
from deadbench.suite.inputs.batches import Inputs
from deadbench.suite.ranks import Ranks
from deadbench.suite.reads.residual import ResidualRead
from deadbench.suite.reads.tap import Tap
from tests.fake_gpu import GPU, fake_gpu
from tests.runners.sleepers import sleeping_jobs
from tests.runners.worker import test_passes as stack
from tests.suite.spectra.test_arrow_state import in_ranks

one_thread, stack_inputs = stack.one_thread, stack.inputs  # fixtures
BLOCKS = 5
ONE_MODEL_AT_A_TIME = threading.Lock()


@pytest.fixture
def inputs(stack_inputs):
    """Twice the batches."""
    return Inputs(stack_inputs.batches * 2, stack_inputs.num_tokens * 2, None, "made")


@pytest.fixture
def read(tmp_path):
    (job,) = sleeping_jobs(tmp_path / "jobs", 1)
    (tmp_path / "out").mkdir()
    return replace(job.reads[0], checkpoint_location=str(tmp_path / "out"))


@pytest.fixture
def at_once(monkeypatch):
    """From when this is called, a pass ends before the next one begins, as on the CPU."""
    return lambda: monkeypatch.setattr(Aside, "possible", False, raising=False)


class Stream:
    """A stream of the CPU."""

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *exception):
        pass


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The CPU has a place beside the model, too: what the fake GPU lacks, storages and ranks, can be tried there."""

    def made(self, device):
        self._device, self._stream, self._begun = device, Stream(), None

    monkeypatch.setattr(Aside, "__init__", made)
    monkeypatch.setattr(Aside, "possible", True, raising=False)
    monkeypatch.setattr(aside, "_current_stream", lambda device: None)
    return torch.device("cpu")


def streamed(read, inputs, device=GPU, ranks=None):
    """What a read of a model of which one block is there at a time says, its position, and its events."""
    with ONE_MODEL_AT_A_TIME:  # of ranks that are threads
        torch.manual_seed(0)
        model = stack.Stack(BLOCKS).eval()
    with torch.no_grad():
        for number, block in enumerate(model.blocks):  # the stream falls, so that halves are asked for
            block.map.weight.mul_(0.3 * number)
    final = stack.final_of(model)
    norm = live_norm(model.norm, final.behaviour, stack.D)
    model = model.to(device)
    engine = StreamingEngine(device, ranks=ranks or Ranks())
    engine._blocks = {block: StreamedBlock(block, None, None) for block in model.blocks}
    running, events = stack.make_passes(read, engine, model, final, inputs, norm).run(), []
    with contextlib.closing(running):
        while True:
            try:
                events.append(next(running))
            except StopIteration as end:
                measured, stream, position = end.value
                return [*measured.finish(), *stream.finish()], position, events


def of_all(said):
    """Comparable, to the bit."""
    return [{name: str(value) for name, value in row.items()} for row in [said[0], said[1], *said[3], *said[4]]]


@pytest.fixture
def threads(monkeypatch):
    """(tap's rows, name of the thread) of each decomposition."""
    found, finish = [], Tap.finish

    def watched(self):
        found.append(threading.current_thread().name)
        return finish(self)

    monkeypatch.setattr(Tap, "finish", watched)
    return found


def test_a_tap_is_decomposed_beside_the_block_that_follows(read, inputs, monkeypatch, threads, at_once):
    ran_on, update = threading.Event(), ResidualRead.update

    def watched(self, tap, acts, mask=None, *, is_last=False):
        if tap == 2:
            ran_on.set()
        return update(self, tap, acts, mask, is_last=is_last)

    decompose, waited = ResidualRead.decompose, []

    def waits(self):
        if 1 in self._closed:  # which nothing of the block behind it may wait for
            waited.append(ran_on.wait(20))
        yield from decompose(self)

    monkeypatch.setattr(ResidualRead, "update", watched)
    monkeypatch.setattr(ResidualRead, "decompose", waits)
    with fake_gpu(monkeypatch):
        beside, position, _ = streamed(read, inputs)
        assert waited == [True]
        assert len(threads) == BLOCKS + 1
        assert all("aside" in name for name in threads)
        assert position.spectrum_seconds > position.forward_seconds > 0
        at_once()
        apart, before, _ = streamed(read, inputs)
        assert {*threads[BLOCKS + 1 :]} == {threading.current_thread().name}
    assert of_all(beside) == of_all(apart)
    assert position.forward_seconds == before.forward_seconds
    assert [thread for thread in threading.enumerate() if "aside" in thread.name] == []


def test_what_goes_wrong_there_ends_the_read_and_leaves_nothing_running(read, inputs, monkeypatch):
    finish = Tap.finish

    def fails(self):
        if threading.current_thread() is not threading.main_thread():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return finish(self)

    monkeypatch.setattr(Tap, "finish", fails)
    with fake_gpu(monkeypatch), pytest.raises(torch.OutOfMemoryError):
        streamed(read, inputs)
    assert [thread for thread in threading.enumerate() if "aside" in thread.name] == []


@pytest.mark.parametrize("cut", [1, 3])
def test_a_read_that_was_cut_off_goes_on_to_the_same_rows(cut, read, inputs, monkeypatch, on_the_cpu):
    monkeypatch.setattr(saved_state, "_WRITING_SHARE", 0)
    whole, *_ = streamed(read, inputs, on_the_cpu)
    ended, close_pass = [], ResidualRead.close_pass

    def stops(self):
        ended.append(self)
        if len(ended) == cut + 1:
            raise KeyboardInterrupt
        return close_pass(self)

    often = replace(read, checkpoint_interval=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(ResidualRead, "close_pass", stops)
        with pytest.raises(KeyboardInterrupt):
            streamed(often, inputs, on_the_cpu)
    again, _, events = streamed(often, inputs, on_the_cpu)
    assert any("goes on from its checkpoint" in str(event) for event in events)
    assert of_all(again) == of_all(whole)


def test_replicas_conclude_in_step_and_say_the_same(read, inputs, monkeypatch, on_the_cpu, at_once, threads):
    asked, share = [], Ranks.share

    def watched(self, mine):
        asked.append(threading.current_thread().name)
        return share(self, mine)

    def of_rank(ranks):
        return streamed(replace(read, replicas=2), inputs, on_the_cpu, ranks)[0]

    monkeypatch.setattr(Ranks, "share", watched)
    beside = in_ranks(2, of_rank)[0]
    assert [name for name in asked if "aside" in name] == []
    assert len(threads) == BLOCKS + 1
    assert all("aside" in name for name in threads)
    at_once()
    assert of_all(beside) == of_all(in_ranks(2, of_rank)[0])


def test_memory_is_kept_until_the_stream_has_read_it(monkeypatch):
    told, alive = [], []

    class Behind(Stream):
        """A device that reads what it was told to at the last moment."""

        def wait_stream(self, other):
            told.append(("waits for", other))

        def synchronize(self):
            told.append("synchronized")
            alive.extend(each() is not None for each in tensors)

    monkeypatch.setattr(aside, "_stream", lambda device: Behind())
    monkeypatch.setattr(aside, "_current_stream", lambda device: "the model's")
    rows_ND = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tap = Tap(4, 30)
    for part_ND in rows_ND.split(10):
        tap.update(part_ND)
    tensors = [weakref.ref(each) for each in tensors_within(tap)]
    assert len(tensors) >= 2 * 3 + len(tap._marks), "two offsets and Gram matrices with what they are checked by"
    with Aside(torch.device("meta")) as beside:
        beside._device = torch.device("cpu")  # for its clock
        taps = [tap]
        del tap
        beside.begin(taps.clear, taps)
        assert beside.ended() >= 0
    assert told == [("waits for", "the model's"), "synchronized"]
    assert all(alive)
    assert not any(each() is not None for each in tensors)
