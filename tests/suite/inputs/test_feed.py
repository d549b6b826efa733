"""What each kind of model is fed: real input in the form that it takes, and exactly as many rows as are said."""

import json

import numpy as np
import pytest
import torch

from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.locate import find_final_norm
from deadbench.suite.architectures.parts import part_of
from deadbench.suite.architectures.resolve import resolve
from deadbench.suite.errors import InputError
from deadbench.suite.inputs.feed import feed
from tests.suite.architectures.test_locate import SEQ2SEQ, TEXT, VISION

CLIP = {"text_config": TEXT | {"max_position_embeddings": 24}, "vision_config": VISION, "projection_dim": 16}
LLAVA = {
    "text_config": TEXT | {"model_type": "llama"},
    "vision_config": VISION | {"model_type": "clip_vision_model"},
    "image_token_index": 98,
    "vision_feature_layer": -1,
}
WHISPER = SEQ2SEQ | {
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16,
    "max_source_positions": 32, "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
FILM = TEXT | {"image_size": 32, "patch_size": 16, "num_frames": 4, "tubelet_size": 2, "use_mean_pooling": False}
WAV = TEXT | {"conv_dim": [16, 16], "conv_kernel": [10, 8], "conv_stride": [5, 8], "num_feat_extract_layers": 2,
              "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def made(model_type, config, spec="tokens:random", modality="text", stack="encoder", **changes):
    """The part that is read, its path, and what it is fed; 200 rows unless told otherwise."""
    model = build_model(build_config({"model_type": model_type, **config}))
    path, part = part_of(model, modality, stack)
    settings = {"num_tokens": 200, "sequence_length": 64, "seed": 0, "folder": None, "batch_tokens": 90} | changes
    return path, part, feed(part, spec, modality=modality, **settings)


def rows_of(part, inputs):
    """Rows of the final norm's output that the batches give, counted by a hook."""
    norm, count = part.get_submodule(find_final_norm(part).path), 0

    def hook(module, args, output):
        nonlocal count
        count += output.numel() // output.shape[-1]

    handle = norm.register_forward_hook(hook)
    with torch.no_grad():
        for batch in inputs.batches:
            before = count
            part(**batch.model_inputs)
            if batch.mask_ST is not None:
                count = before + int(batch.mask_ST.sum())
    handle.remove()
    return count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "config", "spec", "modality", "stack", "path"),
    [
        ("llama", TEXT, "tokens:random", "text", "encoder", ""),
        ("t5", T5, "tokens:random", "text", "encoder", "encoder"),
        ("t5", T5, "tokens:random", "text", "decoder", ""),
        ("bart", SEQ2SEQ, "tokens:random", "text", "decoder", ""),
        ("vit", VISION, "image", "image", "encoder", ""),
        ("videomae", FILM, "image", "image", "encoder", ""),
        ("wav2vec2", WAV, "audio:noise", "audio", "encoder", ""),
        ("whisper", WHISPER, "audio:noise", "audio", "encoder", "encoder"),
        ("whisper", WHISPER, "audio:noise", "audio", "decoder", ""),
        ("clip", CLIP, "tokens:random", "text", "encoder", ""),
        ("llava", LLAVA, "tokens:random", "text", "encoder", ""),
    ],
)
def test_as_many_rows_as_said(model_type, config, spec, modality, stack, path):
    found, part, inputs = made(model_type, config, spec, modality, stack)
    assert found == path
    assert rows_of(part, inputs) == inputs.num_tokens
    assert inputs.num_tokens == 200 if modality == "text" else 200 <= inputs.num_tokens < 300


@pytest.mark.filterwarnings("ignore")
def test_what_is_made_up_beside_the_tokens_is_said():
    _, _, inputs = made("clip", CLIP)
    assert "with pixel_values" in inputs.description
    assert "made up" in inputs.description
    batch = inputs.batches[0].model_inputs
    assert batch["pixel_values"].shape[0] == batch["input_ids"].shape[0]


