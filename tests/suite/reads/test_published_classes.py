"""The final norm's tensor of published classes, as transformers saves them: a sample here, all of them with -m full."""

import shutil
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deadbench.runners.results.directions_file import export_directions
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.reads.classify import classify
from deadbench.suite.reads.norms_table import list_norms
from deadbench.suite.reads.parameters import read_parameters
from tests.conftest import TWINS
from tests.suite.reads.published_classes import found_in, sweep

# Keys that a class does not know are of no effect.
TINY = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "first_k_dense_replace": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "image_size": 32, "patch_size": 8,
}  # fmt: skip
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
TWO_TOWERS = {"text_config": TINY | LINEAR, "vision_config": VISION}
ON_TRIAL = pytest.mark.subprocess  # with every key of every model in both of its parts it is out of the ordinary
DRAFT = {"eh_proj.weight": (32, 64), "enorm.weight": (32,), "hnorm.weight": (32,), "shared_head.norm.weight": (32,),
         "shared_head.head.weight": (99, 32)}  # fmt: skip


def of(model_type, name, **more):
    return TINY | {"model_type": model_type, "architectures": [name]} | more


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "read"),
    [
        (of("qwen3_next", "Qwen3NextForCausalLM", **LINEAR), "model.norm.weight"),
        (of("qwen3_5_text", "Qwen3_5ForCausalLM", **LINEAR), "model.norm.weight"),
        pytest.param(
            of("qwen3_5", "Qwen3_5ForConditionalGeneration", **TWO_TOWERS),
            "model.language_model.norm.weight",
            marks=ON_TRIAL,
        ),
        (of("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", **LINEAR), "model.norm.weight"),
        pytest.param(
            of("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", **TWO_TOWERS),
            "model.language_model.norm.weight",
            marks=ON_TRIAL,
        ),
        (
            of("granitemoehybrid", "GraniteMoeHybridForCausalLM", layer_types=["mamba", "attention"]),
            "model.norm.weight",
        ),
        (of("minimax", "MiniMaxForCausalLM", **LINEAR), "model.norm.weight"),
        (of("deepseek_v3", "DeepseekV3ForCausalLM"), "model.norm.weight"),
        (of("glm4_moe", "Glm4MoeForCausalLM"), "model.norm.weight"),
        (of("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM"), "roberta_prelayernorm.LayerNorm.weight"),
        (of("beit", "BeitForMaskedImageModeling", use_mean_pooling=False), "beit.layernorm.weight"),
        (of("qwen3_next", "Qwen3NextModel", **LINEAR), "norm.weight"),
        (of("arcee", "ArceeForQuestionAnswering"), "transformer.norm.weight"),
    ],
    ids=lambda each: each["architectures"][0] if isinstance(each, dict) else each,
)
def test_the_final_norm_of_a_class_whose_blocks_have_one_of_its_name(config, read, tmp_path):
    found = found_in(config, tmp_path)
    assert (found.verdict, found.read) == ("right", read), found.told


