"""Checkpoints of other libraries give the rows of the same weights as transformers saves them, to the bit."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.worker.run import run_model
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.tensors import read_raw
from deadbench.suite.reads.classify import classify
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, save_tiny
from tests.runners.worker.test_formats import rows
from tests.suite.checkpoints.dialects import writers
from tests.suite.checkpoints.formats.ggufs import q8_0
from tests.suite.checkpoints.test_tensor_kinds import timm_folder

READS = ("parameters", "trained")
CASES = [
    (writers.litgpt, writers.LLAMA), (writers.litgpt, writers.NEOX), (writers.litgpt, writers.QWEN2),
    (writers.litgpt_of_before, writers.LLAMA),
    (writers.lens, writers.GPT2), (writers.lens, writers.NEOX), (writers.lens, writers.LLAMA),
    (writers.bridge, writers.GPT2), (writers.bridge, writers.NEOX), (writers.bridge, writers.QWEN2),
    (writers.neox_layers, writers.NEOX),
    (writers.megatron, writers.LLAMA), (writers.megatron_of_before, writers.GPT2),
    (writers.megatron_in_stages, writers.GPT2),
    (writers.megatron_core, writers.GPT2), (writers.megatron_core_of_one_stage, writers.LLAMA),
    (writers.megatron_core_with_experts, writers.MIXTRAL),
    (writers.fairseq, writers.OPT), (writers.metaseq, writers.OPT),
    (writers.llama_cpp, writers.LLAMA), (writers.llama_cpp, writers.GPT2), (writers.llama_cpp, writers.NEOX),
    (writers.llama_cpp, writers.QWEN2), pytest.param(writers.open_clip, writers.CLIP, marks=pytest.mark.slow),
]  # fmt: skip

BESIDE, HEADS = "stored beside the model, and not loaded", {"gpt2": "lm_head", "gpt_neox": "embed_out"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By model type: transformers' state dict, and the rows of what it saves."""
    found = {}

    def of(config):
        key = (config["model_type"], config.get("vocab_size"))
        if key not in found:
            folder = save_tiny(tmp_path_factory.mktemp("saved"), config, seed=3)
            found[key] = load_file(folder / "model.safetensors"), rows(folder, READS)
        return found[key]

    return of


@pytest.mark.parametrize(
    ("write", "config"), CASES, ids=lambda each: getattr(each, "__name__", None) or each["model_type"]
)
def test_rows_are_those_of_transformers_own_files(write, config, saved, tmp_path):
    if write.__name__.startswith("megatron"):
        config = config | {"vocab_size": 98}
    state, expected = saved(config)
    found = rows(write(tmp_path, state, config), READS)
    for read in READS:
        ours, theirs = without(found[read], expected[read]), without(expected[read])
        if write is writers.bridge and read == "trained" and config is not writers.QWEN2:  # logits have a shift there
            told = ours[0].pop("engine_detail").partition("; ")
            assert told == (theirs[0].pop("engine_detail"), "; ", f"{BESIDE}: {HEADS[config['model_type']]}.bias")
        assert ours == theirs, read
        assert found[read][0]["source_format"] != "safetensors"


def without(read, expected=None):
    """A read's rows without the name that its library has for the final norm.

    Where rows of an embedding cannot be had alone, as of one that is packed or put together from ranks, nothing is said
    of the stream's mean: that is `expected`'s.
    """
    rows = [{key: value for key, value in row.items() if key != "final_norm_tensor"} for row in read[1]]
    if expected is not None and rows[0]["stream_centred"] is None:
        rows[0]["stream_centred"] = expected[1][0]["stream_centred"]
    return rows


def refusal(source):
    """Why the trained read of a source failed."""
    registry = ROOT / "models.yaml"
    spec = Overrides(tokens=64, input="tokens:random")
    (job,) = build_jobs(load_registry(registry), registry, [str(source)], None, ["trained"], spec)
    (finished,) = (event for event in run_model(job, "run", 1) if isinstance(event, Finished))
    assert finished.row["status"] == "failed"
    return finished.row["error"]


def test_experts_that_mixtral_does_not_have_are_classified_and_not_run(tmp_path):
    config = writers.MIXTRAL | {"vocab_size": 98}
    state = load_file(save_tiny(tmp_path / "saved", config, seed=3) / "model.safetensors")
    (tmp_path / "experts").mkdir()
    folder = writers.megatron_core_with_experts(tmp_path / "experts", state, config)
    common = folder / "iter_0000300" / "common.pt"
    saved = torch.load(common, weights_only=False)
    saved["args"].moe_shared_expert_intermediate_size = 32
    torch.save(saved, common)
    found, _ = classify(str(folder))
    assert (found["family"], found["final_norm"]) == ("rmsnorm", "decoder.final_layernorm")
    assert found["scale_harmonic"] == classify(str(tmp_path / "saved"))[0]["scale_harmonic"]
    assert "are not translated to megatron, only to gpt2, llama, mixtral" in refusal(folder)


