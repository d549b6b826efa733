"""Pictures and text in one sequence: every token's kind is known, and those that are asked for count."""

import copy
import json
import shutil
from functools import partial

import pytest
import torch

from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.kernel_test import live_norm, probe
from deadbench.suite.errors import InputError
from deadbench.suite.inputs.early_checks import check_config
from deadbench.suite.inputs.feed import feed
from deadbench.suite.inputs.specs import captions, check_spec, content_hash, photo_files
from deadbench.suite.reads.final_norm import FinalNormRead
from tests.conftest import ROOT

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 32, "patch_size": 8}  # fmt: skip
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
QUERIES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "vocab_size": 99, "encoder_hidden_size": 32}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
IMAGE = 98
# Each with the places that a picture of 4 x 4 patches takes in it.
BOTH = {
    "llava": ({"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {
        "model_type": "clip_vision_model"}, "image_token_index": IMAGE, "vision_feature_layer": -1}, 16),
    "paligemma": ({"text_config": TEXT | {"model_type": "gemma"}, "vision_config": SIGLIP | {"projection_dim": 32},
                   "projection_dim": 32, "image_token_index": IMAGE}, 16),
    "gemma3": ({"text_config": TEXT | {"model_type": "gemma3_text"}, "vision_config": SIGLIP,
                "mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 97, "eoi_token_index": 96}, 4),
    "idefics3": ({"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION, "image_token_id": IMAGE,
                  "scale_factor": 2, "pad_token_id": 0}, 4),
    "qwen2_vl": ({"text_config": TEXT | {"model_type": "qwen2_vl_text", "rope_scaling": {
        "type": "mrope", "mrope_section": [1, 1, 2]}}, "vision_config": {
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2},
        "image_token_id": IMAGE, "video_token_id": 95, "vision_start_token_id": 97, "vision_end_token_id": 96}, 4),
    "gemma4": ({"text_config": TEXT | {"model_type": "gemma4_text", "global_head_dim": 8, "num_kv_shared_layers": 0,
                                       "hidden_size_per_layer_input": 0, "sliding_window": 16},
                "vision_config": VISION | {"model_type": "gemma4_vision", "num_key_value_heads": 4, "head_dim": 8,
                                           "position_embedding_size": 64, "pooling_kernel_size": 2},
                "audio_config": None, "image_token_id": IMAGE, "boi_token_id": 97, "eoi_token_id": 96,
                "video_token_id": 95}, 4),
    # Itself, its one part, and a word at the end of each of the part's four rows.
    "llava_next": ({"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {
        "model_type": "clip_vision_model"}, "image_token_index": IMAGE, "vision_feature_layer": -1,
        "image_grid_pinpoints": [[32, 32], [32, 64]]}, 36),
    "mistral3": ({"text_config": TEXT | {"model_type": "mistral"}, "vision_config": VISION | {
        "model_type": "pixtral", "head_dim": 8}, "image_token_index": IMAGE, "vision_feature_layer": -1,
        "spatial_merge_size": 2}, 4),
    # Queries take up what the tower sees, and they are what has places; the second hears what is asked besides.
    "blip-2": ({"vision_config": VISION, "qformer_config": QUERIES, "num_query_tokens": 6, "image_token_index": IMAGE,
                "text_config": {"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
                                "num_attention_heads": 4, "vocab_size": 99, "word_embed_proj_dim": 32}}, 6),
    "instructblip": ({"vision_config": VISION, "qformer_config": QUERIES, "num_query_tokens": 6,
                      "image_token_index": IMAGE, "text_config": TEXT | {"model_type": "llama"}}, 6),
    # Patches without a tower; patches with the shape that they had; patches that are pictures, in a row.
    "fuyu": (TEXT | {"text_config": TEXT | {"model_type": "persimmon"}, "image_size": 32, "patch_size": 8,
                     "image_token_id": IMAGE}, 16),
    "lfm2_vl": ({"text_config": TEXT | {"model_type": "lfm2", "layer_types": ["full_attention"] * 2},
                 "vision_config": VISION | {"model_type": "siglip2_vision_model", "num_patches": 16},
                 "image_token_id": IMAGE, "downsample_factor": 2}, 4),
    "paddleocr_vl": ({"text_config": TEXT | {"rope_parameters": MROPE}, "vision_config": VISION | {
        "spatial_merge_size": 2}, "image_token_id": IMAGE, "vision_start_token_id": 97, "vision_end_token_id": 96}, 4),
    # A word at the end of each row, one before and one after: told by no grid.
    "hunyuan_vl": ({"text_config": TEXT | {"model_type": "hunyuan_vl_text", "rope_parameters": MROPE},
                    "vision_config": VISION | {"out_hidden_size": 32, "spatial_merge_size": 2},
                    "image_token_id": IMAGE}, 8),
    "deepseek_vl_hybrid": ({"text_config": TEXT | {"model_type": "llama"}, "vision_config": SIGLIP,
                            "high_res_vision_config": VISION | {"output_channels": 8, "image_size": 64, "mlp_dim": 64,
                                                                "window_size": 4, "global_attn_indexes": [1]},
                            "image_token_id": IMAGE}, 16),
    "video_llava": ({"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {
        "model_type": "clip_vision_model"}, "image_token_index": IMAGE, "video_token_index": 97,
        "vision_feature_layer": -1}, 16),
    # A mask says where pictures are, and no token.
    "kosmos-2": ({"text_config": {"vocab_size": 99, "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4},
                  "vision_config": VISION, "latent_query_num": 6}, 6),
}  # fmt: skip
NORMS = {"blip-2": "language_model.model.decoder.final_layer_norm", "fuyu": "language_model.final_layernorm",
         "lfm2_vl": "language_model.embedding_norm", "kosmos-2": "text_model.model.layer_norm",
         "idefics3": "text_model.norm"}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return {
        name: build_model(build_config({"model_type": name, **config})).eval() for name, (config, _) in BOTH.items()
    }


