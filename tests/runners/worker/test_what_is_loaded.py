"""A checkpoint that is not what its configuration says is refused by every read; what cannot matter is told."""

import json
import re
import shutil
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deadbench.runners.engines.resident import _only_in_training
from deadbench.runners.results.directions_file import export_directions
from deadbench.runners.worker import vllm
from deadbench.runners.worker.request import StoredWeights
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.tensors import TensorEntry
from deadbench.suite.reads.norms_table import list_norms
from deadbench.suite.reads.parameters import read_parameters
from tests.conftest import TWINS
from tests.runners.worker.test_run import reads

TOKENS = {"input": "tokens:random", "tokens": 300, "dtype": "float32"}
KINDS = "parameters,trained,functional"
PLAIN = TWINS / "rmsnorm/step4096"
PROJECTION = "model.layers.0.self_attn.q_proj"


def changed(folder, change):
    """The RMSNorm twin with `change` of its tensors."""
    shutil.copytree(PLAIN, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_scales(tensors):
    weight = tensors[f"{PROJECTION}.weight"]
    scale = weight.abs().max() / 448
    raw = (weight / scale).to(torch.float8_e4m3fn)
    return tensors | {f"{PROJECTION}.weight": raw, f"{PROJECTION}.weight_scale": scale.float()}


def with_adapter(tensors):
    out, inside = tensors[f"{PROJECTION}.weight"].shape
    halves = {"lora_A": torch.ones(2, inside), "lora_B": torch.ones(out, 2)}
    return tensors | {f"{PROJECTION}.{half}.default.weight": t for half, t in halves.items()}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_scales, f"{PROJECTION}.weight_scale has no place"),
        (lambda t: t | {f"{PROJECTION}.bias": torch.ones(64)}, f"{PROJECTION}.bias has no place"),
        (with_adapter, f"{PROJECTION}.lora_A.default.weight is of an adapter"),
    ],
    ids=["fp8", "bias", "adapter"],
)
def test_tensors_of_another_model_fail_every_read_of_weights(change, named, tmp_path):
    rows, _ = reads(changed(tmp_path / "m", change), KINDS, **TOKENS)
    for kind in KINDS.split(","):
        row = rows[None, kind]
        assert row["status"] == "failed"
        assert f"model.safetensors: {named}" in row["error"]
        assert "\n" not in row["error"]


def test_a_mask_of_an_earlier_version_is_told_and_changes_nothing(tmp_path):
    name = "model.layers.0.self_attn.masked_bias"
    rows, spectra = reads(changed(tmp_path / "m", lambda t: t | {name: torch.tensor(-1e4)}), "trained", **TOKENS)
    plain, expected = reads(PLAIN, "trained", **TOKENS)
    row, before = rows[None, "trained"], plain[None, "trained"]
    assert row["status"] == "ok", row["error"]
    assert row["engine_detail"] == f"{before['engine_detail']}; not loaded, and of no effect: {name}"
    assert (row["lambda_v"], row["depth"]) == (before["lambda_v"], before["depth"])
    assert (spectra[None, "trained"] == expected[None, "trained"]).all()


