"""Pieces that ranks wrote are put together to the tensors that were saved; metadata that lie are one line."""

import io
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.tensors import read_raw
from deadbench.suite.errors import CheckpointError
from deadbench.suite.reads.classify import classify
from tests.conftest import TINY_NEOX, save_tiny, write_checkpoint
from tests.suite.checkpoints.formats.memory import as_torch
from tests.suite.checkpoints.formats.sharded import save_sharded
from tests.suite.checkpoints.servers import misbehaving


def states():
    torch.manual_seed(0)
    return {
        "norm.weight": torch.randn(10),
        "map.weight": torch.randn(7, 6, dtype=torch.bfloat16),
        "turned": torch.randn(5, 4).T.contiguous(),
        "small": torch.randn(1),
        "scalar": torch.tensor(3.0),
        "counter": torch.tensor([5], dtype=torch.int64),
        "large": torch.randn(300, 400),
    }


def read(folder):
    checkpoint = Checkpoint(str(folder))
    return {name: as_torch(read_raw(checkpoint, e), e) for name, e in checkpoint.headers().items()}


@pytest.mark.parametrize("key", ["model", "state_dict", None])
@pytest.mark.parametrize("mesh", [(1,), (2,), (3, 2), (64,)])
def test_pieces_are_put_together(mesh, key, tmp_path):
    folder = save_sharded(tmp_path / "c", states(), mesh, key)
    found = read(folder)
    assert found.keys() == states().keys()
    assert all(torch.equal(found[name], value) for name, value in states().items())
    if key == "model" and mesh == (3, 2):  # what is made by hand here is what torch itself reads
        theirs = {"model": {name: torch.zeros_like(value) for name, value in states().items()}}
        with warnings.catch_warnings(action="ignore"):
            dcp.load(theirs, checkpoint_id=folder, no_dist=True)
        assert all(torch.equal(theirs["model"][name], value) for name, value in states().items())


@pytest.mark.filterwarnings("ignore")
def test_what_torch_itself_saves(tmp_path):
    model = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    value = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 77, "lr": 0.5}
    dcp.save(value, checkpoint_id=tmp_path / "c", no_dist=True)
    found = read(tmp_path / "c")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert Checkpoint(str(tmp_path / "c")).contents().step == 77
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "flat", no_dist=True)
    assert read(tmp_path / "flat").keys() == model.state_dict().keys()
    dcp.save(model.state_dict() | {"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "both", no_dist=True)
    assert read(tmp_path / "both").keys() == model.state_dict().keys()


def test_the_plans_that_megatron_keeps_of_each_rank_are_passed_over(tmp_path):
    index = MetadataIndex("norm.weight", torch.Size([0]))
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([10]))
    values = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size([10]))
    items = [
        WriteItem(index, WriteItemType.SHARD, tensor_data=values),
        WriteItem(MetadataIndex("extra"), WriteItemType.BYTE_IO, BytesIOWriteData(7)),
    ]

    def with_plans(metadata):
        metadata.all_local_plans = [SavePlan(items)]
        return metadata

    folder = save_sharded(tmp_path / "c", states(), change=with_plans)
    assert b"SavePlan" in (folder / ".metadata").read_bytes()
    assert torch.equal(read(folder)["norm.weight"], states()["norm.weight"])


@pytest.mark.parametrize("config", ["in it", "above it", "nowhere"])
def test_the_configuration_is_in_the_folder_or_above_it(config, tmp_path):
    tiny = save_tiny(tmp_path / "tiny")
    state = {name: as_torch(read_raw(c, e), e) for c in [Checkpoint(str(tiny))] for name, e in c.headers().items()}
    folder = save_sharded(tmp_path / "run" / "step-5", state, (3,), further=[(("step",), 5)])
    if config != "nowhere":
        shutil.copy(tiny / "config.json", folder if config == "in it" else folder.parent)
    result, _ = classify(str(folder))
    if config == "nowhere":
        assert "no config.json" in result["error"]
        return
    expected, _ = classify(str(tiny))
    assert result["error"] is None
    assert (result["scale_harmonic"], result["final_norm"]) == (expected["scale_harmonic"], expected["final_norm"])
    assert (result["source_format"], result["source_step"]) == ("torch.distributed.checkpoint", 5)
    assert result["bytes_total"] == sum(p.stat().st_size for p in folder.iterdir() if p.name != "config.json")


