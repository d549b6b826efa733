"""The final norm of real architectures, tiny: found by what flows out, not by its name."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deadbench.suite.architectures import locate as locate_module
from deadbench.suite.architectures.build import build_config, build_model, build_published, count_parameters
from deadbench.suite.architectures.locate import find_final_norm
from deadbench.suite.architectures.locate import locate_final_norm as locate
from deadbench.suite.architectures.parts import block_list
from deadbench.suite.architectures.stored_names import Naming
from deadbench.suite.errors import ArchitectureError, RemoteCodeError
from deadbench.suite.tracing import smaller_pictures
from deadbench.suite.tracing.minimal_inputs import minimal_inputs

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
OPT = {"vocab_size": 99, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "ffn_dim": 64}
VISION = TEXT | {"image_size": 32, "patch_size": 8}
SEQ2SEQ = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

# (model_type, configuration, path, family, scale, shift, placement)
CASES = [
    ("gpt2", {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4}, "ln_f", "layernorm", "weight", True, "pre"),
    ("gpt_neox", TEXT, "final_layer_norm", "layernorm", "weight", True, "pre"),
    ("llama", TEXT, "norm", "rmsnorm", "weight", False, "pre"),
    ("mixtral", TEXT | {"num_local_experts": 4, "num_key_value_heads": 2}, "norm", "rmsnorm", "weight", False, "pre"),
    ("gemma2", TEXT | {"head_dim": 8, "num_key_value_heads": 2}, "norm", "rmsnorm", "1+weight", False, "pre"),
    ("cohere", TEXT | {"pad_token_id": 0}, "norm", "layernorm", "weight", False, "pre"),
    ("starcoder2", TEXT | {"num_key_value_heads": 2}, "norm", "layernorm", "weight", True, "pre"),
    ("stablelm", TEXT | {"num_key_value_heads": 2}, "norm", "layernorm", "weight", True, "pre"),
    ("nemotron", TEXT | {"num_key_value_heads": 2}, "norm", "layernorm", "1+weight", True, "pre"),
    ("olmo", TEXT, "norm", "layernorm", "implicit-one", False, "pre"),
    ("opt", OPT | {"num_attention_heads": 4}, "decoder.final_layer_norm", "layernorm", "weight", True, "pre"),
    ("bert", TEXT, "encoder.layer.2.output.LayerNorm", "layernorm", "weight", True, "post"),
    (
        "roberta",
        TEXT | {"num_hidden_layers": 11},
        "encoder.layer.10.output.LayerNorm",
        "layernorm",
        "weight",
        True,
        "post",
    ),
    ("t5", T5, "decoder.final_layer_norm", "rmsnorm", "weight", False, "pre"),
    ("bart", SEQ2SEQ, "decoder.layers.1.final_layer_norm", "layernorm", "weight", True, "post"),
    ("vit", VISION, "layernorm", "layernorm", "weight", True, "pre"),
    ("dinov2", VISION, "layernorm", "layernorm", "weight", True, "pre"),
]


BLIP2 = {
    "model_type": "blip-2", "image_token_index": 98, "num_query_tokens": 4,
    "text_config": OPT | {"model_type": "opt", "num_attention_heads": 4},
    "vision_config": VISION,
    "qformer_config": TEXT | {"encoder_hidden_size": 32},
}  # fmt: skip


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_head_of_a_language_model_inside_is_passed_by(device):
    """What comes out last is logits; too large to be tried, the model is on meta, where nothing can be held fixed."""
    found = find_final_norm(build_model(build_config(BLIP2), device))
    assert (found.path, found.family, found.placement, found.num_blocks) == (
        "language_model.model.decoder.final_layer_norm", "layernorm", "pre", 2,
    ), found.reason  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "config", "path", "family", "scale", "shift", "placement"), CASES, ids=[c[0] for c in CASES]
)
def test_final_norm_is_found(model_type, config, path, family, scale, shift, placement):
    found = locate(build_config({"model_type": model_type, **config}))
    assert (found.path, found.family, found.behaviour.scale) == (path, family, scale), found.reason
    assert (found.behaviour.shift_parameter is not None, found.placement) == (shift, placement)
    assert found.hidden_size == 32
    assert found.num_blocks == config.get("num_hidden_layers", config.get("n_layer", 2))
    assert found.evidence


def test_a_model_without_a_final_norm_gets_a_reason_and_no_direction():
    found = locate(build_config({"model_type": "vitdet", "hidden_size": 32, "num_hidden_layers": 2, "image_size": 32,
                                 "num_attention_heads": 4, "patch_size": 8}))  # fmt: skip
    assert (found.path, found.family) == (None, "none")
    assert "no normalisation" in found.reason


def test_a_norm_of_the_pooled_token_is_not_the_final_one():
    found = locate(build_config({"model_type": "clip_vision_model", **VISION}))
    assert (found.path, found.family) == (None, "none")


class Wrapped(nn.Module):
    """As transformers wraps a model of timm: features, and a head that pools them."""

    main_input_name = "pixel_values"

    def __init__(self, model_type, norm):
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type, image_size=8, num_channels=3)
        self.stem, self.norm_pre, self.norm = nn.Conv2d(3, 12, 2, 2), nn.Identity(), norm

    def forward(self, pixel_values):
        stream = self.norm_pre(self.stem(pixel_values))
        pooled = self.norm(stream.mean((2, 3)))
        return {"last_hidden_state": stream, "pooler_output": pooled}


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_of_timms_models_without_a_final_norm_that_of_the_pooled_row_is_told(device):
    """transformers' own that pool alike have none: their last hidden state is what is read."""
    found = find_final_norm(Wrapped("timm_wrapper", nn.LayerNorm(12, 1e-6)).to(device))
    assert (found.path, found.family) == (None, "none")
    pooled = found.pooled
    assert (pooled.path, pooled.family, pooled.placement, pooled.rows_per_item) == ("norm", "layernorm", "pre", 1)
    assert (pooled.behaviour.eps, pooled.hidden_size) == (1e-6, 12)
    assert pooled.reason.startswith("norm normalises what is pooled of a picture, one row each, and is not read, which")
    assert find_final_norm(Wrapped("convnext", nn.LayerNorm(12)).to(device)).pooled is None
    assert find_final_norm(Wrapped("timm_wrapper", nn.Linear(12, 12)).to(device)).pooled is None


