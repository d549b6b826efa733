"""What a read knows of an architecture before it runs."""

import pytest

from deadbench.suite.architectures import resolve
from deadbench.suite.architectures.build import build_config, build_model

NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FILM = {"model_type": "timesformer"} | NARROW
PICTURE = {"model_type": "vit", "image_size": 32, "patch_size": 16} | NARROW


@pytest.mark.parametrize(("raw", "devices"), [(FILM, {"meta"}), (PICTURE, {"cpu"})])
def test_what_large_inputs_would_fill_is_not_kept_and_the_same_is_found(monkeypatch, raw, devices):
    config, searched = build_config(raw), []
    model, search = build_model(config), resolve.search

    def noted(part):
        searched.append(next(part.parameters()).device.type)
        return search(part)

    expected = resolve.resolve(model, "image", "encoder")
    monkeypatch.setattr(resolve, "search", noted)
    found = resolve.resolve(model, "image", "encoder", config)
    assert set(searched) == devices
    assert (found.part, found.final) == (expected.part, expected.final)
    assert {name: value.shape for name, value in found.form.items()} == {n: v.shape for n, v in expected.form.items()}
    assert found.final.path == "layernorm"
