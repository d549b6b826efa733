"""Weights of blocks that come and go: in order, ahead of their block or not, and the same whatever draws them."""

import pytest
import torch
from torch import nn

from deadbench.runners.engines import block_weights, deferred_init
from deadbench.runners.engines.block_weights import Block, Coming
from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.engines.streaming import StreamingEngine
from deadbench.suite.architectures.build import build_config
from deadbench.suite.errors import CheckpointError
from tests.runners.engines.test_streaming import ARCHITECTURES, CPU, batches_for, everything


@pytest.fixture
def three():
    """A model of three blocks, what each would be given, and the names that were asked for."""
    model, asked = nn.Sequential(*(nn.Linear(2, 2, bias=False, device="meta") for _ in range(3))), []

    def values(name):
        asked.append(name)
        return torch.full((2, 2), float(name))

    blocks = {}
    for number, module in enumerate(model):
        blocks[module] = Block(module, values, lambda tensor: tensor)
        blocks[module].absent.append((module, "weight", str(number)))
    return model, blocks, asked


def test_the_next_block_comes_while_one_runs(three):
    model, blocks, asked = three
    with Coming(blocks, model, ahead=True) as coming:
        for number, module in enumerate(model):
            coming.load(module)
            assert module.weight.tolist() == [[number, number]] * 2
            if coming._next is not None:
                [each.result() for each in coming._next[1]]
            assert asked == [str(each) for each in range(min(number + 2, 3))]
            blocks[module].drop()
            assert module.weight.is_meta


def test_a_model_that_goes_its_own_way_waits(three):
    model, blocks, asked = three
    with Coming(blocks, model, ahead=True) as coming:
        for number in (0, 2, 1, 2):
            coming.load(model[number])
            assert model[number].weight[0, 0] == number
            blocks[model[number]].drop()
    assert [asked[0], *asked[-3:]] == ["0", "2", "1", "2"], "after one guess that was wrong, none"


def test_without_ahead_nothing_is_asked_for_before_its_block(three):
    model, blocks, asked = three
    with Coming(blocks, model, ahead=False) as coming:
        coming.load(model[0])
    assert asked == ["0"]


def test_another_shape_is_said(three):
    model, blocks, _ = three
    blocks[model[0]]._ready = lambda tensor: tensor[:1]
    with Coming(blocks, model, ahead=False) as coming, pytest.raises(CheckpointError, match=r"\[1, 2\] in the weights"):
        coming.load(model[0])


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("model_type", ["gpt2", "vit"])
def test_however_many_draw_the_weights_are_the_same(model_type, ahead, monkeypatch):
    """vit: truncated normals, drawn by a function that looks at what it has drawn."""
    monkeypatch.setattr(deferred_init, "_DEFERRED_ELEMENTS", 64)
    monkeypatch.setattr(deferred_init, "_CHUNK_ELEMENTS", 256)
    settings = {"model_type": model_type} | ARCHITECTURES[model_type]
    whole = TorchEngine(CPU).load_random(build_config(settings), 3, torch.float32)
    monkeypatch.setattr(block_weights.torch, "get_num_threads", lambda: 8)
    engine = StreamingEngine(CPU)
    model = engine.load_random(build_config(settings), 3, torch.float32)
    engine._reads_ahead = ahead
    torch.manual_seed(5)
    before = torch.get_rng_state()
    seen, put = {}, block_weights.put

    def noted(owner, attribute, tensor):
        if not tensor.is_meta:
            seen[id(owner), attribute] = tensor.clone()
        put(owner, attribute, tensor)

    monkeypatch.setattr(block_weights, "put", noted)
    everything(engine, model, batches_for(model_type))
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn by the process's own generator"
    names = {id(module): name for name, module in model.named_modules()}
    assert seen
    for (owner, attribute), tensor in seen.items():
        assert torch.equal(tensor, getattr(whole.get_submodule(names[owner]), attribute))
