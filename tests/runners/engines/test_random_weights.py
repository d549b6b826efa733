"""A model whose weights several threads draw is the one that transformers draws, to the last bit and attribute."""

from functools import partial

import pytest
import torch
from torch import nn

from deadbench.runners.engines import deferred_init, random_weights
from deadbench.runners.engines.random_weights import drawn_side_by_side
from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.errors import ArchitectureError
from tests.runners.engines.test_deferred_init import MORE
from tests.runners.engines.test_streaming import ARCHITECTURES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(random_weights, "_SHARED_ELEMENTS", 64)
    monkeypatch.setattr(deferred_init, "_FEWEST_JUMPED", 64)
    monkeypatch.setattr(deferred_init, "_CHUNK_ELEMENTS", 64)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *MORE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_transformers_own(model_type, dtype, monkeypatch):
    import transformers

    drawn_alone, value = list[torch.Tensor](), deferred_init.DeferredInit.value
    monkeypatch.setattr(
        deferred_init.DeferredInit, "value", lambda self, each: drawn_alone.append(each) or value(self, each)
    )

    config = build_config({"model_type": model_type} | (ARCHITECTURES | MORE)[model_type])
    transformers.set_seed(5)
    whole = build_model(config).to(dtype)
    after = torch.get_rng_state()
    drawn = drawn_side_by_side(lambda: build_model(config), 5, CPU, dtype)
    assert torch.equal(torch.get_rng_state(), after), "whatever is drawn next must be the same too"
    assert drawn_alone, "the model has large weights, and threads drew them"
    assert drawn.training == whole.training
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        expected = dict(tensors(whole, remove_duplicate=False))
        found = dict(tensors(drawn, remove_duplicate=False))
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
            assert (found[name].dtype, found[name].requires_grad) == (tensor.dtype, tensor.requires_grad), name
            assert vars(found[name]).keys() == vars(tensor).keys(), name
            tied = [other for other in expected if expected[other] is tensor]
            assert all(found[other] is found[name] for other in tied), f"{name} is tied to {tied}"


@pytest.mark.parametrize("cores", [1, 2])
def test_bits_do_not_depend_on_the_thread(cores):
    """A QR's depend on the number of cores, and a new thread's first one took that of the environment."""
    import transformers

    config = build_config({"model_type": "rwkv"} | MORE["rwkv"])
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        transformers.set_seed(5)
        expected = build_model(config).state_dict()
        for _ in range(20):
            found = drawn_side_by_side(lambda: build_model(config), 5, CPU, torch.float32).state_dict()
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    finally:
        torch.set_num_threads(before)


class Looks(nn.Module):
    """Initialised by what it has drawn."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32, 32))
        nn.init.normal_(self.weight)
        try:
            with torch.no_grad():
                self.weight.div_(float(self.weight.max()))
        except (RuntimeError, NotImplementedError) as error:  # as `build_model` has it
            raise ArchitectureError(str(error)) from error


def test_a_model_that_looks_at_its_large_weights_is_drawn_as_it_is_built():
    torch.manual_seed(1)
    expected = Looks().weight
    assert torch.equal(drawn_side_by_side(Looks, 1, CPU, torch.float32).weight, expected)


class Keeps(nn.Module):
    """A weight, and large tensors in places that no module lists."""

    def __init__(self, kept):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32, 32))
        nn.init.normal_(self.weight)
        self.kept = kept(self.weight)


KEPT = {
    "attribute": lambda weight: torch.empty(32, 32).fill_(-1.0).triu_(1),
    "list": lambda weight: [torch.empty(100).uniform_()],
    "closure": lambda weight: partial(torch.add, torch.empty(10, 10).normal_()),
    "alias": lambda weight: weight.data,
    "view": lambda weight: weight.detach()[3:, :5].T,
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_what_a_module_keeps_elsewhere_has_its_values_too(kept):
    def tensors(model):
        kept = model.kept.args if isinstance(model.kept, partial) else model.kept
        return [model.weight, *(kept if isinstance(kept, (list, tuple)) else [kept])]

    torch.manual_seed(3)
    whole = Keeps(kept)
    after = torch.get_rng_state()
    drawn = drawn_side_by_side(partial(Keeps, kept), 3, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), after)
    for found, expected in zip(tensors(drawn), tensors(whole), strict=True):
        assert not found.is_meta
        assert torch.equal(found, expected)


def test_what_cannot_be_built_is_told_as_ever():
    def build():
        raise ArchitectureError("no such thing")

    with pytest.raises(ArchitectureError, match="no such thing"):
        drawn_side_by_side(build, 1, CPU, torch.float32)