def test_over_a_web_server_the_norm_alone_is_fetched(tmp_path):
    state = {
        "gpt_neox.final_layer_norm.weight": torch.rand(16) + 0.5,
        "gpt_neox.final_layer_norm.bias": torch.randn(16),
    }
    state |= {f"gpt_neox.layers.{n}.mlp.weight": torch.randn(512, 512) for n in range(8)}
    folder = save_sharded(tmp_path / "c", state, (4,))
    write_checkpoint(folder, TINY_NEOX)
    with misbehaving(folder) as server:
        result, direction_D = classify(server.url)
    assert result["error"] is None
    gamma = state["gpt_neox.final_layer_norm.weight"].double().numpy()
    assert abs(direction_D @ (1 / gamma) / np.linalg.norm(1 / gamma)) == pytest.approx(1, abs=1e-12)
    assert result["bytes_read"] < 200_000 < 8_000_000 < result["bytes_total"]


def changed(folder, change):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def lose_a_chunk(metadata):
    metadata.state_dict_metadata["model.norm.weight"].chunks.pop()


def repeat_a_chunk(metadata):
    chunks = metadata.state_dict_metadata["model.norm.weight"].chunks
    chunks[1] = chunks[0]


def leave_the_tensor(metadata):
    metadata.state_dict_metadata["model.norm.weight"].size = torch.Size([9])


def lose_a_place(metadata):
    del metadata.storage_data[MetadataIndex("model.norm.weight", torch.Size([5]), 1)]


def leave_the_folder(metadata):
    next(iter(metadata.storage_data.values())).relative_path = "../other/__0_0.distcp"


def turn_negative(metadata):
    next(iter(metadata.storage_data.values())).offset = -1


def transformed(metadata):
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]


def of_another_dtype(metadata):
    metadata.state_dict_metadata["model.norm.weight"].properties.dtype = torch.float64


def of_another_tensor(metadata):
    data = metadata.storage_data
    one, other = (
        MetadataIndex(f"model.{n}", torch.Size([0] * d), 0) for n, d in (("norm.weight", 1), ("map.weight", 2))
    )
    data[one] = data[other]


def no_tensors(metadata):
    metadata.state_dict_metadata.clear()


def nothing(metadata):
    metadata.state_dict_metadata = None


def a_function(metadata):
    metadata.planner_data = print


def a_number(metadata):
    metadata.state_dict_metadata["model.norm.weight"] = TensorStorageMetadata(3, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_a_chunk, "do not make it up"),
        (repeat_a_chunk, "do not make it up"),
        (leave_the_tensor, "leaves the tensor"),
        (lose_a_place, "corrupt metadata"),
        (leave_the_folder, "outside the checkpoint folder"),
        (turn_negative, "corrupt metadata"),
        (transformed, "written with .'zstd'"),
        (of_another_dtype, "another tensor than .metadata says"),
        (of_another_tensor, "another tensor than .metadata says"),
        (no_tensors, "no tensors"),
        (nothing, "no metadata of torch.distributed.checkpoint"),
        (a_function, r"names \S*print"),
        (a_number, "corrupt metadata"),
    ],
)
def test_metadata_that_lie_are_one_line(change, message, tmp_path):
    folder = save_sharded(tmp_path / "c", states(), (2,))
    changed(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_a_rank_without_its_file_and_one_cut_short(tmp_path):
    folder = save_sharded(tmp_path / "c", states(), (2,))
    whole = (folder / "__1_0.distcp").read_bytes()
    (folder / "__1_0.distcp").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"__1_0.distcp.*download"):
        read(folder)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0.distcp: no such file"):
        read(folder)


OTHER_NAMES = {
    "Metadata": "megatron.core.dist_checkpointing.strategies.torch MCoreMetadata",
    "TensorProperties": "torch.distributed._shard.sharded_tensor.metadata TensorProperties",
}


class _Renamed(pickle._Pickler):
    """Pickles classes by other names than their own."""

    def save_global(self, value, name=None):
        told = OTHER_NAMES.get(getattr(value, "__name__", None))
        if told is None:
            return super().save_global(value, name)
        self.write(b"c" + told.replace(" ", "\n").encode() + b"\n")
        return self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {type: save_global}


def test_the_names_that_other_versions_give_the_classes(tmp_path):
    folder = save_sharded(tmp_path / "c", states(), (2,))
    file = io.BytesIO()
    _Renamed(file, 2).dump(pickle.loads((folder / ".metadata").read_bytes()))
    assert b"MCoreMetadata" in file.getvalue()
    (folder / ".metadata").write_bytes(file.getvalue())
    assert read(folder).keys() == states().keys()


@pytest.mark.parametrize("raw", [b"", b"\0" * 64, b"no pickle", b"\x80\x04}"])
def test_metadata_that_are_no_pickle_are_said_to_be_damaged_metadata(tmp_path, raw):
    (tmp_path / ".metadata").write_bytes(raw)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="by its name the metadata of torch.distributed.checkpoint, but damaged"):
        read(tmp_path)
