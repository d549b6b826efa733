"""The same weights in every format give the same rows, to the bit, and nothing of a checkpoint is run."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from deadbench.runners.engines.resident import TorchEngine
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.worker.run import run_model
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.errors import CheckpointError
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, save_tiny
from tests.suite.checkpoints.formats.sharded import save_sharded

APART = {
    "run_id", "model", "source", "source_fingerprint", "source_format", "source_step", "checkpoint_step", "started_at",
    "finished_at", "load_seconds", "forward_seconds", "spectrum_seconds", "peak_host_bytes",
}  # fmt: skip


def rows(source, reads=("parameters", "trained", "functional"), **overrides):
    """What `deadbench run SOURCE` stores: by read, its row of `reads` and its further tables."""
    spec = Overrides(**{"tokens": 64, "input": "tokens:random"} | overrides)
    registry = ROOT / "models.yaml"
    jobs = build_jobs(load_registry(registry), registry, [str(source)], None, list(reads), spec)
    found = {}
    for job in jobs:
        for event in run_model(job, "run", 1):
            if isinstance(event, Finished):
                assert event.row["status"] == "ok", event.row["error"]
                tables = {name: table.to_pylist() for name, table in event.tables.items()}
                kept = [{k: v for k, v in each.items() if k not in APART} for t in tables.values() for each in t]
                found[event.job.read] = (event.row, kept)
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("formats") / "safetensors")
    return folder, load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def expected(tiny):
    return rows(tiny[0])


def as_bin(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def as_old(folder, state):
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


def as_shards(folder, state):
    weight_map = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        torch.save({n: t for n, t in state.items() if weight_map[n] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def as_safe_shards(folder, state):
    """An index without `metadata`, as tools that cut weights write it."""
    weight_map = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        held = {name: tensor.contiguous() for name, tensor in state.items() if weight_map[name] == shard}
        save_file(held, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def as_training_checkpoint(folder, state):
    wrapped = {f"_forward_module._orig_mod.{name}": tensor for name, tensor in state.items()}
    (folder / "beside.bin").write_bytes(b"other weights, which are not meant")
    torch.save({"state_dict": wrapped, "global_step": 42, "hyper_parameters": {"lr": 0.1}}, folder / "last.ckpt")
    return folder / "last.ckpt"


def as_script(folder, state):
    """A module of a training script holds the model as its attribute, as those of Lightning do."""
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, folder / "last.ckpt")
    return folder / "last.ckpt"


def as_average(folder, state):
    """An average and a loss beside the model."""
    average = {f"ema_model.{name}": tensor * 1.5 for name, tensor in state.items()}
    wrapped = {f"model._orig_mod.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": {**average, "loss.weight": torch.ones(7), **wrapped}}, folder / "last.pth.tar")
    return folder / "last.pth.tar"


def as_application(folder, state):
    """torch's Stateful application: model and optimizer below one key."""
    optimizer = {f"app.optim.state.{name}.exp_avg": torch.zeros_like(tensor) for name, tensor in state.items()}
    return save_sharded(folder, {f"app.model.{name}": t for name, t in state.items()} | optimizer, (2,), None)


def as_one_file(folder, state):
    shutil.copy(folder.parent / "safetensors" / "model.safetensors", folder / "some.safetensors")
    shutil.copy(folder.parent / "safetensors" / "model.safetensors", folder / "other.safetensors")
    return folder / "some.safetensors"


def as_distributed(folder, state):
    return save_sharded(folder, state, (3, 2), "model", [(("step",), 42)])


DISTRIBUTED = "torch.distributed.checkpoint"
FORMATS = {
    as_one_file: "safetensors",
    as_safe_shards: "safetensors",
    as_distributed: DISTRIBUTED,
    as_application: DISTRIBUTED,
}


@pytest.mark.parametrize(
    "form",
    [
        as_distributed, as_bin, as_old, as_shards, as_training_checkpoint, as_script, as_average, as_application,
        as_one_file, as_safe_shards,
    ],
)  # fmt: skip
def test_rows_are_those_of_safetensors_to_the_bit(form, tiny, expected):
    folder, state = tiny
    there = folder.parent / form.__name__
    there.mkdir()
    shutil.copy(folder / "config.json", there)
    found = rows(form(there, state))
    for read, (row, kept) in found.items():
        called = [each.pop("final_norm_tensor", None) for each in kept]
        assert all(name is None or name.endswith("gpt_neox.final_layer_norm.weight") for name in called)
        assert kept == [{k: v for k, v in e.items() if k != "final_norm_tensor"} for e in expected[read][1]], read
        assert row["source_format"] == FORMATS.get(form, "torch")
        step = 42 if form in (as_training_checkpoint, as_distributed) else None
        assert row["source_step"] == row["checkpoint_step"] == step
    assert set(found) == set(expected)


