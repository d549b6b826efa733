"""What goes to other programs: read back by safetensors and numpy alone; and the kernel test on a user's own class."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.conftest import TWINS, write_checkpoint
from tests.runners.cli.test_cli import TWIN

OWN_NORMS = """
import torch
from torch import nn

class Centred(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.gain * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

class Uncentred(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return (1 + self.gain) * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

class Tanh(nn.Module):
    def __init__(self, width):
        super().__init__()

    def forward(self, x):
        return x.tanh()

class MeanAbsolute(nn.Module):  # neither, and centred all the same
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        print("called")
        return self.gain * x / x.abs().mean(-1, keepdim=True)

class Raises(nn.Module):
    def __init__(self, width):
        super().__init__()

    def forward(self, x):
        raise KeyError("no such thing")

class Unbuilt(nn.Module):
    def __init__(self, width, groups):
        super().__init__()

def function(width):
    return width
"""


def test_export_is_read_by_safetensors_and_numpy_alone(deadbench, tmp_path):
    out = tmp_path / "d.safetensors"
    assert deadbench("export", TWIN, "-o", out)[:2] == (0, f"{out}: 9 norms\n")
    tensors, stored = load_file(out), load_file(TWINS / "layernorm/step4096/model.safetensors")
    with safe_open(out, "numpy") as file:
        metadata = file.metadata()
    assert metadata["source"] == TWIN
    assert (metadata["final_norm"], metadata["final_norm_tensor"]) == (
        "final_layer_norm",
        "gpt_neox.final_layer_norm.weight",
    )
    assert metadata["layers.2.input_layernorm.family"] == "layernorm"
    assert metadata["layers.2.input_layernorm.role"] == "block"
    norms = [name.removesuffix(".direction") for name in tensors if name.endswith(".direction")]
    assert len(norms) == 9
    rng = np.random.default_rng(0)
    for norm in norms:
        gamma = stored[f"gpt_neox.{norm}.weight"].astype(np.float64)
        v, shift = tensors[f"{norm}.direction"], tensors[f"{norm}.shift"]
        assert np.array_equal(shift, stored[f"gpt_neox.{norm}.bias"].astype(np.float64))
        x = rng.normal(size=(20, 64))
        y = gamma * (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) + shift
        assert np.abs((y - shift) @ v).max() < 1e-14
        assert np.linalg.norm(v) == pytest.approx(1, abs=1e-15)
        assert np.array_equal(tensors[f"{norm}.dead_subspace"], v[:, None])


@pytest.mark.slow
def test_export_of_zero_scales_of_an_rmsnorm_and_of_nothing(deadbench, minilm, tmp_path):
    out = tmp_path / "d.safetensors"
    assert deadbench("export", minilm, "-o", out)[0] == 0
    subspace = load_file(out)["encoder.layer.5.output.LayerNorm.dead_subspace"]
    assert sorted(np.flatnonzero(subspace.sum(1))) == [127, 223, 319]
    assert deadbench("export", TWINS / "rmsnorm/step4096", "-o", out)[0] == 0
    assert {name.rpartition(".")[2] for name in load_file(out)} == {"direction"}
    before = out.read_bytes()
    bare = write_checkpoint(tmp_path / "bare", {"model_type": "gpt_neox"}, {"w": np.ones(3)})
    code, _, error = deadbench("export", bare, "-o", out)
    assert (code, error.count("\n"), "nothing written" in error) == (2, 1, True)
    assert deadbench("export", TWIN, "-o", tmp_path / "no" / "d.safetensors")[0] == 2
    assert out.read_bytes() == before


@pytest.fixture
def own_norms(tmp_path, monkeypatch):
    (tmp_path / "own_norms.py").write_text(OWN_NORMS)
    (tmp_path / "own_broken.py").write_text("raise KeyError('not\\nhere')")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_users_own_norm_is_put_to_the_kernel_test(deadbench, own_norms):
    code, out, _ = deadbench("classify", "--module", "own_norms:Centred", "--json")
    found = json.loads(out)
    assert (code, found["family"], found["kernel"], found["scale"]) == (0, "layernorm", True, "weight")
    assert found["kernel_dimension"] == 1
    assert found["eps"] == pytest.approx(1e-6, rel=1e-3)
    code, out, _ = deadbench("classify", "--module", "own_norms:Uncentred", "--width", "7", "--json")
    found = json.loads(out)
    assert (code, found["family"], found["kernel"], found["scale"]) == (0, "rmsnorm", False, "1+weight")
    code, out, _ = deadbench("classify", "--module", "own_norms:Tanh")
    assert (code, "other, 0 dead of 64 output directions" in out) == (1, True)


def test_a_norm_that_is_neither_family_is_measured_and_one_that_raises_is_told(deadbench, own_norms):
    code, out, error = deadbench("classify", "--module", "own_norms:MeanAbsolute", "--json")
    found = json.loads(out)
    assert (code, found["family"], found["kernel"], found["kernel_dimension"]) == (1, "other", True, 1)
    assert "called" in error, "what the class prints is no part of the answer"
    code, out, _ = deadbench("classify", "--module", "own_norms:Raises")
    assert (code, "cannot be told" in out, "no such thing" in out) == (1, True, True)


@pytest.mark.parametrize(
    ("name", "said"),
    [("own_norms:Missing", "cannot be imported"), ("no_such_package:Norm", "cannot be imported"),
     ("own_broken:Norm", "own_broken:Norm: cannot be imported ("), ("Centred", "write it"),
     ("own_norms:Unbuilt", "Unbuilt(64) fails"), ("own_norms:function", "not a torch.nn")],
)  # fmt: skip
def test_a_class_that_cannot_be_had_is_one_line(deadbench, own_norms, name, said):
    code, out, error = deadbench("classify", "--module", name)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert said in error


def test_classify_wants_a_source_or_a_module_and_not_both(deadbench):
    assert deadbench("classify")[0] == 2
    assert deadbench("classify", TWIN, "--module", "torch.nn:LayerNorm")[0] == 2
    assert deadbench("classify", "--module", "torch.nn:LayerNorm")[0] == 0
