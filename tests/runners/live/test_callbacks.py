"""Callbacks write a result set and log, end no training, and change none: to the bit."""

import logging
import re

import numpy as np
import polars as pl
import pytest
import torch
import transformers

from deadbench.runners.live.looks import Looks
from deadbench.transformers import DeadDirectionCallback
from tests.conftest import ROOT

STEPS, SAVES = 6, 3
TEXT = (ROOT / "suite" / "data" / "corpus.txt").read_bytes()[:40_000]


def text_set(length=32, count=64):
    ids = np.frombuffer(TEXT, np.uint8).astype(np.int64)[: length * count].reshape(count, length)
    return [{"input_ids": torch.from_numpy(row.copy()), "labels": torch.from_numpy(row.copy())} for row in ids]


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


HELD = [{"input_ids": torch.stack([row["input_ids"] for row in text_set()[:16]])}]


class Tracker(transformers.TrainerCallback):
    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, dict(logs)))


def train(folder, callback=None, attach=True, **settings):
    """Losses by step, final weights, and what the tracker was given, of one training with dropout."""
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=SAVES, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        per_device_train_batch_size=8, seed=3, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    tracker = Tracker()
    trainer = transformers.Trainer(gpt2(), arguments, train_dataset=text_set(), callbacks=[tracker])
    trainer.remove_callback(transformers.PrinterCallback)
    if callback is not None:
        callback.attach(trainer) if attach else trainer.add_callback(callback)
    trainer.train()
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
    return losses, weights, tracker.logged, trainer.state.log_history


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"))


def reads(out, *columns):
    return pl.read_parquet(out / "reads" / "*.parquet").sort("checkpoint_step", "read").select(*columns).rows()


@pytest.mark.slow
def test_the_trainer_goes_on_to_the_bit_and_every_look_is_a_row(tmp_path, alone, capfd):
    callback = DeadDirectionCallback(tmp_path / "out", model="tiny", every=2, batches=HELD)
    losses, weights, logged, _ = train(tmp_path / "run", callback)
    assert losses == alone[0]
    assert len(losses) == STEPS
    assert weights == alone[1]
    steps = (2, 3, 4, 6)  # every second, each save, the end; none twice
    expected = [("tiny", f"step{n}", n, read, "ok") for n in steps for read in ("parameters", "trained")]
    assert reads(tmp_path / "out", "model", "revision", "checkpoint_step", "read", "status") == expected
    told = {step: values for step, values in logged if "deadbench/depth" in values}
    assert tuple(told) == steps
    depths = pl.read_parquet(tmp_path / "out" / "reads" / "*.parquet").filter(read="trained").sort("checkpoint_step")
    assert [values["deadbench/depth"] for values in told.values()] == depths["depth"].to_list()
    assert told[6]["deadbench/time_share"] > 0
    assert re.search(r"deadbench: 4 looks in [\d.]+ s, [\de.+-]+ % of the training's time", capfd.readouterr().err)


@pytest.mark.slow
def test_without_batches_the_parameters_alone_are_read(tmp_path, alone):
    callback = DeadDirectionCallback(tmp_path / "out", every=None)
    losses, weights, logged, history = train(tmp_path / "run", callback, attach=False)
    assert (losses, weights) == alone[:2]
    assert reads(tmp_path / "out", "model", "checkpoint_step", "read") == [
        ("GPT2LMHeadModel", 3, "parameters"),
        ("GPT2LMHeadModel", 6, "parameters"),
    ]
    assert not any("deadbench/depth_predicted" in values for _, values in logged)
    assert [entry["step"] for entry in history if "deadbench/depth_predicted" in entry] == [3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["norm", "batch", "disk", "tracker"])
def test_an_error_is_a_failed_row_and_one_warning_and_ends_nothing(tmp_path, alone, caplog, monkeypatch, fault):
    given = {"batches": HELD}
    if fault == "norm":
        given = {"final_norm": "norm"}
    if fault == "batch":
        given = {"batches": [{"input_ids": torch.full((4, 8), 999)}]}
    callback = DeadDirectionCallback(tmp_path / "out", every=1, **given)
    if fault == "disk":
        (tmp_path / "out").write_text("a file")
    if fault == "tracker":

        class Broken(transformers.TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                if "deadbench/depth" in logs:
                    raise ConnectionError("no tracker")

        monkeypatch.setattr(Tracker, "on_log", Broken.on_log)
    with caplog.at_level(logging.WARNING, "deadbench"):
        losses, weights, _, _ = train(tmp_path / "run", callback)
    assert (losses, weights) == alone[:2]
    warnings = [record.getMessage() for record in caplog.records if record.name == "deadbench"]
    assert len(warnings) == 1
    assert warnings[0].endswith("; the training goes on")
    if fault in ("norm", "batch"):
        rows = reads(tmp_path / "out", "checkpoint_step", "status", "error")
        assert {(step, status) for step, status, _ in rows} == {(n, "failed") for n in range(1, STEPS + 1)}
        assert rows[0][2] in warnings[0]


def test_a_look_says_when_it_is_due():
    looks = Looks("nowhere", every=5)
    assert [step for step in range(1, 12) if looks.due(step)] == [5, 10]
    assert not any(map(Looks("nowhere").due, range(9)))
    assert looks.share() is None
    with pytest.raises(ValueError, match="every=0: give a number of steps, or None"):
        Looks("nowhere", every=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning_goes_on_to_the_bit(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from deadbench.lightning import DeadDirectionCallback

    class Training(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = gpt2()
            self.losses = []

        def training_step(self, batch, batch_idx):
            loss = self.model(**batch).loss
            self.losses.append(float(loss))
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.model.parameters(), 1e-3)

    class Kept(lightning.loggers.logger.DummyLogger):
        def __init__(self):
            super().__init__()
            self.metrics = []

        def log_metrics(self, metrics, step=None):
            self.metrics.append((step, metrics))

    def run(*callbacks):
        torch.manual_seed(1)
        training, kept = Training(), Kept()
        trainer = lightning.Trainer(
            max_steps=4, accelerator="cpu", devices=1, logger=kept, callbacks=list(callbacks), log_every_n_steps=1,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        data = torch.utils.data.DataLoader(text_set(), batch_size=8)
        trainer.fit(training, data)
        return training.losses, [p.tolist() for p in training.parameters()], kept.metrics

    alone = run()
    losses, weights, metrics = run(DeadDirectionCallback(tmp_path / "out", model="pl", every=2, batches=HELD))
    assert (losses, weights) == alone[:2]
    assert [(m, n, s) for m, n, r, s in reads(tmp_path / "out", "model", "checkpoint_step", "read", "status")] == [
        ("pl", n, "ok") for n in (2, 2, 4, 4)
    ]
    assert any("deadbench/depth" in values for _, values in metrics)
