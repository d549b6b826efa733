"""Architectures that run only on inputs of their own kind: the minimal ones reach their final norm."""

import pytest
import torch

from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.locate import locate_final_norm as locate
from deadbench.suite.tracing.minimal_inputs import minimal_inputs

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {key: TEXT[key] for key in TEXT if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}
OPT = {"model_type": "opt", "vocab_size": 99, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2,
       "ffn_dim": 64, "num_attention_heads": 4}  # fmt: skip
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
KOSMOS = {
    "text_config": {"vocab_size": 99, "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4},
    "vision_config": VISION,
    "latent_query_num": 9,
}
SPEECHT5 = {"vocab_size": 99, "hidden_size": 32, "encoder_layers": 2, "decoder_layers": 2, **HEADS}
SOUND = TEXT | {"head_dim": 8, "max_position_embeddings": 64}
VOXTRAL = {"audio_config": SOUND, "text_config": SOUND | {"num_key_value_heads": 2}, "hidden_size": 32}
QWEN3_ASR = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
             "downsample_hidden_size": 16, "output_dim": 32}  # fmt: skip
MUSICGEN = {
    "architectures": ["MusicgenForConditionalGeneration"],
    "text_encoder": {"model_type": "t5", "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
                     "num_heads": 4},
    "audio_encoder": {"model_type": "encodec", "hidden_size": 32, "num_filters": 8, "upsampling_ratios": [4, 2],
                      "codebook_size": 32, "codebook_dim": 32},
    "decoder": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
                "num_codebooks": 4, "pad_token_id": 99, "bos_token_id": 99},
}  # fmt: skip

GEMMA = {"model_type": "gemma", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
PI0 = {
    "vlm_config": {"model_type": "paligemma", "text_config": GEMMA, "vision_config": VISION | {"projection_dim": 32},
                   "projection_dim": 32, "hidden_size": 32, "image_token_index": 98},
    "dit_config": GEMMA | {"hidden_size": 16},
}  # fmt: skip
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
          "layer_type": "basic"}  # fmt: skip
TVP = TEXT | {"backbone_config": RESNET, "max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2}
M4T = {"vocab_size": 99, "hidden_size": 32, "encoder_layers": 2, "decoder_layers": 2, "speech_encoder_layers": 1,
       "speech_encoder_attention_heads": 2, "t2u_encoder_layers": 1, "t2u_decoder_layers": 1, **HEADS}  # fmt: skip

SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1, "d_model": 32,
          "encoder_layers": 1, "decoder_layers": 2, **HEADS}  # fmt: skip
AUTOFORMER = SERIES | {"label_length": 4, "moving_average": 3}
STACKED = TEXT | {"num_mel_bins": 8, "num_stacked_frames": 2, "max_position_embeddings": 32,
                  "num_timestamp_prediction_layers": 1}  # fmt: skip

# (model_type, configuration, path, family)
SLOW = {"kosmos-2", "musicgen", "pi0", "seamless_m4t", "tvp"}  # most of whose time is importing and building
CASES = [
    ("kosmos-2", KOSMOS, "text_model.model.layer_norm", "layernorm"),
    ("speecht5", SPEECHT5, "decoder.wrapped_decoder.layers.1.final_layer_norm", "layernorm"),
    ("voxtral_realtime", VOXTRAL, "language_model.norm", "rmsnorm"),
    ("qwen3_asr_encoder", QWEN3_ASR, "ln_post", "layernorm"),
    ("musicgen", MUSICGEN, "decoder.model.decoder.layer_norm", "layernorm"),
    ("pi0", PI0, "dit.norm", "rmsnorm"),
    ("tvp", TVP, "encoder.layer.1.output.layer_norm", "layernorm"),
    ("informer", SERIES, "decoder.layers.1.final_layer_norm", "layernorm"),
    ("autoformer", AUTOFORMER, "decoder.layers.1.final_layer_norm.layernorm", "layernorm"),
    ("fun_asr_nano_encoder", STACKED, "layers.1.final_layernorm", "layernorm"),
    ("seamless_m4t", M4T, "text_decoder.layer_norm", "layernorm"),
]


@pytest.mark.parametrize(
    ("model_type", "config", "path", "family"),
    [pytest.param(*case, id=case[0], marks=[pytest.mark.slow] * (case[0] in SLOW)) for case in CASES],
)
def test_what_the_model_takes_is_offered(model_type, config, path, family):
    found = locate(build_config({"model_type": model_type, **config}))
    assert (found.path, found.family) == (path, family), found.reason


def test_sound_under_the_name_of_patches_is_offered():
    stages = {"num_filters": 8, "downsampling_ratios": [2, 2], "depths": [1, 1, 1], "hidden_size": 32}
    found = locate(build_config({"model_type": "vibevoice_acoustic_tokenizer_encoder", **stages}))
    assert found.family == "none", found.reason  # its norms are inside residual branches


def test_the_words_of_a_model_with_a_head_are_read_at_its_logits():
    qformer = TEXT | {"encoder_hidden_size": 32}
    config = {"vision_config": VISION, "qformer_config": qformer, "text_config": OPT, "num_query_tokens": 4}
    found = locate(build_config({"model_type": "blip-2", **config, "image_token_index": 98}))
    assert found.path == "language_model.model.decoder.final_layer_norm", found.reason


@pytest.mark.parametrize("model_type", ["llama", "vit", "efficientnet", "wav2vec2", "t5", "timesfm"])
def test_no_input_is_offered_twice(model_type):
    """A model that refuses all, or hears none, is run once on each."""
    model = build_model(build_config({"model_type": model_type}), "meta")
    forms = [{name: _form(value) for name, value in inputs.items()} for inputs in minimal_inputs(model, "cpu")]
    assert forms
    assert all(form not in forms[:place] for place, form in enumerate(forms))


def _form(value):
    if not isinstance(value, torch.Tensor):
        return type(value)
    return (value.shape, value.dtype, None if value.is_floating_point() else value.tolist())
