"""Checkpoints that are no safetensors: the norm of each, beside what a user of torch does for it.

`make bench` times them at the sizes that people have; `make test` runs smaller ones once, for what they assert.
"""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.benchmarks.test_classify import classify
from tests.conftest import ROOT
from tests.suite.checkpoints.formats.sharded import save_sharded
from tests.suite.checkpoints.formats.sparse import sparse_torch_file

pytestmark = pytest.mark.subprocess

NORM = "gpt_neox.final_layer_norm"
LOAD = """
import sys, torch
state = torch.load(sys.argv[1], mmap=True, weights_only=True, map_location="cpu")
print(float(state["gpt_neox.final_layer_norm.weight"].double().square().reciprocal().sum()))
"""
CONVERT = """
import sys, torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
state = torch.load(sys.argv[2], mmap=True, weights_only=True, map_location="cpu")["model"]
print(float(state["gpt_neox.final_layer_norm.weight"].double().square().reciprocal().sum()))
"""


def neox(blocks, D, vocabulary):
    """A configuration of GPT-NeoX, and the shapes of its tensors."""
    config = {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "num_attention_heads": 8, "hidden_size": D,
        "num_hidden_layers": blocks, "intermediate_size": 4 * D, "vocab_size": vocabulary,
    }  # fmt: skip
    shapes = {"gpt_neox.embed_in.weight": (vocabulary, D), "embed_out.weight": (vocabulary, D)}
    shapes |= {f"{NORM}.weight": (D,), f"{NORM}.bias": (D,)}
    for block in range(blocks):
        maps = {"attention.query_key_value": (3 * D, D), "attention.dense": (D, D), "mlp.dense_h_to_4h": (4 * D, D),
                "mlp.dense_4h_to_h": (D, 4 * D), "input_layernorm": (D,), "post_attention_layernorm": (D,)}  # fmt: skip
        for name, shape in maps.items():
            shapes |= {
                f"gpt_neox.layers.{block}.{name}.weight": shape,
                f"gpt_neox.layers.{block}.{name}.bias": shape[:1],
            }
    return config, shapes


def printed(code, *arguments):
    """The number that a program prints."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def torch_file(tmp_path_factory, sized):
    """13 GB on the outside, one file; the norm's values, and holes."""
    folder = tmp_path_factory.mktemp("bin")
    config, shapes = neox(*sized((64, 2048, 50_000), (2, 64, 500)))
    (folder / "config.json").write_text(json.dumps(config))
    scales = np.random.default_rng(0).uniform(0.5, 1.5, config["hidden_size"])
    path = sparse_torch_file(folder / "pytorch_model.bin", shapes, {f"{NORM}.weight": scales})
    assert path.stat().st_size > sized(13e9, 0)
    return path, float((1 / scales.astype(np.float32).astype(np.float64) ** 2).sum())


@pytest.mark.benchmark(group="the norm of a 13 GB .bin")
@pytest.mark.parametrize("how", ["deadbench classify", pytest.param("torch.load(mmap=True)", marks=pytest.mark.bench)])
def test_a_torch_file(benchmark, torch_file, how):
    path, inverse = torch_file
    if how.startswith("torch"):
        assert benchmark.pedantic(printed, (LOAD, path), rounds=3) == pytest.approx(inverse, rel=1e-12)
        return
    (found,) = benchmark.pedantic(classify, (path.parent,), rounds=3, warmup_rounds=1)
    assert (found["family"], found["final_norm_tensor"]) == ("layernorm", f"{NORM}.weight")
    assert found["scale_harmonic"] == pytest.approx(found["hidden_size"] / inverse, rel=1e-9)
    assert found["bytes_read"] < 2e6


@pytest.fixture(scope="module")
def many_ranks(tmp_path_factory, sized):
    """The metadata of 64 ranks and 2 000 tensors; of their files, what the norm needs."""
    ranks, blocks = sized((64, 166), (4, 2))
    config, shapes = neox(blocks, 1024, 50_000)
    norms = {name: torch.rand(shape) + 0.5 for name, shape in shapes.items() if name.startswith(NORM)}

    def with_all(metadata):
        for name, shape in shapes.items():
            fqn, height = f"model.{name}", shape[0] // ranks * ranks
            if name in norms or height != shape[0]:
                continue
            chunks = []
            for rank in range(ranks):
                place = torch.Size((rank * height // ranks, *[0] * len(shape[1:])))
                chunks.append(ChunkStorageMetadata(place, torch.Size((height // ranks, *shape[1:]))))
                where = _StorageInfo(f"__{rank}_0.distcp", rank * 1000, 1000)
                metadata.storage_data[MetadataIndex(fqn, place, rank)] = where
            properties = TensorProperties(dtype=torch.float32)
            metadata.state_dict_metadata[fqn] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
            metadata.planner_data[fqn] = ("model", name)
        return metadata

    folder = save_sharded(tmp_path_factory.mktemp("ranks") / "dcp", norms, mesh=(ranks,), change=with_all)
    (folder / "config.json").write_text(json.dumps(config))
    return folder, norms[f"{NORM}.weight"], sized(100_000, 80)


def unpickled(folder):
    """What torch's own reader does first."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    assert isinstance(metadata, Metadata)
    return len(metadata.storage_data)


@pytest.mark.benchmark(group="the norm among 64 ranks and 2 000 tensors")
@pytest.mark.parametrize("how", ["deadbench classify", "torch's unpickling of the metadata alone"])
def test_many_ranks(benchmark, many_ranks, how):
    folder, weight, pieces = many_ranks
    if how.startswith("torch"):
        assert benchmark.pedantic(unpickled, (folder,), rounds=3, warmup_rounds=1) > pieces
        return
    (found,) = benchmark.pedantic(classify, (folder,), rounds=3, warmup_rounds=1)
    harmonic = 1 / float(weight.double().square().reciprocal().mean())
    assert (found["family"], found["source_format"]) == ("layernorm", "torch.distributed.checkpoint")
    assert found["scale_harmonic"] == pytest.approx(harmonic, rel=1e-9)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, sized):
    """A whole checkpoint of two ranks."""
    config, shapes = neox(*sized((8, 1024, 12_000), (2, 64, 500)))
    state = {name: torch.rand(shape) + 0.5 for name, shape in shapes.items()}
    folder = save_sharded(tmp_path_factory.mktemp("sharded") / "dcp", state)
    (folder / "config.json").write_text(json.dumps(config))
    return folder, float(state[f"{NORM}.weight"].double().square().reciprocal().sum())


@pytest.mark.benchmark(group="the norm of a 500 MB checkpoint of torch.distributed")
@pytest.mark.parametrize("how", ["deadbench classify", pytest.param("dcp_to_torch_save", marks=pytest.mark.bench)])
def test_beside_converting_it(benchmark, sharded, how, tmp_path):
    folder, inverse = sharded
    if how.startswith("dcp"):
        assert benchmark.pedantic(printed, (CONVERT, folder, tmp_path / "whole.pt"), rounds=2) == pytest.approx(inverse)
        return
    (found,) = benchmark.pedantic(classify, (folder,), rounds=3, warmup_rounds=1)
    assert found["scale_harmonic"] == pytest.approx(found["hidden_size"] / inverse, rel=1e-9)
