"""What flows out of a model, chosen by hand-made outputs; and through which module, in models of a line or two."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from deadbench.suite.tracing.flow import cuts, other_stream, recorded_calls, same_storage, stream_of, zeros_drawn

STATE, OTHER, MAPS = torch.ones(1, 4, 6), torch.zeros(1, 7, 6), torch.ones(1, 8, 2, 2)


@pytest.mark.parametrize(
    ("output", "heard"),
    [
        ((None, STATE, OTHER), STATE),
        (BaseModelOutput(last_hidden_state=STATE, hidden_states=(OTHER,)), STATE),
        # What an encoder gave is the model's own only where nothing came of it.
        (ModelOutput(spectrogram=STATE, encoder_last_hidden_state=OTHER), STATE),
        (ModelOutput(logits=STATE, encoder_last_hidden_state=OTHER), STATE),
        (ModelOutput(encoder_last_hidden_state=STATE, loss=torch.ones(())), STATE),
        # Words before pictures.
        (ModelOutput(vision_model_output=BaseModelOutput(OTHER), text_model_output=BaseModelOutput(STATE)), STATE),
        (ModelOutput(vision_outputs=BaseModelOutput(OTHER), language_model_outputs=ModelOutput(logits=STATE)), STATE),
        (ModelOutput(image_embeds=OTHER, text_embeds=STATE), STATE),
        # The last stage of a backbone; where nothing tells them apart, none.
        (ModelOutput(feature_maps=(OTHER, MAPS)), MAPS),
        (ModelOutput(masks=MAPS, scores=STATE), None),
    ],
)
def test_what_a_model_is_read_at(output, heard):
    assert stream_of(output) is heard


class Two(nn.Module):
    """A norm whose output is projected, and beside it a map that nothing reads."""

    def __init__(self, beside=0.0):
        super().__init__()
        self.norm, self.head, self.aside, self.beside = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6), beside

    def forward(self, hidden):
        return (self.head(self.norm(hidden)) + self.beside * self.aside(hidden),)


@pytest.mark.parametrize(("beside", "alone"), [(0.0, True), (1.0, False)])
def test_a_module_cuts_what_flows_through_it_alone(beside, alone):
    torch.manual_seed(0)
    model, given = Two(beside), {"hidden": torch.randn(1, 4, 6)}
    (stream,) = model(**given)
    assert other_stream(model, given, stream) is not None
    assert cuts(model, model.norm, given, stream) is alone
    assert not cuts(model, model.aside, given, stream)


def test_calls_are_recorded_with_what_went_in_and_came_out():
    model = Two()
    hidden = torch.randn(1, 4, 6)
    with recorded_calls(model) as calls:
        model(hidden)
    assert [call.path for call in calls] == ["norm", "head", "aside"]
    assert same_storage(calls[0].given, hidden.view(4, 6))
    assert same_storage(calls[1].given, calls[0].output)
    assert not same_storage(calls[1].output, calls[0].output)
    assert not model.norm._forward_hooks


class Stack(nn.Module):
    """Maps one after the other; of those whose number is in `views` the next is given, and passes on, a view."""

    def __init__(self, count, views):
        super().__init__()
        kinds = (nn.Flatten(0, 1) if i in views else nn.Linear(6, 6, bias=False) for i in range(count))
        self.layers = nn.Sequential(*kinds)

    def forward(self, hidden):
        return (self.layers(hidden),)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 30), st.sets(st.integers(0, 29), max_size=1))
def test_of_a_call_the_numbers_go_and_what_shares_them_stays_known(count, views):
    """Where memory is taken again, as an allocator does for tensors of one size, two are still not the same."""
    model = Stack(count, views)
    with torch.no_grad(), recorded_calls(model) as calls:
        (stream,) = model(torch.randn(1, 4, 6))
    layers = calls[:count]
    assert [call.output.storage.expired() for call in layers] == [not same_storage(c.output, stream) for c in layers]
    groups = [sum(i not in views for i in range(last + 1)) for last in range(count)]  # one for each map that has run
    for one, first in zip(layers, groups, strict=True):
        assert [same_storage(one.output, other.output) for other in layers] == [first == each for each in groups]
    assert [tuple(call.output.shape)[-2:] for call in layers] == [(4, 6)] * count


def test_matrices_of_zeros_are_drawn_and_put_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_buffer("codebook", torch.full((3, 4), 1e-9))
    nn.init.zeros_(model[1].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with zeros_drawn(model) as drawn:
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert drawn
        assert changed == ["codebook", "1.weight"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with zeros_drawn(model[0]) as drawn:
        assert not drawn
