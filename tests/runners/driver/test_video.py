"""Video models of the registry, small: read by the command as they are at their own size."""

import json

import polars as pl
import pytest

from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
PICTURES = {"intermediate_size": 32, "image_size": 16, "num_frames": 4}
VIDEO = {
    "videomae-base": PICTURES | {
        "decoder_num_attention_heads": 2, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 16,
    },
    "vjepa2-vitl-fpc64-256": {
        "crop_size": 16, "frames_per_clip": 4, "pred_hidden_size": 12, "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
    },
    "timesformer-base-finetuned-k400": PICTURES,
}  # fmt: skip
NORMS = {"videomae": "layernorm", "vjepa2": "encoder.layernorm", "timesformer": "layernorm"}


@pytest.fixture(scope="module")
def models():
    published = load_registry(ROOT / "models.yaml")
    extended = [entry.model for entry in published.suites["extended"].entries()]
    assert set(VIDEO) <= set(extended)
    return [published.model(name) for name in VIDEO]


@pytest.mark.slow
def test_a_small_one_of_each_is_read_through_films(models, deadbench, tmp_path, monkeypatch):
    """Two frames in a patch, or one; a class token, or none: rows of whole films, and the kernel of a LayerNorm."""
    monkeypatch.chdir(tmp_path)
    entries = [
        {"id": model.config["model_type"], "modality": model.modality, "family": "layernorm",
         "config": model.config | SMALL | VIDEO[model.id]}
        for model in models
    ]  # fmt: skip
    (tmp_path / "models.yaml").write_text(json.dumps({"models": entries}))
    code, _, err = deadbench("run", "--address", "none", "--reads", "random", "--out", "out")
    assert code == 0, err
    rows = {row["model"]: row for row in pl.read_parquet("out/reads/*.parquet").iter_rows(named=True)}
    assert {name: row["final_norm"] for name, row in rows.items()} == NORMS
    whole = {"videomae": 8, "vjepa2": 8, "timesformer": 17}  # 2 x 2 patches of 2 or 4 times, and a class token
    for name, row in rows.items():
        assert (row["status"], row["family"], row["num_blocks"], row["hidden_size"]) == ("ok", "layernorm", 2, 16)
        assert row["alignment"] > 0.999
        assert row["depth"] > 10
        assert row["num_tokens"] == -(-8 * 16 // whole[name]) * whole[name]