def fed(part, spec="image-text", num_tokens=300, **changes):
    settings = {"modality": "text", "sequence_length": 64, "seed": 0, "folder": None, "batch_tokens": 150} | changes
    return feed(part, spec, num_tokens=num_tokens, **settings)


@pytest.mark.parametrize("name", BOTH)
def test_the_model_runs_on_it_and_every_token_is_of_one_kind(models, name):
    part, places = models[name], BOTH[name][1]
    norm, outputs = part.get_submodule(NORMS.get(name, "language_model.norm")), []
    handle = norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    every, text, pictures = (fed(part, f"image-text{kind}") for kind in ("", "/text", "/picture"))
    try:
        with torch.no_grad():
            for batch in every.batches:
                part(**batch.model_inputs)
    finally:
        handle.remove()
    assert sum(y.shape[0] * y.shape[1] for y in outputs) == every.num_tokens >= 300
    assert all(batch.mask_ST is None for batch in every.batches)
    assert min(text.num_tokens, pictures.num_tokens) >= 300
    for one, other in zip(text.batches, pictures.batches, strict=False):
        if one.mask_ST.shape == other.mask_ST.shape:
            assert torch.equal(one.mask_ST, ~other.mask_ST), "the same sequences"
            assert torch.equal(one.model_inputs["input_ids"], other.model_inputs["input_ids"])
        marked = other.model_inputs.get("image_embeds_position_mask", other.model_inputs["input_ids"] == IMAGE)
        assert torch.equal(other.mask_ST, marked.bool())
        assert set(other.mask_ST.sum(1).tolist()) == {places}
    assert sum(batch.num_rows for batch in pictures.batches) == pictures.num_tokens
    assert "captions made up" in every.description
    unloaded = fed(copy.deepcopy(part).to("meta"))  # as block streaming has it, and tensor parallel
    assert unloaded.num_tokens == every.num_tokens
    for one, other in zip(every.batches, unloaded.batches, strict=True):
        assert all(torch.equal(one.model_inputs[name], other.model_inputs[name]) for name in one.model_inputs)
    assert text.description.endswith("text tokens count)")


def test_a_direction_that_is_dead_in_picture_tokens_alone_is_found_there(models):
    """Coordinate 7 is written by the words' embedding, and neither by the projector nor by a block."""
    part = copy.deepcopy(models["llava"])
    with torch.no_grad():
        projector = part.multi_modal_projector.linear_2
        projector.weight[7], projector.bias[7] = 0, 0
        for block in part.language_model.layers:
            block.self_attn.o_proj.weight[7] = 0
            block.mlp.down_proj.weight[7] = 0
    norm, dead = part.language_model.norm, {}

    def keep(taken, module, args, output):
        taken += [args[0], output]

    formula = live_norm(norm, probe(norm, 32), 32)
    for kind in ("", "/text", "/picture"):
        read, inputs = FinalNormRead(norm, formula), fed(part, f"image-text{kind}")
        for batch in inputs.batches:
            taken: list[torch.Tensor] = []
            handle = norm.register_forward_hook(partial(keep, taken))
            with torch.no_grad():
                part(**batch.model_inputs)
            handle.remove()
            read.update(*taken, batch.mask_ST)
        row, spectrum = read.finish()
        assert row["num_tokens"] == inputs.num_tokens
        dead[kind] = (row["num_dead_1e10"], spectrum["dead_coordinates"][:1])
    assert dead == {"": (0, []), "/text": (0, []), "/picture": (1, [[7]])}