def test_a_norm_that_another_follows_is_not_final():
    # Hiera's last stage here is one block that projects its normalised input: all flows through layernorm_before.
    hiera = {"embed_dim": 32, "depths": [1, 1], "num_heads": [1, 2], "query_stride": [2, 2], "masked_unit_size": [2, 2]}
    stages = {"num_query_pool": 1, "image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4]}
    found = locate(build_config({"model_type": "hiera", **hiera, **stages}))
    assert (found.path, found.family) == (None, "none"), found.evidence


NETS = {
    "bit": {"embedding_size": 16, "hidden_sizes": [32, 32, 32, 64], "depths": [1, 1, 1, 1], "num_groups": 4},
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "kernel_sizes": [3, 3], "strides": [1, 2],
                     "in_channels": [32, 16], "out_channels": [16, 24], "num_block_repeats": [1, 1],
                     "expand_ratios": [1, 6], "hidden_dim": 1280, "image_size": 32},
}  # fmt: skip


@pytest.mark.parametrize("model_type", NETS)
def test_a_stream_that_ends_in_a_norm_of_maps_is_neither_a_family_nor_none(model_type):
    found = locate(build_config({"model_type": model_type, **NETS[model_type]}))
    assert (found.path, found.family) == (None, "undetermined")
    assert "neither LayerNorm nor RMSNorm" in found.reason


def test_a_norm_in_a_list_of_norms_belongs_to_the_block_of_its_number():
    found = locate(
        build_config({"model_type": "flaubert", "vocab_size": 99, "emb_dim": 32, "n_layers": 3, "n_heads": 4})
    )
    assert (found.path, found.placement) == ("layer_norm2.2", "post")


