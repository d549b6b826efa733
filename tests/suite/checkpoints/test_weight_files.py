"""Of several files of weights in one folder, every read takes the one that transformers loads."""

import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.engines.streaming import StreamingEngine
from deadbench.runners.results.directions_file import export_directions
from deadbench.suite.checkpoints.adapters import open_checkpoint
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE
from deadbench.suite.errors import CheckpointError
from deadbench.suite.reads.classify import classify
from deadbench.suite.reads.norms_table import list_norms
from deadbench.suite.reads.parameters import read_parameters
from tests.conftest import save_tiny
from tests.suite.checkpoints.servers import misbehaving

SCALES = {"single": 2.0, "index": 3.0, "bin": 5.0, "fp16": 7.0, "named": 11.0}
PRESENT = [each for n in range(1, 5) for each in itertools.combinations(("single", "index", "bin", "fp16"), n)]


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    return folder / "config.json", load_file(folder / SINGLE_FILE)


def lay_out(folder, tensors, kinds, below=""):
    """A folder with these kinds of files; all norm scales of a kind are its number in SCALES."""
    config, stored = tensors
    folder.mkdir()
    shutil.copy(config, folder)
    for kind in kinds:
        wanted = {n: torch.full_like(t, SCALES[kind]) if "norm.weight" in n else t for n, t in stored.items()}
        if kind == "single":
            save_file(wanted, folder / SINGLE_FILE, metadata={"format": "pt"})
        elif kind == "fp16":
            half = {name: tensor.half() for name, tensor in wanted.items()}
            save_file(half, folder / "model.fp16.safetensors", metadata={"format": "pt"})
        elif kind == "bin":
            torch.save(wanted, folder / "pytorch_model.bin")
        else:
            index = INDEX_FILE if kind == "index" else "other.safetensors.index.json"
            (folder / below).mkdir(exist_ok=True, parents=True)
            weight_map = {n: f"{below}{kind}-{i % 2 + 1:05d}-of-00002.safetensors" for i, n in enumerate(wanted)}
            for shard in set(weight_map.values()):
                held = {n: t for n, t in wanted.items() if weight_map[n] == shard}
                save_file(held, folder / shard, metadata={"format": "pt"})
            (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def scale_of(model):
    [scale] = {float(t) for n, p in model.named_parameters() if n.endswith("norm.weight") for t in p}
    return scale


def loaded(folder):
    """What transformers loads, by itself; None where it refuses."""
    try:
        return scale_of(AutoModel.from_pretrained(folder, dtype=torch.float32))
    except OSError:
        return None


def read_everywhere(folder, out):
    """The scale that each kind of read finds."""
    checkpoint = Checkpoint(str(folder))
    read = read_parameters(checkpoint)
    found = {"parameters": float(read.norm.scale_D[0])}
    found |= {f"norms {row['norm']}": row["scale_max"] for row in list_norms(checkpoint, read)}
    with checkpoint.local_copy() as local:
        found["trained"] = scale_of(TorchEngine(torch.device("cpu")).load_trained(local, torch.float32))
        engine = StreamingEngine(torch.device("cpu"))
        model = engine.load_trained(local, torch.float32)
        found["streaming"] = float(model.final_layer_norm.weight[0])
        for block in engine._blocks.values():
            block.load(block.fetch(name) for _, _, name in block.absent)
            found["streamed"] = float(block.module.input_layernorm.weight[0])
            block.drop()
        if checkpoint.weights().format.name == "torch":  # which vLLM does not get
            assert not list(local.glob("*.safetensors"))
            assert export_directions(str(folder), out) == 5
            return found
        # vLLM opens each of these that an index does not exclude
        names = {p.name for p in local.glob("*.safetensors")}
        index = local / INDEX_FILE
        listed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else names
        stored = {n: t for name in names & listed for n, t in load_file(local / name).items()}
        found["vLLM's files"] = float(stored["gpt_neox.final_layer_norm.weight"][0])
        assert len(names & listed) == len(checkpoint.weights().shards)
    assert export_directions(str(folder), out) == 5
    assert torch.equal(load_file(out)["final_layer_norm.direction"], torch.full((16,), 0.25, dtype=torch.float64))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kinds", PRESENT, ids="+".join)
def test_every_read_takes_the_file_that_transformers_loads(kinds, tensors, tmp_path):
    folder = lay_out(tmp_path / "m", tensors, kinds)
    theirs = loaded(folder)
    result, _ = classify(str(folder))
    # A half-precision file alone is not loaded without being asked for; there is no other that it could be.
    expected = theirs or SCALES[kinds[0]]
    assert (theirs is None) == (kinds == ("fp16",))
    assert set(read_everywhere(folder, tmp_path / "out.safetensors").values()) == {expected}
    files = {"single": [SINGLE_FILE], "fp16": ["model.fp16.safetensors"], "bin": ["pytorch_model.bin"]}
    [kind] = [kind for kind, scale in SCALES.items() if scale == expected]
    opened = files.get(kind) or [f"index-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert result["source_format"] == ("torch" if kind == "bin" else "safetensors")
    assert result["bytes_total"] == sum((folder / name).stat().st_size for name in opened)
    before = Checkpoint(str(folder)).fingerprint()
    os.utime(folder / opened[-1], ns=(1, 1))
    assert Checkpoint(str(folder)).fingerprint() != before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", ["other.safetensors.index.json", "below/one.safetensors"])
def test_a_file_that_the_configuration_names_comes_first(named, tensors, tmp_path):
    folder = lay_out(tmp_path / "m", tensors, ("single", "named"), "below/")
    if named.endswith("/one.safetensors"):
        whole = {n: t for shard in (folder / "below").iterdir() for n, t in load_file(shard).items()}
        save_file(whole, folder / named, metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"transformers_weights": named}))
    assert loaded(folder) == SCALES["named"]
    assert set(read_everywhere(folder, tmp_path / "out.safetensors").values()) == {SCALES["named"]}
    for wrong, message in (("../m/model.safetensors", "outside the checkpoint"), ("x.safetensors", "is missing")):
        (folder / "config.json").write_text(json.dumps(content | {"transformers_weights": wrong}))
        assert message in classify(str(folder))[0]["error"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_an_adapter_beside_whole_weights_is_put_on_them_by_no_read(ending, tensors, tmp_path):
    peft = pytest.importorskip("peft")
    folder = lay_out(tmp_path / "m", tensors, ("single",))
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query_key_value"], modules_to_save=["final_layer_norm"])
    )
    adapted.save_pretrained(folder, safe_serialization=ending == ".safetensors")
    assert (folder / f"adapter_model{ending}").exists()
    assert set(read_everywhere(folder, tmp_path / "out.safetensors").values()) == {SCALES["single"]}
    with open_checkpoint(str(folder)).local_copy() as local:
        loaded = TorchEngine(torch.device("cpu")).load_trained(local, torch.float32)
    assert not [name for name, _ in loaded.named_parameters() if "lora" in name]
    assert "without the adapter that lies beside them" in str(open_checkpoint(str(folder)).remark)
    assert open_checkpoint(str(folder / SINGLE_FILE)).remark is None