def test_pictures_reach_the_text_after_them_and_only_that(models):
    """A picture changes the rows of its caption, which come later, and none before it."""
    part = models["llava"]
    (batch,) = fed(part, num_tokens=60).batches
    ids, pixels = batch.model_inputs["input_ids"][:1], batch.model_inputs["pixel_values"][:1]
    with torch.no_grad():
        rows, others = (part(input_ids=ids, pixel_values=p).last_hidden_state[0] for p in (pixels, pixels.flip(-1)))
    assert bool((ids[0, :16] == IMAGE).all()), "the picture, then its caption"
    assert not torch.allclose(rows[16:], others[16:])


def test_what_takes_no_pictures_or_leaves_positions_out_is_one_line(models):
    gpt2 = build_model(build_config({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99}))
    with pytest.raises(InputError, match="GPT2Model takes no pictures in its text; give --input text"):
        fed(gpt2)
    git = build_model(build_config({"model_type": "git", **TEXT, "vision_config": VISION}), "meta")
    with pytest.raises(InputError, match="GitModel takes pictures beside its tokens, not in their places"):
        fed(git)
    with pytest.raises(InputError, match="of pictures and text give image-text/text"):
        fed(models["llava"], skip_positions=1)
    with pytest.raises(InputError, match="'image-text' is pictures and text, and gpt2 does not take both"):
        check_config("image-text", "text", {"model_type": "gpt2", "vocab_size": 9, "n_positions": 9}, None)
    check_config("image-text/picture", "text", BOTH["llava"][0] | {"model_type": "llava"}, [])
    with pytest.raises(InputError, match="positions"):
        fed(models["llava"].__class__(build_config({"model_type": "llava", **BOTH["llava"][0], "text_config": TEXT | {
            "model_type": "llama", "max_position_embeddings": 32}})))  # fmt: skip


def test_a_folder_has_a_caption_beside_each_photograph(models, tmp_path):
    photo = photo_files("")[0]
    (tmp_path / "a.jpg").write_bytes(photo.read_bytes())
    with pytest.raises(InputError, match=r"a.jpg: has no caption; put it beside it, as a.txt"):
        captions(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(InputError, match=r"a.txt: not UTF-8 text"):
        captions(str(tmp_path))
    (tmp_path / "a.txt").write_text("  ")
    with pytest.raises(InputError, match=r"a.txt: an empty caption"):
        captions(str(tmp_path))
    (tmp_path / "a.txt").write_text("one\n")
    assert captions(str(tmp_path)) == ["one"]
    spec = f"image-text:{tmp_path}"
    check_spec(spec, "text")
    before = content_hash(spec)
    assert before != content_hash(f"image-text/text:{tmp_path}") != content_hash(f"image:{tmp_path}")
    (tmp_path / "a.txt").write_text("another")
    assert content_hash(spec) != before
    assert fed(models["llava"], spec).num_tokens >= 300
    with pytest.raises(InputError, match="image-text:none': no such directory"):
        check_spec("image-text:none", "text")
    with pytest.raises(InputError, match="is unknown; choose .*image-text"):
        check_spec("image-text/sound", "text")
    assert len(captions("")) == len(photo_files("")) == 6


def test_with_its_own_tokenizer_and_processor_the_captions_are_words(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "suite/data/twins/layernorm/step0" / name, tmp_path)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    config = BOTH["llava"][0] | {"image_token_index": 1100}
    config["text_config"] = config["text_config"] | {"vocab_size": 1101, "max_position_embeddings": 512}
    part = build_model(build_config({"model_type": "llava", **config})).eval()
    inputs = fed(part, folder=tmp_path, num_tokens=900)
    assert inputs.description == "image-text"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    first = inputs.batches[0].model_inputs["input_ids"][0]
    assert tokenizer.decode(first[first != 1100], skip_special_tokens=True).strip() == captions("")[0]
    assert len({batch.model_inputs["input_ids"].shape[1] for batch in inputs.batches}) > 1, (
        "captions of their own length"
    )
    with torch.no_grad():
        rows = sum(part(**batch.model_inputs).last_hidden_state[..., 0].numel() for batch in inputs.batches)
    assert rows == inputs.num_tokens >= 900
    part.config.image_token_id = int(first[-1])
    with pytest.raises(InputError, match="a caption has the token [0-9]+, by which the model knows a picture"):
        fed(part, folder=tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="needs the model's tokenizer"):
        fed(part, folder=tmp_path)
