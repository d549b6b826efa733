"""How often a batch makes the host wait for a device, and what it copies: counted on a fake one, beside the docs."""

import collections
import contextlib
import functools
import json
import operator
import re

import pytest
import torch

from deadbench.runners.engines.block_weights import Block as StreamedBlock
from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.engines.streaming import StreamingEngine
from deadbench.runners.engines.tensor_parallel import ParallelEngine
from deadbench.runners.jobs.events import Progress
from deadbench.runners.planning import seconds
from deadbench.suite.architectures.kernel_test import live_norm
from deadbench.suite.inputs.batches import Inputs
from deadbench.suite.ranks import Ranks
from deadbench.suite.reads.residual import ResidualRead
from deadbench.suite.reads.tap import Tap
from deadbench.suite.spectra import solvers
from deadbench.suite.spectra.gram import Gram
from deadbench.suite.spectra.routes import Lifted, Plain, Whitened
from tests.conftest import ROOT
from tests.fake_gpu import GPU, fake_gpu, most
from tests.runners.engines import test_vllm_worker as vllm
from tests.runners.engines.fake_vllm import pretend_vllm
from tests.runners.sleepers import sleeping_jobs
from tests.runners.worker import test_passes as stack

TABLE = (ROOT / "docs" / "costs.md").read_text("utf-8")
one_thread, stack_inputs, sought = stack.one_thread, stack.inputs, vllm.sought  # fixtures


