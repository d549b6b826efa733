"""Quantised weights: norms as they are stored, packed tensors known as such, and a pass where the package is there."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.worker.run import run_model
from deadbench.suite.checkpoints.quantised import described, is_part, method_of, why_not_run, without_parts
from deadbench.suite.reads.classify import classify
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, save_tiny
from tests.runners.worker.test_formats import rows

PLAIN = ("embed_in", "embed_out")
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("quantised") / "plain")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("quantised") / "llama", LLAMA)


def save_as(folder, plain, state, quantization=None):
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    config |= {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def packed(state, method):
    """A state with its maps packed as a method stores them, in shape and name."""
    names = {
        "gptq": {"qweight": (torch.int32, 8, 1), "qzeros": (torch.int32, 16, 8), "scales": (torch.float16, 16, 1)},
        "awq": {"qweight": (torch.int32, 1, 8), "qzeros": (torch.int32, 16, 8), "scales": (torch.float16, 16, 1)},
        "bitsandbytes": {"weight": (torch.uint8, 2, 1), "weight.absmax": (torch.float32, 1, 16)},
    }[method]
    found = {}
    for name, tensor in state.items():
        if tensor.ndim < 2 or any(each in name for each in (*PLAIN, "embed_tokens", "lm_head")):
            found[name] = tensor
            continue
        path = name.removesuffix(".weight")
        out, width = tensor.shape
        for part, (dtype, rows_by, columns_by) in names.items():
            found[f"{path}.{part}"] = torch.ones(max(width // rows_by, 1), max(out // columns_by, 1)).to(dtype)
        if method == "gptq":
            found |= {f"{path}.g_idx": torch.zeros(width, dtype=torch.int32), f"{path}.bias": torch.zeros(out).half()}
        if method == "bitsandbytes":
            found[f"{path}.weight"] = torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)
            found[f"{path}.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(60, dtype=torch.uint8)
    return found


NEEDED = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "gptqmodel and optimum"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16}, "gptqmodel"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
}


@pytest.mark.parametrize("method", NEEDED)
def test_norms_are_read_as_stored_and_a_pass_names_what_is_missing(method, llama, tmp_path, monkeypatch):
    settings, missing = NEEDED[method]
    monkeypatch.setattr("deadbench.suite.checkpoints.quantised.find_spec", lambda name: None)
    monkeypatch.setattr(TorchEngine, "load_trained", lambda *_, **__: pytest.fail("weights were loaded"))
    state = load_file(llama / "model.safetensors")
    folder = save_as(tmp_path / method, llama, packed(state, method), settings)
    found, direction = classify(str(folder))
    assert np.array_equal(direction, classify(str(llama))[1])
    assert any(each.startswith(f"weights quantised ({method}, 4 bits)") for each in found["evidence"])
    spec = Overrides(tokens=64, input="tokens:random")
    registry = ROOT / "models.yaml"
    (job,) = build_jobs(load_registry(registry), registry, [str(folder)], None, ["parameters", "trained"], spec)
    read, trained = [event.row for event in run_model(job, "run", 1) if isinstance(event, Finished)]
    assert (read["status"], read["error"], read["dtype"]) == ("ok", None, "float32")
    assert read["num_parameters"] == sum(tensor.numel() for tensor in state.values())
    assert trained["status"] == "failed"
    assert f"weights quantised by {method} need {missing}, not installed here; pip install" in trained["error"]


@pytest.mark.slow
def test_fp8_of_compressed_tensors_runs_and_is_its_dequantised_twin(plain, tmp_path):
    pytest.importorskip("compressed_tensors")
    stored, twin = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        stored[name] = twin[name] = tensor
        if tensor.ndim == 2 and not any(each in name for each in PLAIN):
            scale = tensor.abs().amax(1, keepdim=True) / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = scale
            twin[name] = stored[name].float() * scale
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    settings = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "ignore": ["embed_out"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    reads = ("parameters", "trained")
    ours = rows(save_as(tmp_path / "fp8", plain, stored, settings), reads)
    theirs = rows(save_as(tmp_path / "twin", plain, twin), reads)
    for read in reads:
        row, twins = ours[read][1][0], theirs[read][1][0]
        assert row.pop("flags") == [*twins.pop("flags"), "quantised"]
        assert ours[read][1] == theirs[read][1], read


def saved_by_bitsandbytes(base, folder, **settings):
    """As bitsandbytes itself packs it and transformers saves it."""
    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_weights_of_bitsandbytes_run_as_transformers_runs_them(settings, tmp_path):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    base = save_tiny(tmp_path / "base", LLAMA | {"hidden_size": 64, "intermediate_size": 64})
    folder = saved_by_bitsandbytes(base, tmp_path / "packed", **settings)
    tokens = np.random.default_rng(0).integers(0, 97, (8, 64))
    np.save(tmp_path / "tokens.npy", tokens)
    read = rows(folder, ("parameters", "trained"), tokens=None, input=f"tokens:{tmp_path / 'tokens.npy'}")
    row, stored = read["trained"][0], read["parameters"][0]
    model, inputs = AutoModel.from_pretrained(folder, dtype=torch.float32), []
    model.norm.register_forward_hook(lambda module, args, output: inputs.append(args[0].double()))
    with torch.no_grad():
        model(torch.from_numpy(tokens), use_cache=False)
    x_ND = inputs[0].flatten(0, 1)
    y_ND = (
        x_ND / (x_ND.square().mean(1, keepdim=True) + model.norm.variance_epsilon).sqrt() * model.norm.weight.double()
    )
    spectrum_D = torch.linalg.svdvals((y_ND - y_ND.mean(0)).detach()) ** 2 / len(y_ND)
    for name, value in {
        "lambda_max": spectrum_D[0],
        "lambda_mean": spectrum_D.mean(),
        "lambda_second": spectrum_D[-2],
    }.items():
        assert row[name] == pytest.approx(float(value), rel=1e-6), name
    assert (
        row["scale_harmonic"]
        == stored["scale_harmonic"]
        == rows(base, ("parameters",))["parameters"][0]["scale_harmonic"]
    )
    assert (row["flags"][-1], stored["flags"]) == ("quantised", ["quantised"])


@pytest.mark.parametrize("failure", [AssertionError("N must be divisible by block_n"), RuntimeError("shape '[64, 2]'")])
def test_a_pass_that_a_package_cannot_do_names_the_method(failure, plain, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr("deadbench.runners.worker.forward._loaded", fail)
    folder = save_as(tmp_path / "fp8", plain, load_file(plain / "model.safetensors"), {"quant_method": "fp8"})
    spec, registry = Overrides(tokens=64, input="tokens:random"), ROOT / "models.yaml"
    for source, told in ((folder, "; the weights are quantised by fp8, which may not run them here"), (plain, None)):
        (job,) = build_jobs(load_registry(registry), registry, [str(source)], None, ["trained"], spec)
        (row,) = [event.row for event in run_model(job, "run", 1) if isinstance(event, Finished)]
        assert row["error"].startswith(f"{type(failure).__name__}: {failure}")
        assert (told or "") in row["error"]
        assert ("quantised" in row["error"]) == (told is not None)


@pytest.mark.parametrize(
    ("config", "method", "told"),
    [
        ({}, None, None),
        ({"quantization_config": {}}, None, None),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes", "bitsandbytes, 8 bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq", "gptq, 4 bits"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8", "fp8"),
    ],
)
def test_how_weights_are_quantised_is_told_by_the_configuration(config, method, told):
    assert (method_of(config), described(config)) == (method, told)
    assert (why_not_run(config, "s") is None) == (method in (None, "fp8"))


def test_an_unknown_method_is_refused():
    assert "weights quantised by 'magic' are not run" in why_not_run(
        {"quantization_config": {"quant_method": "magic"}}, "s"
    )


def test_parts_of_weights_are_known_by_their_names():
    parts = ["qweight", "g_idx", "SCB", "weight_packed", "weight_scale_inv", "weight.absmax", "input_scale"]
    assert all(is_part(f"model.layers.0.q_proj.{part}") for part in parts)
    others = ["weight", "bias", "weight_g", "logit_scale", "scale", "layer_scale"]
    assert not any(is_part(f"model.layers.0.norm.{name}") for name in others)
    names = ["a.q.qweight", "a.q.bias", "a.k.bias", "a.k.weight.absmax", "a.v.bias"]
    assert without_parts(names, {"quantization_config": {"quant_method": "gptq"}}) == ["a.v.bias"]