def test_a_decoder_gets_the_tokens_and_the_encoder_the_same():
    _, _, inputs = made("t5", T5, stack="decoder")
    for batch in inputs.batches:
        assert torch.equal(batch.model_inputs["decoder_input_ids"], batch.model_inputs["input_ids"])


def test_sequences_are_no_longer_than_the_model_has_positions_for():
    config = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24}
    _, part, inputs = made("gpt2", config)
    assert {batch.model_inputs["input_ids"].shape[1] for batch in inputs.batches} == {24}
    assert rows_of(part, inputs) == 200


@pytest.mark.filterwarnings("ignore")
def test_given_sequences_longer_than_the_table_of_positions_are_refused(tmp_path):
    """By the model's own table; rotary positions have no end."""
    np.save(tmp_path / "ids.npy", np.arange(400).reshape(8, 50) % 90)
    spec = f"tokens:{tmp_path / 'ids.npy'}"
    with pytest.raises(InputError, match="50 tokens a sequence, and the model has 40 positions"):
        made("bert", TEXT | {"max_position_embeddings": 40}, spec)
    assert made("bert", TEXT | {"max_position_embeddings": 50}, spec)[2].num_tokens == 400
    assert made("llama", TEXT | {"max_position_embeddings": 40}, spec)[2].num_tokens == 400


def test_tokens_stand_for_no_picture():
    _, _, inputs = made("llava", LLAVA, num_tokens=2000)
    assert all(98 not in batch.model_inputs["input_ids"] for batch in inputs.batches)


def test_photographs_differ_and_films_move():
    _, _, inputs = made("vit", VISION, "image", "image")
    pictures = torch.cat([batch.model_inputs["pixel_values"] for batch in inputs.batches])
    assert inputs.num_distinct == len(pictures) * 16
    assert "scaled to [-1, 1]" in inputs.description
    _, _, films = made("videomae", FILM, "image", "image")
    film = films.batches[0].model_inputs["pixel_values"][0]
    assert film.shape == (4, 3, 32, 32)
    assert not torch.equal(film[0], film[3])


def test_rows_of_a_known_form_are_counted_without_a_pass(monkeypatch):
    model = build_model(build_config({"model_type": "timesformer", **FILM}))
    known = resolve(model, "image", "encoder")
    settings = {"modality": "image", "num_tokens": 60, "sequence_length": 64, "seed": 0, "folder": None}
    settings |= {"batch_tokens": 90, "form": known.form, "final": known.final}
    expected = feed(model, "image", **settings | {"form": None})
    monkeypatch.setattr(type(model), "forward", lambda self, pixel_values: pytest.fail("a film takes minutes"))
    found = feed(model, "image", **settings)
    assert found.num_tokens == expected.num_tokens == 4 * 17
    assert [batch.rows for batch in found.batches] == [batch.rows for batch in expected.batches]


def test_the_models_own_processor_comes_first(tmp_path):
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "do_normalize": False,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    _, _, inputs = made("vit", VISION, "image", "image", folder=tmp_path)
    assert inputs.description == "image"
    assert min(float(b.model_inputs["pixel_values"].min()) for b in inputs.batches) >= 0


def test_least_items_are_kept_however_many_rows_each_gives():
    _, _, inputs = made("vit", VISION, "image", "image", num_tokens=10, least_items=5)
    assert sum(len(batch.model_inputs["pixel_values"]) for batch in inputs.batches) == 5


@pytest.mark.parametrize(
    ("model_type", "config", "spec", "modality", "message"),
    [
        ("vit", VISION, "tokens:random", "text", "the model takes pixel_values, no text; its modality is another"),
        ("llama", TEXT, "image", "image", "the model takes input_ids.*, no image"),
        ("llama", TEXT, "audio:noise", "audio", "the model takes input_ids.*, no audio"),
    ],
)
def test_another_modality_is_one_line(model_type, config, spec, modality, message):
    with pytest.raises(InputError, match=message) as caught:
        made(model_type, config, spec, modality)
    assert "\n" not in str(caught.value)
