"""What runs inside vLLM's workers, without vLLM: models of its kind, its forward context, its tensor-parallel group."""

import copy
import importlib
import json
import pickle
import queue
import threading
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from torch import nn

from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.kernel_test import live_norm
from deadbench.suite.architectures.locate import locate_final_norm
from deadbench.suite.reads.final_norm import FinalNormRead
from deadbench.suite.reads.residual import ResidualRead
from tests.runners.engines.fake_vllm import pretend_vllm
from tests.suite.spectra.test_arrow_state import in_ranks

D, BLOCKS, TOKENS, PASSES = 16, 3, 96, 3
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "hidden_size": D,
    "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}  # fmt: skip


class Norm(nn.Module):
    """As vLLM's RMSNorm: with a residual it adds in place, and returns the sum too."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x, residual=None):
        x = x if residual is None else residual.add_(x)
        normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight
        return normed if residual is None else (normed, x)


class Block(nn.Module):
    def __init__(self, split):
        super().__init__()
        self.norm, self.map, self.split = Norm(), nn.Linear(D, D), split

    def forward(self, positions, h, r=None):
        if not self.split:
            return h + self.map(self.norm(h))
        h, r = (self.norm(h), h.clone()) if r is None else self.norm(h, r)
        return self.map(h), r


class Model(nn.Module):
    """A model as vLLM writes them: its stream is h + r where `split`, else h. `seen`: what passed each tap."""

    def __init__(self, split):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, D)
        self.layers = nn.ModuleList(Block(split) for _ in range(BLOCKS))
        self.norm, self.split, self.seen = Norm(), split, []

    def forward(self, ids):
        positions, h, r = torch.arange(len(ids)), self.embed(ids), None
        for block in self.layers:
            self.seen.append((h if r is None else h + r).detach())
            h, r = block(positions, h, r) if self.split else (block(positions, h), None)
        self.seen.append((h if r is None else h + r).detach())
        h = self.norm(h, r)[0] if self.split else self.norm(h)
        return h + 0.0  # another tensor, of the same values

    def run(self, passes, padding=0):
        """The tokens in so many passes, the last one first made longer by rows that are no tokens."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for ids in torch.randint(0, 97, (TOKENS,), generator=generator).chunk(passes):
                self(torch.cat([ids, torch.zeros(padding, dtype=ids.dtype)]))


@pytest.fixture(scope="module")
def sought():
    """The final norm and transformers' module of it, as the parent process sends them."""
    config = build_config(LLAMA)
    final = locate_final_norm(config)
    module = build_model(config, "meta").get_submodule(final.path).to_empty(device="cpu")
    return final, module


@pytest.fixture
def context(monkeypatch):
    return pretend_vllm(monkeypatch)


def reader_of(model, sought, num_tokens=TOKENS, stride=1):
    """A worker of vLLM with our extension, which has looked at the model."""
    worker = importlib.import_module("deadbench.runners.engines.vllm_worker")
    reader = worker.StreamReader()
    reader.model_runner = SimpleNamespace(get_model=lambda: model)
    reader.deadbench_begin(pickle.dumps(sought), num_tokens, "float32", stride)
    return reader


