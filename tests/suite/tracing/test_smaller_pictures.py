"""Of a long series the beginning is tried, with its masks; of a short one all of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deadbench.suite.architectures.build import build_config
from deadbench.suite.architectures.locate import locate_final_norm as locate
from deadbench.suite.tracing import smaller_pictures as module
from deadbench.suite.tracing.smaller_pictures import smaller_pictures


class Series(nn.Module):
    """It takes so many steps or more, of which each must have its mask."""

    main_input_name = "past_values"

    def __init__(self, fewest=1):
        super().__init__()
        self.config, self.fewest, self.stem = SimpleNamespace(), fewest, nn.Linear(3, 8)

    def forward(self, past_values, past_values_padding=None):
        if past_values.shape[1] < self.fewest or past_values.shape[:2] != past_values_padding.shape:
            raise ValueError("not these")
        return (self.stem(past_values),)


@pytest.mark.parametrize(
    ("steps", "fewest", "tried"), [(6400, 1, 100), (6400, 200, 800), (6400, 6400, None), (400, 1, None)]
)
def test_the_shortest_beginning_that_the_model_takes_is_tried(steps, fewest, tried):
    given = {"past_values": torch.zeros(1, steps, 3), "past_values_padding": torch.zeros(1, steps, dtype=torch.long)}
    smaller = smaller_pictures(Series(fewest).to("meta"), given)
    assert (smaller and smaller["past_values"].shape) == (tried and (1, tried, 3))


@pytest.mark.parametrize(
    ("shape", "smaller"), [((1, 6400), (1, 100)), ((1, 2, 6400), (1, 2, 100)), ((1, 6400, 2), (1, 100, 2))]
)
def test_its_axis_is_the_long_one(shape, smaller):
    assert module._beginning(64, {"x": torch.zeros(shape)})["x"].shape == smaller


def test_words_of_any_number_stay():
    given = {"input_ids": torch.zeros(1, 6400, dtype=torch.long)}
    assert module._beginning(64, given) == given


def test_a_search_of_a_long_series_computes_its_beginning(monkeypatch):
    series = {"context_length": 1024, "patch_length": 32, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8,
              "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}  # fmt: skip
    config = build_config({"model_type": "timesfm2_5", **series})
    whole, seen, call = locate(config), [], nn.Module.__call__

    def counted(self, *arguments, **named):
        if "past_values" in named and not named["past_values"].is_meta:
            seen.append(named["past_values"].shape[-1])
        return call(self, *arguments, **named)

    monkeypatch.setattr(module, "_LARGE_PASS", 1000)
    monkeypatch.setattr(nn.Module, "__call__", counted)
    assert locate(config) == whole
    assert set(seen) == {1024 // 8}  # a patch is longer than the 64th part
    assert len(seen) < 20