@pytest.mark.filterwarnings("ignore")
def test_what_a_configuration_names_elsewhere_is_not_loaded(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    folder = lay_out(tmp_path / "m", tensors, ("single",))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"attn_implementation": "nobody/kernel"}))
    assert classify(str(folder))[0]["error"].endswith("code from elsewhere, which is never run; take the key out")
    (folder / "config.json").write_text(json.dumps({"model_type": "edgetam"}))  # whose default names a repository
    with pytest.raises(CheckpointError, match=r"to be fetched from huggingface\.co; nothing is"):
        TorchEngine(torch.device("cpu")).load_trained(folder, torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("below", ["weights/", "./weights/"])
def test_shards_in_a_subfolder_are_read_and_what_fails_names_the_folder(below, tensors, tmp_path):
    folder = lay_out(tmp_path / "m", tensors, ("index",), below)
    assert loaded(folder) == SCALES["index"]
    assert set(read_everywhere(folder, tmp_path / "out.safetensors").values()) == {SCALES["index"]}
    before = Checkpoint(str(folder)).fingerprint()
    os.utime(folder / "weights/index-00002-of-00002.safetensors", ns=(1, 1))
    assert Checkpoint(str(folder)).fingerprint() != before
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 3}))
    refused = pytest.raises(CheckpointError, match=rf"^{folder}: the weights lack")
    with refused, Checkpoint(str(folder)).local_copy() as local:
        TorchEngine(torch.device("cpu")).load_trained(local, torch.float32)


def test_shards_in_a_subfolder_of_a_bucket_are_read_and_copied(tensors, tmp_path):
    import fsspec

    folder = lay_out(tmp_path / "m", tensors, ("index",), "weights/")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/deadbench-shards", recursive=True)
    try:
        checkpoint = Checkpoint("memory://deadbench-shards")
        assert float(read_parameters(checkpoint).norm.scale_D[0]) == SCALES["index"]
        with checkpoint.local_copy() as local:
            assert scale_of(AutoModel.from_pretrained(local)) == SCALES["index"]
    finally:
        memory.rm("/deadbench-shards", recursive=True)


@pytest.mark.parametrize(("kinds", "below"), [(("single", "index"), ""), (("index",), "weights/")])
def test_a_web_server_without_listings_is_read_the_same(kinds, below, tensors, tmp_path):
    folder = lay_out(tmp_path / "m", tensors, kinds, below)
    with misbehaving(folder) as server:
        checkpoint = Checkpoint(server.url)
        assert float(read_parameters(checkpoint).norm.scale_D[0]) == SCALES[kinds[0]]
        with checkpoint.local_copy() as local:
            assert scale_of(AutoModel.from_pretrained(local)) == SCALES[kinds[0]]
        asked = {name for name, _ in server.requests}
    assert any(name.startswith("index-") for name in asked) == (kinds == ("index",) and not below)