def test_norms_of_maps_inside_blocks_are_no_final_norm():
    stages = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    assert locate(build_config({"model_type": "resnet", **stages})).family == "none"


def test_a_q_former_is_given_what_it_attends_to():
    found = locate(build_config({"model_type": "blip_2_qformer", **TEXT, "encoder_hidden_size": 48}))
    assert found.path == "encoder.layer.2.output_query.LayerNorm", found.reason


def test_a_vision_tower_takes_its_patches_in_a_row():
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    found = locate(build_config({"model_type": "cosmos3_edge_vision", **config}))
    assert found.family == "layernorm", found.reason


def test_a_neck_that_normalises_the_channels_of_maps_is_final():
    sam = {"hidden_size": 32, "output_channels": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 64}
    grid = {"image_size": 32, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1], "initializer_range": 0.02}
    found = locate(build_config({"model_type": "sam_hq_vision_model", **sam, **grid}))
    assert (found.path, found.family) == ("vision_encoder.neck.layer_norm2", "layernorm")
    assert (found.hidden_size, found.behaviour.axes_after, found.rows_per_item) == (12, 2, 16)


def test_large_pictures_are_tried_small(monkeypatch):
    """Where a forward pass holds gigabytes, a corner of the picture says what the whole one does."""
    stages = {"embed_dim_per_stage": [16, 32], "num_attention_heads_per_stage": [1, 2], "window_size_per_stage": [4, 4]}
    config = build_config(
        {"model_type": "sam2_hiera_det_model", "hidden_size": 16, "blocks_per_stage": [1, 1], **stages}
        | {"global_attention_blocks": [], "num_query_pool_stages": 1, "image_size": [128, 128]}
    )
    skeleton, whole = build_model(config, "meta"), locate(config)
    given = {"pixel_values": torch.zeros(1, 3, 128, 128)}
    assert not smaller_pictures.returns_much(skeleton, given)
    monkeypatch.setattr(smaller_pictures, "_LARGE_PASS", 1000)
    assert smaller_pictures.returns_much(skeleton, given)
    small = smaller_pictures.smaller_pictures(skeleton, given)
    assert small["pixel_values"].shape == (1, 3, 32, 32)
    seen = []
    monkeypatch.setattr(
        torch.nn.Conv2d, "forward", lambda self, x, run=torch.nn.Conv2d.forward: seen.append(x) or run(self, x)
    )
    assert locate(config) == whole
    assert {each.shape[-1] for each in seen if each.device.type == "cpu"} == {32}


class Films(nn.Module):
    """It takes pictures of one size alone, any number of them, and holds much of each."""

    main_input_name = "pixel_values_videos"

    def __init__(self, norm=None):
        super().__init__()
        self.config = SimpleNamespace(image_size=16, num_channels=3, num_frames=8)
        self.stem, self.norm, self.last = nn.Conv2d(3, 8, 8, 8), norm or nn.Tanh(), nn.Linear(8, 8)

    def forward(self, pixel_values_videos):
        if pixel_values_videos.shape[-1] != 16:
            raise ValueError("another size")
        patches = self.stem(pixel_values_videos.flatten(0, 1)).flatten(2).mT
        return (self.last(self.norm(patches.reshape(len(pixel_values_videos), -1, 8))),)


@pytest.mark.parametrize(("norm", "family", "rows"), [(None, "none", 0), (nn.LayerNorm(8), "layernorm", 32)])
def test_what_one_picture_shows_of_a_film_has_the_films_rows(monkeypatch, norm, family, rows):
    films = Films(norm)
    monkeypatch.setattr(locate_module, "build_model", lambda _: films)
    monkeypatch.setattr(locate_module, "naming", lambda _: Naming())
    skeleton = copy.deepcopy(films).to("meta")
    whole = locate_module.search_without_weights(skeleton, None, "")
    monkeypatch.setattr(smaller_pictures, "_LARGE_PASS", 1000)
    seen = []
    films.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["pixel_values_videos"][0])), with_kwargs=True
    )
    found, inputs = locate_module.search_without_weights(skeleton, None, "")
    assert (found.family, found.rows_per_item) == (family, rows)
    assert found == whole[0]
    assert inputs.keys() == whole[1].keys()
    assert set(seen) == {1}