@pytest.mark.subprocess
@pytest.mark.slow
def test_what_two_ranks_of_fsdp2_save(tiny, expected, tmp_path):
    """Two real processes: `fully_shard`, a step of AdamW, `torch.distributed.checkpoint.save`."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.suite.checkpoints.formats.fsdp_ranks"]
    told = [str(tmp_path / "meeting"), str(tiny[0] / "model.safetensors"), str(tmp_path / "saved")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), *told], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert len(list((tmp_path / "saved").glob("*.distcp"))) == 2
    shutil.copy(tiny[0] / "config.json", tmp_path)  # beside it, as where a training script keeps it
    found = rows(tmp_path / "saved", ("parameters", "trained"))
    for read, (row, kept) in found.items():
        assert kept == expected[read][1], read
        assert (row["source_format"], row["source_step"]) == (DISTRIBUTED, 7)


def test_which_of_two_models_is_meant_is_asked(tiny, tmp_path):
    folder, state = tiny
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({f"{of}.{name}": t for of in ("policy", "critic") for name, t in state.items()}, tmp_path / "w.pt")
    engine = TorchEngine(torch.device("cpu"))
    with (
        Checkpoint(str(tmp_path / "w.pt")).local_copy() as local,
        pytest.raises(CheckpointError, match="holds 2 models, below critic, policy; save"),
    ):
        engine.load_trained(local, torch.float32)


def test_an_adapter_is_the_merged_model(tiny, tmp_path):
    """LoRA on maps and a norm that is trained as a whole: as `merge_and_unload` would have it, to the bit."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["query_key_value"], modules_to_save=["final_layer_norm"])
    torch.manual_seed(1)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny[0]), settings)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny[0]), tmp_path / "adapter")
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    ours, theirs = rows(tmp_path / "adapter"), rows(tmp_path / "merged")
    for read, (row, kept) in ours.items():
        assert row["source_format"] == "peft"
        detail = kept[0].pop("engine_detail")
        expected = theirs[read][1][0].pop("engine_detail")
        told = f"; LORA adapter merged into 2 maps of its base {tiny[0]}" if read == "trained" else ""
        assert detail == (expected + told if expected else expected)
        assert kept == theirs[read][1], read


def test_nanogpt_is_the_gpt2_that_it_is(tmp_path):
    """Its maps lie the other way round, and shifts that it does not have are zero."""
    args = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "bias": False, "vocab_size": 97, "dropout": 0.1}
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 97}
    config = GPT2Config(**shape, activation_function="gelu", bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.zeros_like(parameter) if name.endswith("bias") else torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "gpt2")
    state = {n: t for n, t in model.state_dict().items() if not n.endswith("bias")}
    turned = {n: t.T.contiguous() if "c_" in n else t for n, t in state.items()}
    saved = {"model": {f"_orig_mod.{n}": t for n, t in turned.items()}, "model_args": args, "iter_num": 9}
    torch.save(saved, tmp_path / "ckpt.pt")
    reads = ("parameters", "trained")
    theirs, ours = rows(tmp_path / "gpt2", reads), rows(tmp_path / "ckpt.pt", reads)
    for read in reads:
        pairs = [
            [{k: v for k, v in each.items() if k not in ("final_norm_tensor", "eps")} for each in side[read][1]]
            for side in (theirs, ours)
        ]
        assert pairs[0] == pairs[1]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_hostile_pickle_is_a_failed_row_and_leaves_no_trace(tiny, tmp_path):
    folder, state = tiny
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(state | {"evil": Evil(tmp_path / "left-behind")}, tmp_path / "pytorch_model.bin")
    spec = Overrides(tokens=64, input="tokens:random")
    registry = ROOT / "models.yaml"
    (job,) = build_jobs(load_registry(registry), registry, [str(tmp_path)], None, ["parameters", "trained"], spec)
    finished = [event for event in run_model(job, "run", 1) if isinstance(event, Finished)]
    assert [event.row["status"] for event in finished] == ["failed", "failed"]
    assert all("names io.open" in event.row["error"] for event in finished)
    assert not (tmp_path / "left-behind").exists()