@pytest.mark.parametrize("matrices", ["Q8_0", "BF16"])
def test_what_is_packed_is_what_it_stands_for(matrices, tmp_path):
    """The weights that a file unpacks to, saved by transformers, give the same row."""
    config = writers.LLAMA | {"hidden_size": 32, "head_dim": 8, "vocab_size": 64}
    state = load_file(save_tiny(tmp_path / "saved", config) / "model.safetensors")
    for name in [name for name, tensor in state.items() if tensor.ndim == 2]:
        unpacked = torch.from_numpy(q8_0(state[name].numpy())[1].copy())
        state[name] = unpacked if matrices == "Q8_0" else state[name].bfloat16().float()
    save_file(state, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    (tmp_path / "packed").mkdir()
    made = {"dtype": "float32"}
    found = rows(writers.llama_cpp(tmp_path / "packed", state, config, matrices), READS, **made)
    expected = rows(tmp_path / "saved", READS, **made)
    for read in READS:
        assert without(found[read], expected[read]) == without(expected[read])


def test_other_names_in_safetensors(saved, tmp_path):
    state, expected = saved(writers.LLAMA)
    path = writers.lens(tmp_path, state, writers.LLAMA)
    save_file({name: tensor.contiguous() for name, tensor in torch.load(path).items()}, tmp_path / "model.safetensors")
    path.unlink()
    found = rows(tmp_path, READS)
    assert found["trained"][0]["source_format"] == "safetensors"
    assert without(found["trained"], expected["trained"]) == without(expected["trained"])


@pytest.mark.parametrize("config", [writers.GPT2, writers.LLAMA], ids=["gpt2", "llama"])
def test_folded_norms_have_scales_of_one(config, saved, tmp_path):
    """What TransformerLens loads without options: norms folded into maps, which leaves none of their tensors."""
    state, _ = saved(config)
    path = writers.lens(tmp_path, state, config)
    made = {name: tensor for name, tensor in torch.load(path).items() if ".ln" not in name and "ln_final" not in name}
    torch.save(made, path)
    result, direction_D = classify(str(path))
    family = "layernorm" if config is writers.GPT2 else "rmsnorm"
    assert (result["error"], result["family"], result["scale"]) == (None, family, "implicit-one")
    assert (result["final_norm_tensor"], result["scale_harmonic"]) == (None, 1.0)
    assert any("LayerNormPre" in line for line in result["evidence"])
    assert np.allclose(direction_D, 0.25)
    found = rows(path, (*READS, "functional"))
    assert found["trained"][0]["scale_harmonic"] == found["parameters"][0]["scale_harmonic"] == 1.0


@pytest.mark.parametrize("config", [writers.GPT2, writers.LLAMA, writers.NEOX], ids=["gpt2", "llama", "neox"])
def test_centred_weights_are_said_to_be(config, saved, tmp_path):
    """TransformerLens's center_writing_weights, with which an RMSNorm's own kernel is `gamma^-1` too."""
    path = writers.lens(tmp_path, saved(config)[0], config)
    assert not any("centred" in line for line in classify(str(path))[0]["evidence"])
    made = torch.load(path)
    for name, tensor in made.items():
        if name.endswith(("W_E", "W_pos", "W_O", "W_out", "b_O", "b_out")):
            made[name] = tensor - tensor.mean(-1, keepdim=True)
    torch.save(made, path)
    said = "gamma^-1 may be a kernel" if config is writers.LLAMA else "which no LayerNorm sees"
    assert any("centred" in line and said in line for line in classify(str(path))[0]["evidence"])
    torch.save(made | {"blocks.0.attn.W_O": made["blocks.0.attn.W_O"] + 1}, path)
    assert not any("centred" in line for line in classify(str(path))[0]["evidence"])


def test_what_cannot_be_translated_is_a_row_that_says_so(saved, tmp_path):
    state, _ = saved(writers.LLAMA)
    path = writers.lens(tmp_path, state, writers.LLAMA)
    made = torch.load(path)
    torch.save(made | {"blocks.1.attn.b_Q": torch.ones(4, 4)}, path)
    assert "blocks.1.attn.b_Q is not zero" in refusal(path)
    torch.save({name: tensor for name, tensor in made.items() if name != "blocks.1.mlp.W_gate"}, path)
    assert "layers.1.mlp.gate_proj.weight" in refusal(path)
    torch.save(made | {"blocks.1.attn.W_Q": torch.ones(4, 15, 4)}, path)
    assert "q_proj" in refusal(path)
    (tmp_path / "config.json").write_text(json.dumps(writers.LLAMA | {"model_type": "olmo"}))
    torch.save(made, path)
    assert "TransformerLens's tensors are not translated to olmo, only to gpt2," in refusal(path)


def test_ranks_that_are_not_all_there(saved, tmp_path):
    config = writers.LLAMA | {"vocab_size": 98}
    state, expected = saved(config)
    writers.megatron(tmp_path, state, config)
    alone = tmp_path / "iter_0000300" / "mp_rank_00" / "model_optim_rng.pt"
    assert "one file of 2 tensor-parallel" in refusal(alone)
    assert classify(str(alone))[0]["scale_harmonic"] == expected["parameters"][0]["scale_harmonic"]
    shutil.rmtree(tmp_path / "iter_0000300" / "mp_rank_01")
    assert "files of 1 tensor-parallel" in refusal(tmp_path)
    assert classify(str(tmp_path))[0]["scale_harmonic"] == expected["parameters"][0]["scale_harmonic"]


def test_a_text_tower_that_has_a_path_of_its_own(saved, tmp_path):
    """open_clip's CustomTextCLIP."""
    state, _ = saved(writers.CLIP)
    path = writers.open_clip(tmp_path, state, writers.CLIP) / "open_clip_pytorch_model.bin"
    made = torch.load(path)
    torch.save(
        {name if "visual" in name or name == "logit_scale" else f"text.{name}": made[name] for name in made}, path
    )
    entries = Checkpoint(str(tmp_path)).headers()
    assert entries.keys() == state.keys()
    name = "text_model.encoder.layers.1.self_attn.k_proj.weight"
    assert np.array_equal(read_raw(Checkpoint(str(tmp_path)), entries[name]).view("f4"), state[name].numpy())


def test_a_text_tower_without_a_causal_mask_is_classified_and_not_run(saved, tmp_path):
    state, _ = saved(writers.CLIP)
    folder = writers.open_clip(tmp_path, state, writers.CLIP)
    before, _ = classify(str(folder))
    told = json.loads((folder / "open_clip_config.json").read_text())
    told["model_cfg"]["text_cfg"] |= {"no_causal_mask": True, "act_kwargs": {"approximate": "tanh"}}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    found, _ = classify(str(folder))
    for key in ("family", "final_norm", "final_norm_tensor", "scale_harmonic", "eps"):
        assert found[key] == before[key] is not None, key
    assert "text_cfg has no_causal_mask, which transformers' text tower does not" in refusal(folder)
    config = Checkpoint(str(folder)).config()
    assert [config[f"{tower}_config"]["hidden_act"] for tower in ("text", "vision")] == ["gelu_pytorch_tanh", "gelu"]


@pytest.mark.parametrize("tower", ["vision_cfg", "text_cfg"])
def test_a_tower_that_is_not_open_clips_own(tower, saved, tmp_path):
    state, _ = saved(writers.CLIP)
    folder = writers.open_clip(tmp_path, state, writers.CLIP)
    told = json.loads((folder / "open_clip_config.json").read_text())
    told["model_cfg"][tower] |= {"timm_model_name": "vit_base", "hf_model_name": "xlm-roberta-base"}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    assert "is not open_clip's own" in classify(str(folder))[0]["error"]


def test_timm_without_timm_is_a_row_that_says_how_to_get_it(tmp_path):
    timm_folder(tmp_path, "norm")
    if importlib.util.find_spec("timm") is None:
        assert "pip install timm" in refusal(tmp_path)


@pytest.mark.subprocess
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_timm_by_its_own_name(pool, tmp_path):
    """What timm itself saves for the Hub: the norm of its tables, by the width of one of its own test models."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=7, global_pool=pool)
    norm = model.fc_norm if pool == "avg" else model.norm
    torch.nn.init.uniform_(norm.weight, 0.4, 1.8)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"architecture": "vit_tiny_patch16_224"}))
    by_table = classify(str(tmp_path))[0]  # which has that architecture
    (tmp_path / "config.json").write_text(json.dumps(told))
    found = rows(tmp_path, READS, input="image", tokens=512)
    expected = 64 / float((1 / norm.weight.detach().double() ** 2).sum())
    assert by_table["scale_harmonic"] == pytest.approx(expected, rel=1e-12)
    assert (by_table["family"], by_table["eps"]) == ("layernorm", 1e-6)
    trained, parameters = found["trained"][0], found["parameters"][0]
    assert trained["scale_harmonic"] == parameters["scale_harmonic"] == pytest.approx(expected, rel=1e-12)
    for key in ("family", "final_norm", "final_norm_tensor", "placement", "eps", "hidden_size", "num_blocks"):
        assert trained[key] == parameters[key], key
    assert (trained["depth"] is None) == (pool == "avg")  # whose norm has one row a picture, as the row says
    assert ("one row each" in (trained["error"] or "")) == (pool == "avg")


def test_a_model_that_deepspeed_holds_in_parts(saved, tmp_path):
    state, _ = saved(writers.NEOX)
    (tmp_path / "config.json").write_text(json.dumps(writers.NEOX))
    for rank in range(2):
        torch.save({"module": state}, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
    assert "cut over tensor-parallel ranks" in refusal(tmp_path)
