"""The worked examples do what they say, on real and on random models."""

import os
import subprocess
import sys

import pytest
import torch
import transformers

from deadbench.runners.results.directions_file import export_directions
from deadbench.suite.architectures.build import build_config, published_class
from deadbench.suite.reads.dead_parameters import trace_published
from tests.conftest import ROOT, TWINS
from tests.suite.reads.test_dead_parameters import ARCHITECTURES, randomised, vit_or_token_inputs

sys.path.insert(0, str(ROOT / "examples"))

from centre_weights import centre_weights
from lora_targets import dead_inputs, project


def stream_mean(model, wiring, norm, inputs):
    """Largest |mean over D| of what enters `norm`, over its root mean square."""
    caught = []
    handle = model.get_submodule(norm).register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return float(caught[-1].mean(-1).abs().max() / caught[-1].square().mean().sqrt())


@pytest.mark.parametrize("name", ["gpt2", "bert", "bloom", "vit"])
def test_centring_changes_no_logit_of_a_random_model(name):
    model, wiring, _ = randomised(ARCHITECTURES[name][0])
    inputs = vit_or_token_inputs(model)
    size = sum(float(p.detach().square().sum()) for p in model.parameters())
    with torch.no_grad():
        before = model(**inputs).logits
        centred = centre_weights(model, wiring)
        after = model(**inputs).logits
    assert len(centred) >= 4
    assert sum(float(p.detach().square().sum()) for p in model.parameters()) < 0.999 * size
    assert (after - before).abs().max() < 1e-12 * before.abs().max()


@pytest.mark.subprocess
def test_the_centred_twin_is_a_checkpoint_with_the_same_logits(tmp_path):
    source, out = TWINS / "layernorm/step4096", tmp_path / "centred"
    command = [sys.executable, ROOT / "examples/centre_weights.py", source, out]
    said = subprocess.run(
        command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    config = transformers.AutoConfig.from_pretrained(source)
    _, wiring = trace_published(config)
    inputs = {"input_ids": torch.randint(0, 512, (2, 50), generator=torch.Generator().manual_seed(0))}
    model = published_class(config).from_pretrained(source, dtype=torch.float64)
    norm = "gpt_neox.final_layer_norm"
    with torch.no_grad():
        before = model(**inputs).logits
        assert stream_mean(model, wiring, norm, inputs) > 1e-3
        centre_weights(model, wiring)
        after = model(**inputs).logits
        stored = published_class(config).from_pretrained(out, dtype=torch.float64)(**inputs).logits
    assert (after - before).abs().max() < 1e-12 * before.abs().max()
    assert (stored - before).abs().max() < 1e-5 * before.abs().max()  # the file, in float32
    assert 0 < float(said.stdout.split("changed by ")[1].split()[0]) < 1e-5
    # Everything that writes was centred: the stream has no mean left, and the LayerNorm could be an RMSNorm.
    assert stream_mean(model, wiring, norm, inputs) < 1e-12


@pytest.mark.parametrize("case", ["layernorm twin", "MiniLM"])
def test_a_loras_dead_part_is_a_bias(case, minilm, tmp_path):
    source = minilm if case == "MiniLM" else TWINS / "layernorm/step4096"
    export_directions(str(source), tmp_path / "d.safetensors")
    dead = dead_inputs(str(source), str(tmp_path / "d.safetensors"))
    config = transformers.AutoConfig.from_pretrained(source)
    model = (published_class(config) or transformers.AutoModel).from_pretrained(source, dtype=torch.float64)
    _, wiring = trace_published(build_config(config.to_dict()))
    assert set(dead) == set(wiring.reads)
    ids = torch.randint(5, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    caught = {}
    for path in dead:

        def keep(module, args, path=path):
            caught[path] = args[0]

        model.get_submodule(path).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids=ids)
    for path, dead_Dm in dead.items():
        y = caught[path].flatten(0, -2)
        a = torch.randn(3, len(dead_Dm), dtype=torch.float64)
        gone = y @ (a - project(a, dead_Dm)).T
        assert (gone - gone.mean(0)).abs().max() < 1e-7 * (y @ a.T).abs().max()  # the same at every token
        assert (y @ project(a, dead_Dm).T).std() > 0.1 * (y @ a.T).std()
        assert (project(a, dead_Dm) @ dead_Dm).abs().max() < 1e-12


def test_an_rmsnorm_has_nothing_to_skip(tmp_path):
    source = TWINS / "rmsnorm/step4096"
    export_directions(str(source), tmp_path / "d.safetensors")
    assert dead_inputs(str(source), str(tmp_path / "d.safetensors")) == {}
