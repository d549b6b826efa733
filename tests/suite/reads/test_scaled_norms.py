"""Pairs with a planted scaling: turned with all that a norm feeds, one map or the shift left as it was, and noise."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deadbench.suite.checkpoints.adapters import open_checkpoint
from deadbench.suite.reads.dequantised import map_values
from deadbench.suite.reads.scaled_norms import scaled_norms
from tests.conftest import TINY_NEOX, save_tiny

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 97, "n_embd": 16, "n_layer": 2,
    "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# Of each architecture a norm of its second block, by its stored name, and the maps that it feeds.
FEEDS = {
    "gpt_neox": ("gpt_neox.layers.1.input_layernorm", ["gpt_neox.layers.1.attention.query_key_value"]),
    "llama": ("model.layers.1.input_layernorm", [f"model.layers.1.self_attn.{each}_proj" for each in "qkv"]),
    "gpt2": ("transformer.h.1.ln_2", ["transformer.h.1.mlp.c_fc"]),
}
CONFIGS = {"gpt_neox": TINY_NEOX | {"hidden_size": 64, "intermediate_size": 64}, "llama": LLAMA, "gpt2": GPT2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return {name: save_tiny(root / name, config) for name, config in CONFIGS.items()}


def scaled(base, folder, architecture, left=(), change=None, quantization=None):
    """The base with the scale of one norm moved into what it feeds but what is `left`; and s."""
    norm, maps = FEEDS[architecture]
    state = load_file(base / "model.safetensors")
    s = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 3, len(state[f"{norm}.weight"]))).float()
    for name in (f"{norm}.weight", f"{norm}.bias"):
        if name in state and name not in left:
            state[name] = state[name] / s
    for path in maps:
        if path not in left:
            weight = state[f"{path}.weight"]
            state[f"{path}.weight"] = weight * (s[:, None] if architecture == "gpt2" else s)
    state = change(state) if change else state
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    config |= {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder, s


def compared(one, other):
    return {norm.norm: norm for norm in scaled_norms(*(open_checkpoint(str(each)) for each in (one, other)))}


def bare(path):
    return path.split(".", 1)[1]


def angle(one, other):
    u, v = (1 / np.asarray(each, np.float64) for each in (one, other))
    return np.degrees(np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v)))


@pytest.mark.parametrize("architecture", FEEDS)
def test_a_norm_turns_as_its_maps_say(architecture, bases, tmp_path):
    base = bases[architecture]
    other, s = scaled(base, tmp_path / "scaled", architecture)
    norm, maps = FEEDS[architecture]
    found = compared(base, other)
    one = found.pop(bare(norm))
    scale = load_file(base / "model.safetensors")[f"{norm}.weight"]
    assert (one.verdict, one.scaled, one.unscaled, one.unknown) == ("turned", maps, [], [])
    assert one.angle == pytest.approx(angle(scale, scale / s), rel=1e-5)
    assert one.predicted_angle < 1e-3 < 1 < one.angle
    assert {each.verdict for each in found.values()} == {"same"}
    assert {each.angle for each in found.values()} == {0}


@pytest.mark.parametrize("architecture", FEEDS)
def test_a_map_that_is_left_unscaled_is_named(architecture, bases, tmp_path):
    left = FEEDS[architecture][1][-1]
    one = compared(bases[architecture], scaled(bases[architecture], tmp_path / "left", architecture, [left])[0])
    found = one[bare(FEEDS[architecture][0])]
    assert (found.verdict, found.unscaled) == ("broken", [left])
    assert len(found.scaled) == len(FEEDS[architecture][1]) - 1


def test_a_shift_that_is_left_unscaled_is_named(bases, tmp_path):
    norm = FEEDS["gpt_neox"][0]
    other, _ = scaled(bases["gpt_neox"], tmp_path / "left", "gpt_neox", [f"{norm}.bias"])
    one = compared(bases["gpt_neox"], other)[bare(norm)]
    assert (one.verdict, one.unscaled) == ("broken", [f"{bare(norm)}.bias"])


def test_a_map_that_is_scaled_where_its_norm_is_not_is_named(bases, tmp_path):
    norm, maps = FEEDS["llama"]
    one = compared(bases["llama"], scaled(bases["llama"], tmp_path / "left", "llama", [f"{norm}.weight"])[0])[
        bare(norm)
    ]
    assert (one.verdict, one.unscaled, one.angle) == ("broken", maps, 0)


def gptq(state, names, bits=4, group=16):
    """Maps as GPTQ packs them: rounded, by groups of inputs, zeros less one."""
    for path in names:
        weight = state.pop(f"{path}.weight")
        scales = weight.reshape(len(weight), -1, group).abs().amax(-1) / 7
        numbers = (weight / scales.repeat_interleave(group, 1)).round().clamp(-8, 7).int() + 8
        state[f"{path}.scales"] = scales.T.contiguous()
        state[f"{path}.qweight"] = along(numbers.T, 0)
        state[f"{path}.qzeros"] = along(torch.full(scales.T.shape, 7), 1)
        state[f"{path}.g_idx"] = (torch.arange(weight.shape[1]) // group).int()
    return state


def awq(state, names, group=16):
    """The same as AWQ packs them: eight outputs to an int32, in its order."""
    for path in names:
        weight = state.pop(f"{path}.weight")
        scales = weight.reshape(len(weight), -1, group).abs().amax(-1) / 7
        numbers = (weight / scales.repeat_interleave(group, 1)).round().clamp(-8, 7).int() + 8
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        turned = numbers.T.reshape(weight.shape[1], -1, 8)[:, :, order].reshape(weight.shape[1], -1)
        state[f"{path}.scales"] = scales.T.contiguous()
        state[f"{path}.qweight"] = along(turned, 1)
        state[f"{path}.qzeros"] = along(torch.full(scales.T.shape, 8), 1)
    return state


def along(numbers, axis):
    """Eight numbers of four bits to an int32 along an axis, the lowest bits first."""
    each = numbers.long().movedim(axis, -1).reshape(*numbers.movedim(axis, -1).shape[:-1], -1, 8)
    whole = (each << (4 * torch.arange(8))).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int().movedim(-1, axis).contiguous()


def fp8(state, names):
    for path in names:
        weight = state[f"{path}.weight"]
        scale = weight.abs().amax(1, keepdim=True) / 448
        state |= {f"{path}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{path}.weight_scale": scale}
    return state


def int4(state, names, group=16):
    """As compressed-tensors packs them: eight inputs to an int32, offset by eight."""
    for path in names:
        weight = state.pop(f"{path}.weight")
        scales = weight.reshape(len(weight), -1, group).abs().amax(-1) / 7
        numbers = (weight / scales.repeat_interleave(group, 1)).round().clamp(-8, 7).int() + 8
        state |= {f"{path}.weight_packed": along(numbers, 1), f"{path}.weight_scale": scales}
        state[f"{path}.weight_shape"] = torch.tensor(weight.shape)
    return state


PACKED = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4}, 0.08),
    "awq": (awq, {"quant_method": "awq", "bits": 4}, 0.08),
    "fp8": (fp8, {"quant_method": "fp8"}, 0.07),
    "int4": (
        int4,
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
        0.08,
    ),
}


@pytest.mark.parametrize("method", PACKED)
def test_packed_maps_tell_too(method, bases, tmp_path):
    pack, settings, worst = PACKED[method]
    norm, maps = FEEDS["llama"]
    plain = load_file(bases["llama"] / "model.safetensors")[f"{maps[0]}.weight"]
    for left, verdict in (((), "turned"), (maps[1:2], "broken")):
        folder = tmp_path / f"{method}-{len(left)}"
        other, s = scaled(bases["llama"], folder, "llama", left, lambda state: pack(state, maps), settings)
        one = compared(bases["llama"], other)[bare(norm)]
        assert (one.verdict, one.unscaled, one.unknown) == (verdict, list(left), [])
    assert one.angle > 1
    checkpoint = open_checkpoint(str(other))
    values = map_values(checkpoint, checkpoint.headers(), maps[0], settings, 24)
    expected = (plain * s)[:24].double().numpy()
    assert values.shape == expected.shape
    assert np.abs(values - expected).max() < worst * np.abs(expected).max()


def test_what_is_packed_in_a_way_that_is_not_known_cannot_be_told(bases, tmp_path):
    def pack(state):
        for path in FEEDS["llama"][1]:
            weight = state.pop(f"{path}.weight")
            state[f"{path}.weight"] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
            state[f"{path}.weight.absmax"] = torch.ones(8)
        return state

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    other, _ = scaled(bases["llama"], tmp_path / "bnb", "llama", (), pack, settings)
    one = compared(bases["llama"], other)[bare(FEEDS["llama"][0])]
    assert (one.verdict, one.unknown, one.predicted_angle) == ("cannot tell", FEEDS["llama"][1], None)


def test_noise_as_large_as_the_turn_cannot_be_told(bases, tmp_path):
    def spoil(state):
        generator = torch.Generator().manual_seed(1)
        for path in FEEDS["llama"][1]:
            weight = state[f"{path}.weight"]
            state[f"{path}.weight"] = weight + 20 * weight.std() * torch.randn(weight.shape, generator=generator)
        return state

    one = compared(bases["llama"], scaled(bases["llama"], tmp_path / "noise", "llama", (), spoil)[0])
    assert one[bare(FEEDS["llama"][0])].verdict == "cannot tell"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounding_to_what_the_candidate_is_stored_in_is_no_turn(dtype, bases, tmp_path):
    base, _ = scaled(bases["llama"], tmp_path / "base", "llama", ["model.layers.1.self_attn.q_proj"])
    other, _ = scaled(base, tmp_path / "rounded", "llama", (), lambda _: {})
    state = load_file(base / "model.safetensors")
    save_file({name: each.to(dtype) for name, each in state.items()}, other / "model.safetensors")
    found = compared(base, other)
    assert {each.verdict for each in found.values()} == {"same"}
    assert found[bare(FEEDS["llama"][0])].angle > 1e-3


def test_two_models_are_no_pair(bases):
    with pytest.raises(ValueError, match="give two checkpoints of one model"):
        compared(bases["llama"], bases["gpt2"])
