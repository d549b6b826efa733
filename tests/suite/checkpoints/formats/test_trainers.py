"""Folders as training frameworks leave them: the same weights as safetensors, or what is missing in one line."""

import argparse
import io
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deadbench.runners.engines.resident import TorchEngine
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.checkpoints.tensors import read_floats
from deadbench.suite.reads.classify import classify
from tests.conftest import save_tiny
from tests.suite.checkpoints.formats.sharded import save_sharded


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    return folder, load_file(folder / "model.safetensors")


def deepspeed(folder, state):
    below = folder / "global_step40"
    below.mkdir()
    (folder / "latest").write_text("global_step40\n")
    torch.save({"module": state, "global_steps": 40, "ds_version": "0.14"}, below / "mp_rank_00_model_states.pt")
    for rank in range(2):
        torch.save({"optimizer_state_dict": {}}, below / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def deepspeed_zero3(folder, state, ranks=3):
    """As `zero_to_fp32.py` undoes it: each parameter padded to a multiple of the ranks, its runs behind each other."""
    below = folder / "global_step40"
    below.mkdir()
    (folder / "latest").write_text("global_step40")
    names = list(state)
    groups = [names[: len(names) // 2], names[len(names) // 2 :]]
    shapes = [{name: state[name].shape for name in group} for group in groups]
    for rank in range(ranks):
        runs = []
        for group in groups:
            parts = []
            for name in group:
                each = -(-state[name].numel() // ranks)
                padded = torch.nn.functional.pad(state[name].flatten(), (0, each * ranks - state[name].numel()))
                parts.append(padded[rank * each : (rank + 1) * each])
            runs.append(torch.cat(parts))
        start = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"module": {}, "param_shapes": shapes, "global_steps": 40}, below / f"{start}_model_states.pt")
        optimizer = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": runs}
        torch.save({"optimizer_state_dict": optimizer}, below / f"{start}_optim_states.pt")


def deepspeed_zero3_in_part(folder, state, ranks=3):
    """A model of which the second block alone is trained, behind a buffer, with a tensor that another one shares."""
    below = folder / "global_step40"
    below.mkdir()
    (folder / "latest").write_text("global_step40")
    alias, *names = state
    shared = state[alias]
    trained = {name: state[name] for name in names if ".layers.1." in name}
    frozen = {name: state[name].bfloat16().float() for name in names if name not in trained}

    def run(tensor, rank):
        each = -(-tensor.numel() // ranks)
        padded = torch.nn.functional.pad(tensor.flatten(), (0, each * ranks - tensor.numel()))
        return padded[rank * each : (rank + 1) * each].clone()

    for rank in range(ranks):
        start = f"zero_pp_rank_{rank}_mp_rank_00"
        told = {
            "param_shapes": [{name: tensor.shape for name, tensor in trained.items()}],
            "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()}
            | {"source": state[alias].shape},
            "frozen_param_fragments": {name: run(tensor, rank) for name, tensor in frozen.items()}
            | {"source": run(state[alias], rank)},
            "shared_params": {alias: "source"},
            "module": {"running_mean": torch.arange(3.0), names[0]: torch.empty(0)},
            "buffer_names": ["running_mean"],
        }
        torch.save(told, below / f"{start}_model_states.pt")
        groups = [torch.cat([run(tensor, rank) for tensor in trained.values()])]
        optimizer = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": groups}
        torch.save({"optimizer_state_dict": optimizer}, below / f"bf16_{start}_optim_states.pt")
    return frozen | trained | {alias: shared}


def gpt_neox(folder, state):
    below = folder / "global_step40"
    below.mkdir()
    (folder / "latest").write_text("global_step40")
    layers = {0: {"word_embeddings.weight": state["gpt_neox.embed_in.weight"]}}
    layers[5] = {f"norm.{w}": state[f"gpt_neox.final_layer_norm.{w}"] for w in ("weight", "bias")}
    layers[6] = {"final_linear.weight": state["embed_out.weight"]}
    for name, tensor in state.items():
        if name.startswith("gpt_neox.layers."):
            number, _, rest = name.removeprefix("gpt_neox.layers.").partition(".")
            layers.setdefault(int(number) + 2, {})[rest] = tensor
    for number, held in layers.items():
        torch.save(held, below / f"layer_{number:02d}-model_00-model_states.pt")
    torch.save({"global_steps": 40}, below / "mp_rank_00_model_states.pt")


def torch_dist(folder, state):
    """Megatron's distributed form below the folder that its text file names."""
    save_sharded(folder / "iter_0000040", state, (2,), None)
    (folder / "latest_checkpointed_iteration.txt").write_text("40")


FORMS = {
    deepspeed: "deepspeed", deepspeed_zero3: "deepspeed-zero3", gpt_neox: "gpt-neox",
    torch_dist: "torch.distributed.checkpoint",
}  # fmt: skip


@pytest.mark.parametrize("where", ["the folder", "the step's folder"])
@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_those_of_safetensors(form, where, tiny, tmp_path):
    folder, state = tiny
    form(tmp_path, state)
    shutil.copy(folder / "config.json", tmp_path)
    step = "iter_0000040" if form is torch_dist else "global_step40"
    source = tmp_path if where == "the folder" else tmp_path / step
    result, _ = classify(str(source))
    expected, _ = classify(str(folder))
    assert result["error"] is None
    assert (result["scale_harmonic"], result["final_norm"]) == (expected["scale_harmonic"], expected["final_norm"])
    assert result["source_format"] == FORMS[form]
    assert result["source_step"] == (40 if form in (deepspeed, deepspeed_zero3) else None)
    engine = TorchEngine(torch.device("cpu"))
    with Checkpoint(str(folder)).local_copy() as local:
        theirs = engine.load_trained(local, torch.float32).state_dict()
    with Checkpoint(str(source)).local_copy() as local:
        ours = engine.load_trained(local, torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_zero3_of_a_model_that_is_trained_in_part(tiny, tmp_path):
    """What `zero_to_fp32.py` gathers too: frozen parameters, buffers, and what two modules share."""
    expected = deepspeed_zero3_in_part(tmp_path, tiny[1])
    shutil.copy(tiny[0] / "config.json", tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    found = {name: read_floats(checkpoint, entry) for name, entry in checkpoint.headers().items()}
    assert found.pop("running_mean").tolist() == [0.0, 1.0, 2.0]
    assert found.keys() == expected.keys() | {"source"}
    assert all(np.array_equal(found[name], expected[name].double().numpy()) for name in expected)
    last = tmp_path / "global_step40" / "zero_pp_rank_2_mp_rank_00_model_states.pt"
    told = torch.load(last)
    del told["frozen_param_fragments"]["source"]
    torch.save(told, last)
    assert "of source; copy the files of all ranks" in classify(str(tmp_path))[0]["error"]


def test_megatrons_own_folder_and_the_last_stage_of_a_pipeline(tmp_path):
    gamma = torch.rand(16) + 0.5
    args = argparse.Namespace(num_layers=2, hidden_size=16, normalization="RMSNorm", norm_epsilon=1e-6)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("300")
    for stage in range(2):
        below = tmp_path / "iter_0000300" / f"mp_rank_00_{stage:03d}"
        below.mkdir(parents=True)
        model = {"decoder.final_layernorm.weight": gamma} if stage else {"embedding.weight": torch.ones(3, 16)}
        model["decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"of FP8")
        torch.save({"model": model, "args": args, "iteration": 300}, below / "model_optim_rng.pt")
    result, _ = classify(str(tmp_path))
    assert result["error"] is None
    assert (result["family"], result["source_format"], result["source_step"]) == ("rmsnorm", "megatron", 300)
    assert result["scale_harmonic"] == pytest.approx(16 / float((1 / gamma.double() ** 2).sum()), rel=1e-12)
    torch.save({"model": model, "args": args, "of": torch.nn.Linear}, below / "model_optim_rng.pt")
    assert "names torch.nn.modules.linear.Linear" in classify(str(tmp_path))[0]["error"]  # no word of a config.json


def test_megatrons_arguments_that_cannot_be_read(tiny, tmp_path):
    """A configuration from elsewhere makes up for them."""
    torch_dist(tmp_path, tiny[1])
    torch.save({"args": argparse.Namespace(of=torch.nn.Linear)}, tmp_path / "iter_0000040" / "common.pt")
    told = "give --config CONFIG; iter_0000040/common.pt: .*names torch.nn.modules.linear.Linear"
    assert re.search(told, classify(str(tmp_path))[0]["error"])
    shutil.copy(tiny[0] / "config.json", tmp_path)
    result, expected = classify(str(tmp_path))[0], classify(str(tiny[0]))[0]
    assert (result["error"], result["scale_harmonic"]) == (None, expected["scale_harmonic"])


@pytest.mark.parametrize("form", [deepspeed, deepspeed_zero3, gpt_neox, torch_dist])
def test_a_pointer_that_was_not_copied(form, tiny, tmp_path):
    """The only step is meant; of two nobody says which."""
    form(tmp_path, tiny[1])
    shutil.copy(tiny[0] / "config.json", tmp_path)
    pointer = next(path for path in tmp_path.iterdir() if path.name.startswith("latest"))
    pointer.unlink()
    result, expected = classify(str(tmp_path))[0], classify(str(tiny[0]))[0]
    assert (result["error"], result["scale_harmonic"]) == (None, expected["scale_harmonic"])
    (step,) = (path for path in tmp_path.iterdir() if path.is_dir())
    further = step.with_name(step.name + "1")
    shutil.copytree(step, further)
    told = f"in a folder below; give {tmp_path.name}/{step.name} or {tmp_path.name}/{further.name}"
    assert told in classify(str(tmp_path))[0]["error"]
    pointer.write_text(step.name.removeprefix("iter_").lstrip("0"))
    assert classify(str(tmp_path))[0]["scale_harmonic"] == expected["scale_harmonic"]


def test_megatrons_folder_without_its_pointer(tmp_path):
    """It has no config.json either, which the only step's arguments make up for."""
    args = argparse.Namespace(num_layers=2, hidden_size=16, normalization="RMSNorm", norm_epsilon=1e-6)
    for step in (300, 400):
        below = tmp_path / f"iter_{step:07d}" / "mp_rank_00"
        below.mkdir(parents=True)
        model = {"decoder.final_layernorm.weight": torch.full((16,), step / 100)}
        torch.save({"model": model, "args": args, "iteration": step}, below / "model_optim_rng.pt")
    told = f"give {tmp_path.name}/iter_0000300 or {tmp_path.name}/iter_0000400"
    assert told in classify(str(tmp_path))[0]["error"]
    shutil.rmtree(below.parent)
    result, _ = classify(str(tmp_path))
    assert (result["error"], result["source_step"]) == (None, 300)
    assert result["scale_harmonic"] == pytest.approx(9, rel=1e-12)


@pytest.mark.parametrize(
    ("pointer", "message"),
    [("../../etc", "which is no folder of a checkpoint"), ("global_step7", "where no weights are"), ("", "no folder")],
)
def test_a_pointer_to_what_is_not_there(pointer, message, tiny, tmp_path):
    shutil.copy(tiny[0] / "config.json", tmp_path)
    (tmp_path / "latest").write_text(pointer)
    assert message in classify(str(tmp_path))[0]["error"]


def test_a_rank_that_is_missing(tiny, tmp_path):
    folder, state = tiny
    deepspeed_zero3(tmp_path, state)
    shutil.copy(folder / "config.json", tmp_path)
    below = tmp_path / "global_step40"
    (below / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    assert "one of 3 ranks, of which 2 are here" in classify(str(tmp_path))[0]["error"]
    for path in below.glob("*optim*"):
        path.unlink()
    assert "a part of every parameter" in classify(str(tmp_path))[0]["error"]