class Pairs(Films):
    """It returns two streams, of which none is said to be the last."""

    def forward(self, pixel_values_videos):
        (stream,) = super().forward(pixel_values_videos)
        return {"left": stream, "right": stream + 1}


class Asking(Pairs):
    """It looks at a value first."""

    def forward(self, pixel_values_videos):
        if pixel_values_videos.sum() > 1e9:
            raise ValueError("too bright")
        return super().forward(pixel_values_videos)


@pytest.mark.parametrize("large_pass", [2**40, 1000])
@pytest.mark.parametrize(
    ("kind", "pictures"), [(Pairs, {2**40: set(), 1000: set()}), (Asking, {2**40: {8}, 1000: {1}})]
)
@pytest.mark.parametrize(
    ("norm", "reason"),
    [(nn.LayerNorm(8), "{} returns no last hidden state"), (nn.Tanh(), "no module of {} normalises")],
)
def test_that_there_is_no_stream_is_not_asked_again(monkeypatch, kind, pictures, large_pass, norm, reason):
    """The pass without values told it, where it answered no question; else one picture of a film does."""
    pairs = kind(norm)
    monkeypatch.setattr(locate_module, "build_model", lambda _: pairs)
    monkeypatch.setattr(locate_module, "naming", lambda _: Naming())
    monkeypatch.setattr(smaller_pictures, "_LARGE_PASS", large_pass)
    skeleton = copy.deepcopy(pairs).to("meta")
    seen = []
    pairs.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["pixel_values_videos"][0])), with_kwargs=True
    )
    found, inputs = locate_module.search_without_weights(skeleton, None, "")
    assert found.reason == find_final_norm(pairs).reason == reason.format(kind.__name__)
    assert list(inputs) == ["pixel_values_videos"]
    assert set(seen[: len(seen) - 1]) == pictures[large_pass]  # the last is find_final_norm's


def test_of_a_film_one_picture_is_tried():
    given = {"pixel_values_videos": torch.zeros(1, 8, 3, 16, 16)}
    small = smaller_pictures.smaller_pictures(Films().to("meta"), given)
    assert small["pixel_values_videos"].shape == (1, 1, 3, 16, 16)


class Refuses(nn.Module):
    """It runs its blocks, and then takes none of what it was given."""

    def __init__(self, blocks):
        super().__init__()
        self.config, self.runs = SimpleNamespace(), 0
        self.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(blocks)))

    def forward(self, hidden_states, input_ids=None, attention_mask=None, bbox=None, use_cache=None):
        self.runs += 1
        self.blocks(torch.zeros(1, 8))
        raise ValueError("no input of mine")


@pytest.mark.parametrize(("blocks", "all_tried"), [(1, True), (100, False)])
def test_a_model_that_refuses_every_input_late_is_left_alone(blocks, all_tried, monkeypatch):
    monkeypatch.setattr(locate_module, "_FAILED_CALLS", 200)
    monkeypatch.setattr(locate_module, "_FAILED_PASSES", 3)
    model = Refuses(blocks)
    found = find_final_norm(model)
    assert found.reason == "no minimal input was of use: ValueError: no input of mine"
    assert (model.runs == len(list(minimal_inputs(model)))) is all_tried


def test_a_model_that_nothing_is_known_for_is_not_drawn(monkeypatch):
    """What is tried without values is what would be tried with them: nothing."""
    monkeypatch.setattr(Refuses, "forward", lambda self, nonesuch: None)
    monkeypatch.setattr(locate_module, "build_model", lambda *_: pytest.fail("drawn"))
    monkeypatch.setattr(locate_module, "naming", lambda _: Naming())
    found, inputs = locate_module.search_without_weights(Refuses(1).to("meta"), None, "")
    assert (found.family, inputs) == ("undetermined", None)