def row(name):
    """The numbers of a row of the page's tables, by its first cell."""
    (cells,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", TABLE, re.MULTILINE)
    return [cell.strip() for cell in cells.split("|")]


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch, fake_gpu(patch) as device:
        yield device


@contextlib.contextmanager
def hooks_watched(gpu):
    """Gives where hooks made the host wait."""
    found, update = [], ResidualRead.update

    def watched(self, *args, **options):
        before = len(gpu.queue.counted.syncs)
        update(self, *args, **options)
        found.extend(gpu.queue.counted.syncs[before:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResidualRead, "update", watched)
        yield found


def engine_of(name, model):
    if name == "streaming":
        engine = StreamingEngine(GPU)
        engine._blocks = {block: StreamedBlock(block, None, None) for block in model.blocks}
        return engine
    if name == "tensor parallel":
        return ParallelEngine(GPU, ranks=Ranks())
    return TorchEngine(torch.device("cpu") if name == "cpu" else GPU)


@pytest.fixture(scope="module")
def inputs(stack_inputs):
    """Twice the batches."""
    return Inputs(stack_inputs.batches * 2, stack_inputs.num_tokens * 2, None, "made")


@pytest.fixture(scope="module")
def a_read(gpu, inputs, tmp_path_factory):
    """Of an engine, once: what a read of blocks said, position, what was counted of each step, waits in hooks."""
    (job,) = sleeping_jobs(tmp_path_factory.mktemp("jobs"), 1)

    @functools.cache
    def read(name):
        torch.manual_seed(0)
        model, steps = stack.Stack().eval(), []
        final = stack.final_of(model)
        norm = live_norm(model.norm, final.behaviour, stack.D)
        engine = engine_of(name, model.to(GPU) if name != "cpu" else model)
        running = stack.make_passes(job.reads[0], engine, model, final, inputs, norm).run()
        with hooks_watched(gpu) as in_hooks:
            while True:
                try:
                    with gpu.counting() as counted:
                        event = next(running)
                except StopIteration as end:
                    measured, stream, position = end.value
                    return [*measured.finish(), *stream.finish()], position, steps, in_hooks
                if isinstance(event, Progress) and event.phase in ("forward", "blocks"):
                    steps.append(counted)

    return read


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resident", "tensor parallel", "streaming"])
def test_a_batch_waits_and_copies_as_often_as_the_page_says(name, a_read):
    _, _, steps, in_hooks = a_read(name)
    waits, down, up = map(int, row(name)[1:4])
    if name == "streaming":  # a step is a batch and a block; of the first blocks' second halves of the tokens
        found = [steps[at] for at in (8, 9, 10, 20, 21, 22)]
        assert [each.numbers() for each in found] == [(waits, down, up)] * len(found), most(found[0].syncs)
    else:
        assert steps[-1].numbers() == (waits, down, up), most(steps[-1].syncs)
    assert in_hooks == []
    assert row(name)[0] == "0"


@pytest.mark.slow
def test_vllms_worker_waits_and_copies_as_often_as_the_page_says(monkeypatch, sought, gpu):
    context = pretend_vllm(monkeypatch)
    model = vllm.Model(split=True).to(GPU)
    steps = []

    def run(passes, padding=0):
        for ids in (torch.arange(vllm.TOKENS) * 37 % 97).to(GPU).chunk(passes):
            with gpu.counting() as counted, torch.no_grad():
                model(ids)
            steps.append(counted)

    model.run = run
    reader = vllm.reader_of(model, sought)
    context.tokens(vllm.TOKENS // vllm.PASSES)
    with torch.no_grad():
        model(torch.arange(vllm.TOKENS // vllm.PASSES).to(GPU))  # the probe
    reader.deadbench_pass(0, vllm.BLOCKS + 1)
    with hooks_watched(gpu) as in_hooks:
        run(vllm.PASSES)
    told = json.loads(reader.deadbench_end_pass())
    assert told["taps"] == vllm.BLOCKS + 1, told
    assert steps[-1].numbers() == tuple(map(int, row("vLLM")[1:4])), most(steps[-1].syncs)
    assert in_hooks == []


@pytest.mark.slow
def test_what_a_device_reads_is_what_the_cpu_reads(a_read):
    (there, *_), (here, *_) = a_read("resident")[0], a_read("cpu")[0]
    assert there == {
        name: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value for name, value in here.items()
    }


@pytest.mark.slow
def test_seconds_are_the_devices_and_of_the_model_alone(a_read, inputs, gpu):
    """The fake device takes a millisecond for each operation, and the host none."""
    _, position, *_ = a_read("resident")
    model = stack.Stack().to(GPU)
    with gpu.counting(), torch.no_grad():
        x_BTD = inputs.batches[0].model_inputs["x_BTD"]
        before = gpu.queue.told
        model(x_BTD.to(GPU))
    of_a_batch = gpu.queue.told - before
    assert of_a_batch > len(model.blocks)
    assert position.forward_seconds == pytest.approx(len(inputs.batches) * of_a_batch / 1000)
    assert position.spectrum_seconds > position.forward_seconds


@pytest.mark.parametrize("kind", ["gram", "lifted-gram", "whitened-gram"])
def test_a_taps_end_decomposes_as_often_as_the_page_says(kind, monkeypatch):
    D, asked = 96, collections.Counter()
    rows_ND = torch.randn(8 * D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if kind == "lifted-gram":
        rows_ND = torch.nn.functional.layer_norm(rows_ND, (D,)).float()
    elif kind == "whitened-gram":
        rows_ND = rows_ND * torch.logspace(0, -5, D, dtype=torch.float64)

    class Counting(solvers.Lapack):
        def eigh(self, matrix_DD, uplo):
            asked["eigenpairs"] += 1
            return super().eigh(matrix_DD, uplo)

        def cholesky(self, matrix_DD):
            asked["cholesky"] += 1
            return super().cholesky(matrix_DD)

        def triangle(self, rows_ND):
            asked["qr", round(len(rows_ND) / D)] += 1
            return super().triangle(rows_ND)

        def solve(self, factor_DD, columns_DK, *, upper):
            asked["columns"] += columns_DK.shape[1] == 1
            return super().solve(factor_DD, columns_DK, upper=upper)

    monkeypatch.setitem(solvers.WAYS, "cpu", Counting())
    tap = Tap(D, 4 * D)
    for batch_ND in rows_ND.split(2 * D):
        tap.update(batch_ND)
    assert tap.finish().method == kind
    *counts, flop = map(float, row(f"{kind}'s"))
    assert [asked["eigenpairs"], asked["cholesky"], asked["qr", 1], asked["qr", 2]] == counts
    assert asked["columns"] <= seconds._COLUMNS
    weights = seconds._EIGH, seconds._CHOLESKY, seconds._QR_OF_D, seconds._QR_OF_2D
    assert flop == pytest.approx(sum(map(operator.mul, weights, counts)), abs=0.05)
    planned = {"lifted-gram": "random", "whitened-gram": "trained"}
    if kind in planned:
        assert flop == pytest.approx(seconds._EIGH + seconds._FACTORS[planned[kind]], abs=0.05)


ROUTES = {"gram": Plain, "lifted-gram": Lifted, "whitened-gram": Whitened}


@pytest.mark.parametrize("name", ROUTES)
def test_a_tap_costs_what_the_page_says(name, gpu):
    D, N = 1536, 48  # of eight panels
    gram = Gram(D, GPU, 1e9)
    eye_DD = torch.eye(D, dtype=torch.float64).to(GPU)
    more = {"gram": (), "lifted-gram": (eye_DD[:, :1], eye_DD[0, :1]), "whitened-gram": (eye_DD,)}[name]
    route, rows_ND = ROUTES[name](gram, *more), torch.randn(2 * N, D, dtype=torch.float64).to(GPU)
    flop, moved = [], []
    for rows in (rows_ND[:N], rows_ND):
        route.offer(rows)  # draws what checks are made with
        with gpu.counting() as counted:
            refused = route.offer(rows)
        assert counted.numbers() == (0, 0, 0), most(counted.syncs)
        assert not bool(refused)
        flop.append(counted.flop)
        moved.append(counted.moved)
    squares, linear, squares_a_batch, bytes_a_token, bytes_a_batch = map(float, row(name))
    assert (flop[1] - flop[0]) / N == pytest.approx(squares * D**2 + linear * D)
    assert 2 * flop[0] - flop[1] == pytest.approx(squares_a_batch * D**2)
    assert (moved[1] - moved[0]) / (N * D) == pytest.approx(bytes_a_token, rel=0.02)
    assert (2 * moved[0] - moved[1]) / D**2 == pytest.approx(bytes_a_batch, rel=0.02)
