"""A checkpoint is read when it is whole, and each form says by itself when that is."""

import json
import shutil

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save

from deadbench.suite.checkpoints import arrivals
from deadbench.suite.checkpoints.arrivals import FORMS, Arrivals
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.errors import CheckpointError

CONFIG = json.dumps({"model_type": "gpt2", "n_embd": 8})
WEIGHTS = save({"ln_f.weight": np.ones(8, np.float32), "ln_f.bias": np.zeros(8, np.float32)})


def write(folder, **files):
    """A folder with files, by name with `__` for a dot; text or bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def waits(place, **options):
    """What each checkpoint waits for, None for nothing, at one look."""
    return {each.name: each.waits_for for each in Arrivals(str(place), **options).look()}


def test_a_place_that_is_not_there_yet_has_none(tmp_path):
    seen = Arrivals(str(tmp_path / "run"))
    assert seen.look() == []
    write(tmp_path / "run" / "checkpoint-1", config__json=CONFIG, trainer_state__json="{}")
    assert [each.name for each in seen.look()] == ["checkpoint-1"]
    shutil.rmtree(tmp_path / "run")
    assert seen.look() == []


def test_the_order_is_that_of_the_steps_and_what_is_known_is_left_out(tmp_path):
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-3", "tmp-checkpoint-4", ".cache", "logs"):
        write(tmp_path / name, config__json=CONFIG, trainer_state__json="{}")
    write(tmp_path / "best", config__json=CONFIG, trainer_state__json='{"global_step": 20}')
    looked = Arrivals(str(tmp_path)).look({"checkpoint-3"})
    assert [(each.name, each.step) for each in looked] == [("checkpoint-20", 20), ("checkpoint-100", 100)]


def test_a_trainers_is_whole_with_its_state_and_every_shard(tmp_path):
    folder = write(tmp_path / "checkpoint-10", config__json=CONFIG, optimizer__pt="")
    assert waits(tmp_path) == {"checkpoint-10": "trainer_state.json, which the Trainer writes last"}
    write(folder, trainer_state__json='{"global_st')
    assert "JSON" in waits(tmp_path)["checkpoint-10"]
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    write(folder, trainer_state__json="{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(WEIGHTS)
    lacking = "model-2.safetensors, which model.safetensors.index.json names"
    assert waits(tmp_path) == {"checkpoint-10": lacking}
    (folder / "model-2.safetensors").write_bytes(WEIGHTS)
    assert waits(tmp_path) == {"checkpoint-10": None}


def test_a_distributed_one_is_whole_with_its_metadata(tmp_path):
    folder = write(tmp_path / "step-10")
    (folder / "__0_0.distcp").write_bytes(b"1")
    assert waits(tmp_path) == {"step-10": ".metadata, which is written last"}
    (folder / ".metadata").write_bytes(b"")
    assert waits(tmp_path) == {"step-10": None}


def test_megatron_and_deepspeed_move_a_pointer(tmp_path):
    rank = tmp_path / "megatron" / "iter_0000010" / "mp_rank_00"
    write(rank, model_optim_rng__pt=b"")
    tracker = "latest_checkpointed_iteration.txt"
    assert waits(rank.parents[1]) == {"iter_0000010": f"{tracker}, which Megatron writes last"}
    for told, lacks in (("5", f"{tracker} to name it"), ("10\n", None), ("20", None), ("release", None)):
        (rank.parents[1] / tracker).write_text(told)
        assert waits(rank.parents[1]) == {"iter_0000010": lacks}
    folder = write(tmp_path / "deepspeed" / "global_step10", mp_rank_00_model_states__pt=b"")
    assert waits(folder.parent) == {"global_step10": "latest, which DeepSpeed writes last"}
    for told, lacks in (("global_step5", "latest to name it"), ("global_step10", None), ("global_step20", None)):
        (folder.parent / "latest").write_text(told)
        assert waits(folder.parent) == {"global_step10": lacks}


def test_a_file_and_any_other_folder_settle(tmp_path):
    write(tmp_path, config__json=CONFIG)
    file, folder = tmp_path / "model_step10.safetensors", tmp_path / "step20"
    file.write_bytes(WEIGHTS[:-4])
    write(folder, config__json=CONFIG)
    seen = Arrivals(str(tmp_path))
    first = {each.name: each for each in seen.look()}
    assert not any(each.settling for each in first.values())  # half a file, and no weights
    assert all(each.waits_for for each in first.values())
    file.write_bytes(WEIGHTS)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    assert all(each.settling for each in seen.look())
    (folder / "config.json").write_text(CONFIG + " ")
    looked = {each.name: each for each in seen.look()}
    assert looked["model_step10.safetensors"].waits_for is None
    assert looked["step20"].settling
    assert [each.waits_for for each in seen.look()] == [None, None]


def test_a_file_of_a_series_is_a_checkpoint_of_its_own(tmp_path):
    write(tmp_path, config__json=CONFIG, metrics__json="[1]")
    (tmp_path / "model_step10.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "model_step20.safetensors").write_bytes(WEIGHTS)
    checkpoint = Checkpoint(str(tmp_path), "model_step10.safetensors")
    assert checkpoint.weights().shards == ("model_step10.safetensors",)
    before = checkpoint.fingerprint()
    (tmp_path / "metrics.json").write_text("[1, 2]")  # which the training goes on writing
    assert Checkpoint(str(tmp_path), "model_step10.safetensors").fingerprint() == before


def test_a_bucket_is_looked_at_anew(tmp_path):
    files = fsspec.filesystem("memory")
    files.pipe("/arrivals/checkpoint-10/config.json", CONFIG.encode())
    files.pipe("/arrivals/checkpoint-10/rng_state.pth", b"")
    seen = Arrivals("memory://arrivals")
    assert [each.waits_for for each in seen.look()] == ["trainer_state.json, which the Trainer writes last"]
    files.pipe("/arrivals/checkpoint-10/trainer_state.json", b"{}")
    assert [each.waits_for for each in seen.look()] == [None]
    assert Arrivals("memory://no/such").look() == []


def test_a_branch_is_whole_when_its_commit_has_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(arrivals, "list_revisions", lambda place: ["main", "step10", "step20"])

    def opened(source, revision, **options):
        return Checkpoint(str(tmp_path / revision))

    monkeypatch.setattr(arrivals, "Checkpoint", opened)
    write(tmp_path / "step10", config__json=CONFIG, model__safetensors=WEIGHTS)
    write(tmp_path / "step20", README__md="soon")
    assert waits("hf://team/model") == {"step10": None, "step20": "weights"}


def test_one_that_goes_while_it_is_looked_at_waits(tmp_path, monkeypatch):
    write(tmp_path / "checkpoint-10", config__json=CONFIG, trainer_state__json="{}")
    seen = Arrivals(str(tmp_path))
    monkeypatch.setattr(Arrivals, "_names", lambda self: ["checkpoint-9", "checkpoint-10"])
    first, second = seen.look()
    assert "no such directory" in first.waits_for
    assert second.waits_for is None


def test_a_web_server_is_refused():
    with pytest.raises(CheckpointError, match="cannot be listed; give a folder or a bucket"):
        Arrivals("https://example.org/run")


def test_the_document_has_the_table_of_forms():
    from tests.conftest import ROOT

    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert [form.name for form in FORMS if f"| {form.name} | {form.whole} |" not in text] == []