def test_a_block_that_normalises_channels_before_positions_ends_in_its_norm():
    found = locate(build_config({"model_type": "squeezebert", **TEXT, "embedding_size": 32}))
    assert (found.path, found.family) == ("encoder.layers.2.output.layernorm", "layernorm"), found.reason
    assert (found.placement, found.hidden_size, found.behaviour.axes_after) == ("post", 32, 1)


def test_a_codec_without_norms_has_no_final_one():
    dac = {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "decoder_hidden_size": 32, "n_codebooks": 2,
           "codebook_size": 32, "codebook_dim": 8}  # fmt: skip
    found = locate(build_config({"model_type": "dac", **dac}))
    assert (found.path, found.family) == (None, "none"), found.reason


class Codec(nn.Module):
    """Its codebook is drawn as zeros: whatever it is given, the same comes out."""

    def __init__(self, last):
        super().__init__()
        self.config, self.last = SimpleNamespace(), last
        self.codebook = nn.Parameter(torch.zeros(7, 8))

    def forward(self, input_values):
        distance = (input_values[:, :5, None, None] - self.codebook).square().sum(-1)
        return (self.last(self.codebook[distance.argmin(-1)]),)


@pytest.mark.parametrize(("first", "family"), [(nn.Tanh(), "none"), (nn.LayerNorm(8), "layernorm")])
def test_a_codec_with_an_empty_codebook_is_heard_with_a_full_one(first, family):
    torch.manual_seed(0)
    codec = Codec(nn.Sequential(first, nn.Linear(8, 8)))
    found = find_final_norm(codec)
    assert found.family == family, found.reason
    assert not codec.codebook.any()  # it was filled in a copy


def test_a_picture_below_its_prompt_is_half_as_high_as_their_sum():
    seggpt = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 64, "merge_index": 0}
    grid = {"image_size": [64, 32], "patch_size": 8, "pretrain_image_size": 32, "decoder_hidden_size": 16}
    states = {"intermediate_hidden_state_indices": [0, 1]}
    assert locate(build_config({"model_type": "seggpt", **seggpt, **grid, **states})).family == "none"


def test_how_outputs_are_packed_does_not_matter():
    towers = {"text_config": TEXT, "vision_config": VISION}
    found = locate(build_config({"model_type": "siglip", **towers, "return_dict": False}))
    assert found.path == "text_model.final_layer_norm", found.reason


def test_opt_without_its_final_norm_is_none():
    config = OPT | {"model_type": "opt", "num_attention_heads": 4, "_remove_final_layer_norm": True}
    assert locate(build_config(config)).path is None


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ArchitectureError, "no model_type"),
        ({"model_type": "nonesuch"}, ArchitectureError, "'nonesuch' is unknown to transformers"),
        ({"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}, RemoteCodeError, "never run"),
        ({"model_type": "llama", "hidden_size": "wide"}, ArchitectureError, "refuses the configuration"),
    ],
)
def test_bad_configurations(config, error, message):
    with pytest.raises(error, match=message):
        build_config(config)


def test_blocks_are_those_of_the_final_norms_own_tower():
    model = build_model(build_config({"model_type": "bart", **SEQ2SEQ, "encoder_layers": 5}), "meta")
    assert block_list(model, "decoder.layers.1.final_layer_norm") == ("decoder.layers", 2)
    assert block_list(model, None)[1] == 5


def test_parameters_are_those_of_the_published_architecture_with_ties_once():
    config = {"model_type": "gpt2", "vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
    base = count_parameters(build_published(build_config(config), "meta"))
    assert (
        count_parameters(build_published(build_config(config | {"architectures": ["GPT2LMHeadModel"]}), "meta")) == base
    )
    untied = config | {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": False}
    assert count_parameters(build_published(build_config(untied), "meta")) == base + 99 * 32