@pytest.mark.filterwarnings("ignore")
def test_all_norms_of_such_a_class_are_in_the_table(tmp_path):
    found_in(of("qwen3_next", "Qwen3NextForCausalLM", **LINEAR), tmp_path)
    checkpoint, stored = Checkpoint(str(tmp_path)), load_file(tmp_path / "model.safetensors")
    rows = {row["norm"]: row for row in list_norms(checkpoint, read_parameters(checkpoint))}
    assert rows["norm"]["role"] == "final"
    assert rows["norm"]["scale_max"] == pytest.approx(1 + stored["model.norm.weight"].max())
    own = {name for name in stored if name.endswith("norm.weight")}
    gated = "model.layers.0.linear_attn.norm.weight"  # which takes a gate beside its input, and is of neither family
    assert {f"model.{name}.weight" for name in rows} == own - {gated}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        of("ibert", "IBertForMaskedLM", quant_mode=False),
        of("higgs_audio_v2", "HiggsAudioV2ForConditionalGeneration", pad_token_id=0),
    ],
    ids=["a norm with parts", "AutoModel is the published class"],
)
def test_the_final_norm_is_in_the_table(config, tmp_path):
    found_in(config, tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    read = read_parameters(checkpoint)
    (row,) = [row for row in list_norms(checkpoint, read) if row["role"] == "final"]
    assert (row["norm"], row["scale_harmonic"]) == (read.final.path, read.columns()["scale_harmonic"])


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "Glm4MoeForCausalLM"])
def test_draft_heads_behind_the_last_block_are_not_the_final_norm(name, tmp_path):
    config = of({"D": "deepseek_v3", "G": "glm4_moe"}[name[0]], name)
    found_in(config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    block = {n.replace(".1.", ".2."): t for n, t in tensors.items() if n.startswith("model.layers.1.")}
    drafts = {f"model.layers.2.{n}": np.full(shape, 3, np.float32) for n, shape in DRAFT.items()}
    save_file(tensors | block | drafts, tmp_path / "model.safetensors", {"format": "pt"})
    assert classify(str(tmp_path))[0]["final_norm_tensor"] == "model.norm.weight"
    del tensors["model.norm.weight"]
    save_file(tensors | block | drafts, tmp_path / "model.safetensors", {"format": "pt"})
    result = classify(str(tmp_path))[0]
    assert result["family"] == "undetermined"
    assert "no tensor for norm.weight" in " ".join(result["evidence"])


def copied(folder, twin, *prefixes):
    """A twin with its tensors below each of the prefixes, each copy's scales twice those of the one before."""
    shutil.copytree(TWINS / twin / "step4096", folder)
    tensors = load_file(folder / "model.safetensors")
    copies = {f"{prefix}{n}": t * 2**i for i, prefix in enumerate(prefixes) for n, t in tensors.items()}
    save_file(copies, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("twin", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize(
    ("prefixes", "read"),
    [(["", "ema."], ""), (["", "model_ema.module."], ""), (["base_model.model.", "ema."], "base_model.model."),
     (["ema."], "ema.")],
)  # fmt: skip
def test_a_second_copy_does_not_stand_in_the_way(twin, prefixes, read, tmp_path):
    plain = classify(str(TWINS / twin / "step4096"))[0]
    result = classify(copied(tmp_path / "m", twin, *prefixes))[0]
    assert result["final_norm_tensor"] == f"{read}{plain['final_norm_tensor']}"
    assert result["scale_harmonic"] == plain["scale_harmonic"]


def test_two_that_could_be_it_are_both_named_and_nothing_of_it_is_exported(tmp_path):
    source = copied(tmp_path / "m", "rmsnorm", "policy.", "reference.")
    result = classify(source)[0]
    told = " ".join(result["evidence"])
    assert result["family"] == "undetermined"
    assert "policy.model.norm.weight and reference.model.norm.weight could each be norm.weight" in told
    with pytest.raises(ValueError, match=r"policy\.model\.norm\.weight and reference\.model\.norm\.weight"):
        export_directions(source, tmp_path / "v.safetensors")


def test_a_norm_that_an_adapter_trained_and_its_original_are_both_named(tmp_path):
    source = copied(tmp_path / "m", "layernorm", "base_model.model.")
    path = tmp_path / "m/model.safetensors"
    tensors, name = load_file(path), "base_model.model.gpt_neox.final_layer_norm"
    for parameter in ("weight", "bias"):
        scale = tensors.pop(f"{name}.{parameter}")
        tensors[f"{name}.original_module.{parameter}"] = scale
        tensors[f"{name}.modules_to_save.default.{parameter}"] = 2 * scale
    save_file(tensors, path, {"format": "pt"})
    result = classify(source)[0]
    assert result["family"] == "undetermined"
    assert f"{name}.modules_to_save.default.weight" in " ".join(result["evidence"])
    assert f"{name}.original_module.weight" in " ".join(result["evidence"])


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_the_final_norm_of_every_published_class():
    found = list(sweep([]))
    counts = Counter(verdict for _, verdict, _ in found)
    told = [each for each in found if each[1] in ("wrong", "undetermined")]
    judged = counts["right"] + counts["wrong"] + counts["undetermined"]
    assert counts["wrong"] == 0, told
    assert judged >= 400
    assert counts["right"] >= 0.97 * judged, told
