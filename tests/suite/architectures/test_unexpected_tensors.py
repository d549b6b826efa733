"""Tensors without a place in the model: refused where they are another model's, told where they cannot matter."""

from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModel

from deadbench.suite.architectures.build import build_config, build_model, build_published
from deadbench.suite.architectures.unexpected_tensors import refuse_unexpected, remarks
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.quantised import is_part
from deadbench.suite.checkpoints.tensors import TensorEntry
from deadbench.suite.errors import CheckpointError
from tests.conftest import TINY_NEOX, TWINS, save_tiny

SIZES = {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
LLAMA = SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
BERT = SIZES | {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
MIXTRAL = SIZES | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2}
WAV = {
    "model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"], "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": [16, 16], "conv_stride": [5, 2],
    "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "vocab_size": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The tensors that transformers saves of a configuration."""

    def entries(config):
        folder = save_tiny(tmp_path_factory.mktemp("m"), config)
        return Checkpoint(str(folder)).headers()

    return entries


def refused(config, entries, source="m", *, published=False):
    model = (build_published if published else build_model)(build_config(config), "meta")
    return refuse_unexpected(model, config, entries, source)


def with_more(entries, **more):
    added = {n.replace("__", "."): TensorEntry(n.replace("__", "."), "f", "F32", s, 0, 0) for n, s in more.items()}
    return entries | added


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [LLAMA, BERT, TINY_NEOX, MIXTRAL, WAV], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("published", [False, True])
def test_what_transformers_saves_has_its_place(config, published, stored):
    assert refused(config, stored(config), published=published) == []


@pytest.mark.parametrize(
    ("config", "name", "shape", "told"),
    [
        (LLAMA, "model.layers.1.self_attn.q_proj.bias", (16,), "take both from the same place"),
        (LLAMA, "layers.1.self_attn.q_proj.bias", (16,), "take both from the same place"),
        (LLAMA, "model.layers.1.self_attn.q_norm.weight", (8,), "take both from the same place"),
        (LLAMA, "model.layers.0.post_feedforward_layernorm.weight", (16,), "take both from the same place"),
        (LLAMA, "model.norm.bias", (16,), "take both from the same place"),
        (LLAMA, "model.layers.0.self_attn.bias", (16,), "take both from the same place"),
        (LLAMA, "model.layers.0.mlp.down_proj.weight_scale", (), "give config.json the quantization_config"),
        (LLAMA, "model.layers.0.mlp.down_proj.weight_scale_inv", (1, 1), "give config.json the quantization_config"),
        (LLAMA, "model.layers.0.mlp.down_proj.input_scale", (), "give config.json the quantization_config"),
        (LLAMA, "model.layers.0.mlp.down_proj.weight.absmax", (8,), "give config.json the quantization_config"),
        (LLAMA, "model.layers.0.mlp.down_proj.lora_A.default.weight", (4, 32), "merge it"),
        (LLAMA, "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight", (16, 4), "merge it"),
        (LLAMA, "model.layers.0.mlp.down_proj.lora_a.weight", (4, 32), "merge it"),
        (LLAMA, "model.layers.0.mlp.down_proj.dora_scale", (16, 1), "merge it"),
        (LLAMA, "model.layers.0.mlp.down_proj.SCB", (16,), "give config.json the quantization_config"),
        (LLAMA, "model.layers.0.mlp.down_proj.scale_weight", (), "give config.json the quantization_config"),
        (BERT, "bert.encoder.layer.0.attention.self.query.weight_scale", (), "give config.json the quantization_co"),
        (TINY_NEOX, "gpt_neox.layers.0.attention.query_key_value.lora_B.weight", (48, 4), "merge it"),
    ],
)
@pytest.mark.parametrize("published", [False, True])
def test_tensors_of_another_model_are_refused_by_name(config, name, shape, told, published, stored):
    entries = with_more(stored(config), **{name: shape})
    with pytest.raises(CheckpointError, match=told) as caught:
        refused(config, entries, "source", published=published)
    assert str(caught.value).startswith(f"source: f: {name} ")
    other = config | {
        "quantization_config": {"quant_method": "hqq"}
    }  # whose parts of weights have no names of their own
    assert refused(other, entries, published=published) == []
    quantised = config | {"quantization_config": {"quant_method": "fp8"}}
    if is_part(name):
        assert refused(quantised, entries, published=published) == []
    else:
        with pytest.raises(CheckpointError, match=told):
            refused(quantised, entries, published=published)


@pytest.mark.parametrize(
    ("config", "name", "shape", "told"),
    [
        (LLAMA, "model.layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        (LLAMA, "model.layers.0.self_attn.k_scale", (), True),
        (LLAMA, "model.layers.0.self_attn.bias", (1, 1, 64, 64), True),
        (TINY_NEOX, "gpt_neox.layers.0.attention.masked_bias", (), False),  # transformers leaves it out by itself
        (BERT, "bert.embeddings.position_ids", (1, 512), False),  # transformers has and computes it
        (BERT, "cls.seq_relationship.weight", (2, 16), False),
        (LLAMA, "score.weight", (2, 16), False),
        (LLAMA, "model.lm_head.weight", (97, 16), False),
        (LLAMA, "vision_tower.blocks.0.attn.qkv.bias", (48,), False),
        (LLAMA, "mtp.layers.0.self_attn.q_proj.bias", (48,), False),
    ],
)
def test_tensors_that_cannot_matter_are_told_or_passed_over(config, name, shape, told, stored):
    assert refused(config, with_more(stored(config), **{name: shape})) == ([name] if told else [])


def test_what_transformers_itself_leaves_out_is_left_out(stored):
    config = SIZES | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 16, "n_head": 2}
    entries = with_more(stored(config), **{"transformer.h.0.attn.bias": (1, 1, 64, 64)})
    assert refused(config, entries) == []


@pytest.mark.parametrize("published", [False, True])
def test_one_more_block_is_refused_and_a_draft_head_is_not(published, stored):
    block = {f"model.layers.2.{name}": (16,) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
    entries = with_more(stored(LLAMA), **block)
    for config in (LLAMA, LLAMA | {"quantization_config": {"quant_method": "fp8"}}):
        with pytest.raises(CheckpointError, match=r"model.layers.2.input_layernorm.weight is of a block that"):
            refused(config, entries, published=published)
    draft = with_more(entries, **{"model.layers.2.shared_head.norm.weight": (16,)})
    assert set(refused(LLAMA, draft, published=published)) == {*draft} - {*stored(LLAMA)}


@pytest.mark.parametrize("published", [False, True])
def test_whole_numbers_are_no_weights(published, stored):
    name = "model.layers.1.mlp.down_proj.weight"
    entries = stored(LLAMA)
    entries |= {name: replace(entries[name], dtype="I8")}
    with pytest.raises(
        CheckpointError, match=rf"^m: model.safetensors: {name} holds whole numbers \(I8\), where Llama"
    ):
        refused(LLAMA, entries, published=published)
    assert refused(LLAMA | {"quantization_config": {"quant_method": "gptq"}}, entries, published=published) == []


def test_a_row_says_what_was_left_out_or_taken_as_it_is(stored):
    entries = stored(LLAMA)
    model = build_published(build_config(LLAMA), "meta")
    assert remarks(model, LLAMA, entries, []) == []
    below = {f"script.{n.removeprefix('model.')}": replace(e, name=f"script.{n}") for n, e in entries.items()}
    assert remarks(model, LLAMA, entries | below, []) == [], "a script's path, or an average's"
    raw = {n: replace(e, dtype="F8_E4M3") for n, e in entries.items() if "proj" in n}
    beside = with_more(entries | raw, model__embed_positions__weight=(64, 16), scaled_fp8=(2,), lm_head__bias=(97,))
    cached = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert remarks(model, LLAMA, with_more(beside, **{cached: (4,)}), [cached]) == [
        f"not loaded, and of no effect: {cached}",
        "stored beside the model, and not loaded: lm_head.bias and 2 more",
        f"floats of 8 bits without scales, taken as they are: {min(raw)} and {len(raw) - 1} more",
    ]
    quantised = LLAMA | {"quantization_config": {"quant_method": "fp8"}}
    assert remarks(model, quantised, entries | raw, []) == []


@pytest.mark.parametrize("twin", ["layernorm", "rmsnorm"])
def test_real_checkpoints_are_taken(twin, minilm):
    for folder in (TWINS / twin / "step4096", minilm):
        checkpoint = Checkpoint(str(folder))
        assert refused(checkpoint.config(), checkpoint.headers()) == []


@pytest.mark.filterwarnings("ignore")
def test_it_is_unexpected_where_transformers_says_so(tmp_path):
    """transformers' own report of loading names the tensors that are refused, and those that are told."""
    folder = save_tiny(tmp_path / "m", LLAMA)
    tensors = dict(transformers.LlamaForCausalLM.from_pretrained(folder).state_dict())
    more = {"model.layers.0.self_attn.q_proj.bias": torch.ones(16), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    _, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {*more, "lm_head.weight"}