def saved(folder, model, without=(), **renamed):
    """What transformers saves of `model`, less the tensors whose names end so, or under other names."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {renamed.get(n, n): t for n, t in tensors.items() if not n.endswith(without or ("nothing",))}
    assert without == () or len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def same(row, other):
    return (row["lambda_v"], row["depth"], row["alignment"]) == (other["lambda_v"], other["depth"], other["alignment"])


WAV = transformers.Wav2Vec2Config(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16),
    conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, vocab_size=32,
)  # fmt: skip
DINO = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "lacking", "engine"),
    [
        (lambda: transformers.Wav2Vec2ForCTC(WAV), "masked_spec_embed", "torch"),
        (lambda: transformers.Dinov2Model(DINO), "embeddings.mask_token", "torch"),
        (lambda: transformers.Dinov2Model(DINO), "embeddings.mask_token", "streaming"),
    ],
    ids=["wav2vec2", "dinov2", "dinov2 streamed"],
)
def test_what_only_training_uses_may_be_absent(build, lacking, engine, tmp_path):
    torch.manual_seed(0)
    model = build()
    asked = {"dtype": "float32", "engine": engine, "tokens": 256}
    whole = reads(saved(tmp_path / "whole", model), "trained", **asked)[0][None, "trained"]
    row = reads(saved(tmp_path / "less", model, (lacking,)), "trained", **asked)[0][None, "trained"]
    assert row["status"] == whole["status"] == "ok", row["error"]
    assert same(row, whole)
    assert row["engine_detail"] == f"{whole['engine_detail']}; not stored, and used by training alone: {lacking}"


def test_a_mask_that_a_forward_pass_uses_is_missed():
    config = transformers.ViTMAEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    assert not _only_in_training("decoder.mask_token", transformers.ViTMAEForPreTraining(config))
    assert _only_in_training("embeddings.mask_token", transformers.Dinov2Model(DINO))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["torch", "streaming"])
def test_a_tied_embedding_may_be_stored_as_the_head(engine, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    asked = TOKENS | {"engine": engine}
    whole = reads(saved(tmp_path / "whole", model), "parameters,trained", **asked)[0]
    head = {"model.embed_tokens.weight": "lm_head.weight"}
    folder = saved(tmp_path / "head", model, **head)
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    rows = reads(folder, "parameters,trained", **asked)[0]
    assert {row["status"] for row in rows.values()} == {"ok"}, rows[None, "trained"]["error"]
    assert same(rows[None, "trained"], whole[None, "trained"])
    for each in (tmp_path / "whole", folder):  # untied, they are two matrices, and one of them is not there
        stated = json.loads((each / "config.json").read_text())
        (each / "config.json").write_text(json.dumps(stated | {"tie_word_embeddings": False}))
    row = reads(folder, "trained", **asked)[0][None, "trained"]
    assert "lack 1 tensors of LlamaModel, embed_tokens.weight among them" in row["error"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tokenizers_without_a_vocabulary_file_are_found(tmp_path):
    torch.manual_seed(0)
    t5 = transformers.T5Config(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "byt5")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    canine = transformers.CanineConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=256,
        num_hash_buckets=64,
    )  # fmt: skip
    transformers.CanineModel(canine).save_pretrained(tmp_path / "canine")
    transformers.CanineTokenizer().save_pretrained(tmp_path / "canine")
    for name in ("byt5", "canine"):
        for spec in ("text", "tokens:random"):
            row = reads(tmp_path / name, "trained", input=spec, tokens=256, dtype="float32")[0][None, "trained"]
            assert row["status"] == "ok", (name, spec, row["error"])
            assert row["num_tokens"] == 256
    (tmp_path / "byt5/tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    row = reads(tmp_path / "byt5", "trained", input="text", tokens=256, dtype="float32")[0][None, "trained"]
    assert "needs the model's tokenizer, and there is none" in row["error"]


WRAPPED = {
    "compiled blocks": lambda name: re.sub(r"layers\.(\d+)", r"layers.\1._orig_mod", name),
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel, compiled": lambda name: f"module._orig_mod.{name}",
    "FSDP over checkpointed blocks": lambda name: re.sub(
        r"layers\.(\d+)", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module", f"_fsdp_wrapped_module.{name}"
    ),
}


LAYERNORM = TWINS / "layernorm/step4096"


@cache
def unwrapped(engine):
    return reads(LAYERNORM, "parameters,trained", **TOKENS, engine=engine)[0]


def wrapped(folder, wrap):
    shutil.copytree(LAYERNORM, folder)
    tensors = load_file(LAYERNORM / "model.safetensors")
    save_file({wrap(n): t for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["torch", "streaming"])
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(wrap, id=name, marks=[pytest.mark.slow] * (name != "compiled blocks"))
        for name, wrap in WRAPPED.items()
    ],
)
def test_wrappers_in_names_change_nothing(wrap, engine, tmp_path):
    folder = wrapped(tmp_path / "m", wrap)
    rows, expected = reads(folder, "parameters,trained", **TOKENS, engine=engine)[0], unwrapped(engine)
    assert {row["status"] for row in rows.values()} == {"ok"}, [row["error"] for row in rows.values()]
    own = rows[None, "parameters"]
    assert own["dead_parameters"] == expected[None, "parameters"]["dead_parameters"] > 0
    assert own["final_norm_tensor"] == wrap(expected[None, "parameters"]["final_norm_tensor"])
    assert same(rows[None, "trained"], expected[None, "trained"])
    checkpoints = [Checkpoint(str(each)) for each in (folder, LAYERNORM)]
    norms = [list_norms(each, read_parameters(each)) for each in checkpoints]
    assert norms[0] == norms[1]
    assert len(norms[0]) == 9
    for each, out in ((folder, "wrapped"), (LAYERNORM, "plain")):
        assert export_directions(str(each), tmp_path / out) == 9
    found, wanted = load_file(tmp_path / "wrapped"), load_file(tmp_path / "plain")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wrappers_in_names_are_no_obstacle_to_a_functional_read(tmp_path):
    row = reads(wrapped(tmp_path / "m", WRAPPED["compiled"]), "functional", **TOKENS)[0][None, "functional"]
    assert row["status"] == "ok", row["error"]


@pytest.mark.parametrize("kind", ["parameters", "trained"])
def test_an_average_beside_the_weights_changes_nothing(kind, tmp_path):
    folder = changed(tmp_path / "m", lambda t: t | {f"ema.{name}": 2 * tensor for name, tensor in t.items()})
    row, expected = (reads(each, kind, **TOKENS)[0][None, kind] for each in (folder, PLAIN))
    assert row["status"] == "ok", row["error"]
    assert row["final_norm_tensor"] == "model.norm.weight"
    assert row["scale_harmonic"] == expected["scale_harmonic"]
    assert same(row, expected)


def test_vllm_which_cannot_mend_names_is_not_given_wrapped_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "_SPEC", SimpleNamespace(missing=lambda: None))
    name = "model.layers.0._orig_mod.mlp.up_proj.weight"
    weights = StoredWeights(tmp_path, {name: TensorEntry(name, "f", "F32", (4, 4), 0, 64)})
    protocol = SimpleNamespace(skip_positions=0)
    job = SimpleNamespace(model=SimpleNamespace(modality="text"), input=None, protocol=protocol)
    read = vllm.read_vllm(job, None, weights)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: the tensor {name} carries .*; save the model that is wrapped"):
        next(read)