def read(reader, model, context, *, per_pass=BLOCKS + 1, padding=0, by_layer=False):
    """A whole read as the parent process has it done; returns what the last pass told, and the tables."""
    context.tokens(TOKENS // PASSES, by_layer=by_layer)
    with torch.no_grad():
        model(torch.arange(TOKENS // PASSES + padding))  # the probe
    model.seen.clear()
    first, taps, told = 0, 1, {}
    while first < taps:
        reader.deadbench_pass(first, per_pass)
        model.run(PASSES, padding)
        told = json.loads(reader.deadbench_end_pass())
        if "error" in told:
            return told, {}
        taps, first = told["taps"], first + per_pass
    tables = [pa.ipc.open_stream(part).read_all().to_pylist() for part in reader.deadbench_finish()]
    return told, dict(zip(("reads", "spectra", "blocks", "samples"), tables, strict=bool(tables)))


def expected_rows(model, sought, padding=0):
    """The same, of what the model itself has seen in its first sweep over the tokens."""
    final, replay = sought
    taps = [torch.cat([acts[: TOKENS // PASSES] for acts in model.seen[tap :: BLOCKS + 1][:PASSES]])
            for tap in range(BLOCKS + 1)]  # fmt: skip
    stream = ResidualRead(D, TOKENS, "float32", "pre")
    stream.wanted = range(BLOCKS + 1)
    for part in range(PASSES):
        for tap, acts in enumerate(taps):
            stream.update(tap, acts.chunk(PASSES)[part])
    stream.end_pass()
    replay.weight.data.copy_(model.norm.weight)
    measured = FinalNormRead(replay, live_norm(replay, final.behaviour, D))
    with torch.no_grad():
        for acts in taps[-1].chunk(PASSES):
            measured.update(acts, model.norm(acts).double())
    return measured.finish()[0], *stream.finish()


def assert_rows(tables, expected):
    columns, stream_columns, blocks, _ = expected
    (row,) = tables["reads"]
    for name, value in (columns | stream_columns).items():
        assert row[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), name
    assert len(tables["blocks"]) == len(blocks) == BLOCKS + 1
    for told, block in zip(tables["blocks"], blocks, strict=True):
        assert {name: told[name] for name in block} == block
    assert len(tables["spectra"]) == 1 + BLOCKS + 1, "the final norm's and every tap's"


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("split", [False, True], ids=["h", "h + r"])
def test_the_stream_that_vllm_splits_is_put_together(context, sought, split, by_layer):
    model = Model(split)
    told, tables = read(reader_of(model, sought), model, context, padding=5, by_layer=by_layer)
    assert told["taps"] == BLOCKS + 1
    assert told["detail"] == (
        f"Model; hooked norm (Norm) and {BLOCKS} blocks, stream {'h + r' if split else 'h'}; "
        "replayed by transformers' LlamaRMSNorm"
    )
    assert_rows(tables, expected_rows(model, sought))


@pytest.mark.parametrize("per_pass", [1, 3])
def test_the_rows_do_not_depend_on_how_many_taps_are_read_in_a_pass(context, sought, per_pass):
    model = Model(True)
    _, tables = read(reader_of(model, sought), model, context, per_pass=per_pass)
    assert_rows(tables, expected_rows(model, sought))


@pytest.mark.parametrize(("stride", "blocks"), [(2, [0, 2, 3]), (0, [])])
def test_the_taps_that_are_asked_for_are_read(context, sought, stride, blocks):
    model = Model(True)
    _, tables = read(reader_of(model, sought, stride=stride), model, context)
    columns, _, every, _ = expected_rows(model, sought)
    assert [row["block"] for row in tables["blocks"]] == blocks
    sigmas = [row["sigma_min"] for row in every if row["block"] in blocks]
    assert [row["sigma_min"] for row in tables["blocks"]] == pytest.approx(sigmas)
    assert tables["reads"][0]["depth"] == pytest.approx(columns["depth"], rel=1e-9)


def test_passes_that_warm_up_are_not_read(context, sought):
    model = Model(True)
    reader = reader_of(model, sought)
    context.warming_up()
    with torch.no_grad():
        model(torch.arange(7))  # before the probe
    told, tables = read(reader, model, context)
    assert_rows(tables, expected_rows(model, sought))

    again = Model(True)
    reader = reader_of(again, sought)
    context.tokens(TOKENS // PASSES)
    with torch.no_grad():
        again(torch.arange(TOKENS // PASSES))
    reader.deadbench_pass(0, BLOCKS + 1)
    again.run(PASSES)
    context.warming_up()
    again.run(1)
    assert json.loads(reader.deadbench_end_pass()) == told


def test_rows_are_counted_in_each_pass(context, sought):
    model = Model(False)
    told, _ = read(reader_of(model, sought, TOKENS + 1), model, context)
    assert told == {"error": f"vLLM ran {TOKENS} rows for {TOKENS + 1} tokens"}


def test_what_a_hook_raises_does_not_end_vllms_pass(context, sought):
    model = Model(False)
    reader = reader_of(model, sought)
    context.tokens(TOKENS // PASSES)
    with torch.no_grad():
        model(torch.arange(TOKENS // PASSES))
    reader.deadbench_pass(0, BLOCKS + 1)
    model.layers[1].map.weight.data[0, 0] = float("nan")
    model.run(PASSES)
    told = json.loads(reader.deadbench_end_pass())
    assert "not finite" in told["error"]
    assert "after block 2" in told["error"]
    model.layers[1].map.weight.data[0, 0] = 0.0
    reader.deadbench_pass(0, BLOCKS + 1)  # the next is not blamed
    model.run(PASSES)
    assert json.loads(reader.deadbench_end_pass())["taps"] == BLOCKS + 1


def test_a_model_whose_last_norm_is_another_is_refused(context, sought):
    class Doubled(Norm):
        def forward(self, x, residual=None):
            return 2 * super().forward(x)

    class Headed(Model):
        def forward(self, ids):
            return super().forward(ids) @ torch.eye(D).flip(0)

    doubled, headed = Model(False), Headed(False)
    doubled.norm = Doubled()
    for model, said in (
        (doubled, "vLLM's norm (Doubled) is not the final norm of the configuration"),
        (headed, "no module of vLLM's Headed makes its last hidden state"),
    ):
        reader = reader_of(model, sought)
        context.tokens(7)
        with torch.no_grad():
            model(torch.arange(7))
        assert reader._hooked_read.error == said


def test_nothing_is_hooked_when_the_read_is_over(context, sought):
    model = Model(True)
    read(reader_of(model, sought), model, context)
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == []


def in_a_group(monkeypatch, mine):
    """As `context`, with the ranks that a thread has in `mine` for vLLM's tensor-parallel group."""

    class Group:
        cpu_group = None
        rank_in_group = property(lambda self: mine.ranks.rank)
        world_size = property(lambda self: mine.ranks.size)

    context = pretend_vllm(monkeypatch, Group())
    worker = importlib.import_module("deadbench.runners.engines.vllm_worker")
    monkeypatch.setattr(worker, "_gather", lambda group, value: mine.ranks.gather(value))
    return context


@pytest.mark.parametrize("per_pass", [BLOCKS + 1, 2])
def test_ranks_share_the_taps_and_the_first_tells(monkeypatch, sought, per_pass):
    mine, update, updated, told = threading.local(), ResidualRead.update, set(), []
    context = in_a_group(monkeypatch, mine)
    alone, *models = (Model(True) for _ in range(3))
    alone.run(PASSES)

    def noted(self, tap, *rest, **also):
        before = {*self._taps}
        update(self, tap, *rest, **also)
        updated.update((self.ranks.rank, new) for new in {*self._taps} - before)

    def work(ranks):
        mine.ranks = ranks
        model = models[ranks.rank]
        found = read(reader_of(model, sought), model, context, per_pass=per_pass)
        told.append((ranks.rank, *found))

    monkeypatch.setattr(ResidualRead, "update", noted)
    context.tokens(TOKENS // PASSES)
    in_ranks(2, work, "taps")
    monkeypatch.undo()
    (_, first, tables), (_, second, nothing) = sorted(told, key=lambda each: each[0])
    assert updated == {(0, 0), (1, 1), (0, 2), (1, 3)}
    assert first["taps"] == second["taps"] == BLOCKS + 1
    assert nothing == {}
    assert_rows(tables, expected_rows(alone, sought))


def test_one_rank_that_fails_fails_them_all(monkeypatch, sought):
    mine, told, models = threading.local(), [], [Model(False), Model(False)]
    context = in_a_group(monkeypatch, mine)

    def work(ranks):
        mine.ranks = ranks
        model = models[ranks.rank]
        told.append(read(reader_of(model, sought, TOKENS + ranks.rank), model, context)[0])

    in_ranks(2, work, "taps")
    assert told == [{"error": f"vLLM ran {TOKENS} rows for {TOKENS + 1} tokens"}] * 2


class Missing(nn.Identity):
    """As vLLM's PPMissingLayer, in the place of what is on another stage."""


def stages_of(model, at):
    """A model cut before block `at` as vLLM cuts it: the first stage embeds, the second has the norm."""

    class Stage(nn.Module):
        def __init__(self, first):
            super().__init__()
            kept = range(at) if first else range(at, BLOCKS)
            self.embed = model.embed if first else Missing()
            self.layers = nn.ModuleList(b if n in kept else Missing() for n, b in enumerate(model.layers))
            self.norm, self.first = Missing() if first else model.norm, first

        def forward(self, given):
            h, r = (self.embed(given), None) if self.first else given
            for block in self.layers:
                if not isinstance(block, Missing):
                    h, r = block(None, h, r) if model.split else (block(None, h), None)
            if self.first:
                return {"hidden_states": h, "residual": r}
            return (self.norm(h, r)[0] if model.split else self.norm(h)) + 0.0

    return Stage(True), Stage(False)


@pytest.mark.parametrize(("split", "per_pass"), [(True, BLOCKS + 1), (True, 2), (False, BLOCKS + 1)])
def test_each_stage_has_its_blocks_and_the_last_the_norm(monkeypatch, sought, split, per_pass):
    mine, between, told = threading.local(), queue.Queue(), []
    alone = SimpleNamespace(rank_in_group=0, world_size=1, cpu_group=None)

    class Pipeline:
        world_size = 2
        is_last_rank = property(lambda self: mine.ranks.rank == 1)

    context = pretend_vllm(monkeypatch, alone, Pipeline())
    worker = importlib.import_module("deadbench.runners.engines.vllm_worker")
    monkeypatch.setattr(worker, "_gather", lambda group, value: mine.ranks.gather(value))
    whole = Model(split)
    stages = stages_of(copy.deepcopy(whole), 2)
    whole.run(PASSES)

    class Running:
        """One stage as its worker runs it: what the one before gives comes over the link."""

        def __init__(self, stage):
            self.stage, self.seen = stage, []

        def __call__(self, ids):
            if self.stage.first:
                given = self.stage(ids)
                between.put((given["hidden_states"], given["residual"]))
            else:
                self.stage(between.get(timeout=30))

        run = Model.run

    def work(ranks):
        mine.ranks = ranks
        stage = stages[ranks.rank]
        told.append((ranks.rank, *read(reader_of(stage, sought), Running(stage), context, per_pass=per_pass)))

    context.tokens(TOKENS // PASSES)
    in_ranks(2, work, "taps")
    (_, first, nothing), (_, last, tables) = sorted(told, key=lambda each: each[0])
    assert first == last
    assert f"hooked norm (Norm) and {BLOCKS} blocks in 2 stages, stream {'h + r' if split else 'h'};" in last["detail"]
    assert nothing == {}
    assert_rows(tables, expected_rows(whole, sought))


def test_random_weights_are_those_of_the_torch_engine(monkeypatch):
    pretend_vllm(monkeypatch)
    loading = importlib.import_module("deadbench.runners.engines.vllm_random_weights")
    from deadbench.runners.engines.resident import TorchEngine

    expected = TorchEngine(torch.device("cpu")).load_random(build_config(LLAMA), 7, torch.float32).state_dict()
    drawn = dict(loading.random_weights(LLAMA, 7))
    assert {name for name in drawn if not torch.any(drawn[name])} == {"lm_head.weight"}, "nothing read comes after it"
    assert {f"model.{name}" for name in expected} | {"lm_head.weight"} == drawn.keys()
    assert all(torch.equal(drawn[f"model.{name}"], value) for name, value in expected.items())
    tied = dict(loading.random_weights(LLAMA | {"tie_word_embeddings": True}, 7))
    assert "lm_head.weight" not in tied


def test_the_loader_of_random_weights_is_registered_in_every_worker(context):
    importlib.import_module("deadbench.runners.engines.vllm_worker")
    from vllm.model_executor.model_loader import loaders

    from deadbench.runners.engines.vllm_random_weights import RANDOM_FORMAT

    loader = loaders[RANDOM_FORMAT]()
    loader.load_config = SimpleNamespace(model_loader_extra_config={"seed": 7, "config": LLAMA})
    loaded, dtypes = {}, []

    def load_weights(weights):
        dtypes.append(torch.get_default_dtype())
        loaded.update(weights)

    torch.set_default_dtype(torch.bfloat16)  # as vLLM does around a load
    try:
        loader.load_weights(SimpleNamespace(load_weights=load_weights), SimpleNamespace(model="of another node"))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes == [torch.float32]
    assert loaded["model.norm.weight"].dtype == torch.float32


def test_rows_of_a_hybrid_are_counted_by_any_layer_that_tells(context):
    worker = importlib.import_module("deadbench.runners.engines.vllm_worker")
    context.mamba_tokens(5, 2)
    assert worker._num_rows() == 7
    context.mamba_tokens(5, 3, attention=8)
    assert worker._num_rows() == 8
