"""A checkpoint that is not what its configuration says is refused by every read; what cannot matter is told."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

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
