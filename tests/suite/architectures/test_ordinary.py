"""Which configurations are built without a trial: those whose numbers are as their class has them, or nearly."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadbench.suite.architectures.ordinary import excess
from deadbench.suite.registry.loading import load_registry, own_registry

TYPES = ["gpt2", "albert", "swin", "longformer", "qwen2_moe", "llava", "wav2vec2"]
_ARITHMETIC = ("theta", "eps", "epsilon", "range", "std", "base", "seed")


def _default(model_type):
    import transformers

    return {**transformers.CONFIG_MAPPING[model_type]().to_dict(), "model_type": model_type}


def _numbers(config, above=()):
    for key, value in config.items():
        if isinstance(value, dict) and not key.startswith(("id2", "label2")):
            yield from _numbers(value, (*above, key))
        elif isinstance(value, int) and not isinstance(value, bool) and not key.endswith(_ARITHMETIC):
            yield (*above, key)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_default_configuration_is_ordinary(model_type):
    assert excess(_default(model_type)) is None


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data(), value=st.integers(10**8, 10**30))
def test_whichever_number_is_huge_it_is_named(data, value):
    config = copy.deepcopy(_default(data.draw(st.sampled_from(TYPES))))
    path = data.draw(st.sampled_from(sorted(_numbers(config))))
    where = config
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    assert excess(config) == ".".join(path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gpt2", "n_layer": 96}, None),
        ({"model_type": "gpt2", "num_hidden_layers": 1000}, "num_hidden_layers"),
        ({"model_type": "swin", "depths": [2] * 100_000}, "depths"),
        ({"model_type": "gpt2", "unheard_of": 10**6}, "unheard_of"),
        ({"model_type": "llama", "rope_theta": 10**8, "vocab_size": 256_000}, None),
        ({"model_type": "llama", "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192}}, None),
        ({"model_type": "no such", "hidden_size": 64}, None),
    ],
)
def test_by_hand(config, named):
    assert excess(config) == named


def test_every_bundled_configuration_is_ordinary():
    found = [model.id for model in load_registry(own_registry()).models if model.config and excess(model.config)]
    assert found == []
