"""A folder of checkpoints is a series in training order; folders that just lie beside each other are none."""

import json

import pytest

from deadbench.suite.checkpoints.series import Series, gathered, series_in, trainer_step, trainer_tokens


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make checkpoint folders below the one that is worked in; the `empty` have no config.json."""
    monkeypatch.chdir(tmp_path)

    def make(source, *names, states=None, empty=()):
        for name in (*names, *empty):
            place = tmp_path / source / name
            place.mkdir(parents=True)
            if name in names:
                (place / "config.json").write_text("{}")
            if name in (states or {}):
                (place / "trainer_state.json").write_text(json.dumps({"global_step": states[name]}))
        return tmp_path / source

    return make


@pytest.mark.parametrize(
    "names",
    [
        ["checkpoint-20", "checkpoint-100", "checkpoint-1000"],
        ["global_step9", "global_step10"],
        ["iter_0000009", "iter_0000010"],
        ["step0", "step1k", "step10k"],
        ["epoch=9-step=90", "epoch=10-step=100"],
        ["ep0-ba900", "ep1-ba1000"],
        ["900", "1000"],
        ["stage1-step2-tokens9B", "stage1-step10-tokens10B"],
    ],
)
def test_the_steps_of_names_are_the_order(folder, names):
    folder("run0", *sorted(names), empty=["runs", "logs"])
    series = series_in("run0")
    assert series.names == tuple(names)
    assert series.order == "by step"
    assert series.left_out == ()


def test_epochs_tell_no_step_and_a_trainer_does(folder):
    folder("run0", "epoch1", "epoch2", "epoch10")
    assert series_in("run0").names == ("epoch1", "epoch2", "epoch10")
    assert series_in("run0").order == "in the natural order of their names, which tell no step"
    folder("run1", "first", "second", "third", states={"first": 300, "second": 200})
    assert series_in("run1").names == ("second", "first")
    assert series_in("run1").order == "by step (of trainer_state.json)"
    folder("run2", "epoch1", "epoch2", "epoch3", states={"epoch1": 10, "epoch2": 20})
    assert series_in("run2").names == ("epoch1", "epoch2", "epoch3")
    assert series_in("run2").order.startswith("by step where one is known (of trainer_state.json), then in the natural")


def test_what_is_left_out_is_told(folder):
    made = folder("run0", "checkpoint-9", "checkpoint-10", "best", states={"best": 9}, empty=["checkpoint-11"])
    (made / "latest").symlink_to("checkpoint-10")
    (made / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10}')
    assert series_in("run0").told() == (
        "run0: a series of 2 checkpoints, by step: checkpoint-9, checkpoint-10; left out: "
        "checkpoint-11 (no config.json in it), best (step 9 is checkpoint-9), latest (step 10 is checkpoint-10)"
    )


def test_steps_within_epochs_are_no_order(folder):
    names = ("epoch_0_step_500", "epoch_0_step_1000", "epoch_1_step_500", "epoch_10_step_500")
    folder("run0", *sorted(names))
    assert series_in("run0").names == names
    assert series_in("run0").order == "in the natural order of their names, whose steps begin anew in each epoch"


def test_a_checkpoint_that_is_being_written_and_one_without_a_step_are_left_out(folder):
    folder("run0", "checkpoint-9", "checkpoint-10", "tmp-checkpoint-10", "checkpoint-11.partial", "final")
    series = series_in("run0")
    assert series.names == ("checkpoint-9", "checkpoint-10")
    assert series.left_out == (
        "checkpoint-11.partial (still being written, by its name)",
        "tmp-checkpoint-10 (still being written, by its name)",
        "final (its name tells no step)",
    )


@pytest.mark.parametrize(
    "names",
    [
        ["epoch=9-step=90.ckpt", "epoch=9-step=90-v1.ckpt", "epoch=10-step=100.ckpt"],
        ["iter-000900-ckpt.pth", "iter-001000-ckpt.pth"],
        ["step9.safetensors", "step10.safetensors"],
        ["pytorch_model_step9.bin", "pytorch_model_step10.bin"],
    ],
)
def test_files_are_a_series_where_no_folder_is_one(folder, names):
    made = folder("run0", empty=["logs"])
    for name in (*sorted(names), "last.ckpt", "optimizer_step9.pt", "config.json"):
        (made / name).write_bytes(b"")
    assert sorted(series_in("run0").names) == sorted(names)
    assert series_in("run0").names[-1] == names[-1]
    assert series_in("run0").left_out == ("last.ckpt (its name tells no step)",)
    for name in names[1:]:
        (made / name).unlink()
    assert series_in("run0") is None, "one file is the folder's weights"


def test_the_shards_of_one_checkpoint_are_no_series(folder):
    made = folder("run0", empty=["logs"])
    for shard in (1, 2):
        (made / f"step9-0000{shard}-of-00002.pt").write_bytes(b"")
    assert series_in("run0") is None


def test_what_is_no_series(folder):
    folder("models", "gpt2", "llama")
    folder("seeds", "llama-step10", "mistral-step10")
    for name in ("models", "seeds", "nowhere", "org/name", "hf://org/name", "https://host/run0"):
        assert series_in(name) is None, name


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "pytorch_model-1-of-2.bin", "m.gguf"])
def test_a_folder_with_weights_of_its_own_is_a_checkpoint(folder, file):
    made = folder("run0", "checkpoint-10", "checkpoint-20")
    (made / "training_args.bin").write_bytes(b"")
    assert series_in("run0") is not None
    (made / file).write_bytes(b"")
    assert series_in("run0") is None
    assert series_in("run0", beside_weights=True).names == ("checkpoint-10", "checkpoint-20")


def test_names_are_gathered(folder, monkeypatch):
    folder("run0", "checkpoint-9", "checkpoint-10", "checkpoint-100")
    folder("models", "a", "b")
    shell = ["run0/checkpoint-10", "./run0/checkpoint-9", "run0/checkpoint-9/"]
    (series,) = gathered(shell)
    assert (series.name, series.names) == ("run0", ("checkpoint-9", "checkpoint-10"))
    assert series.sources() == ["run0/checkpoint-9", "run0/checkpoint-10"]
    first, whole, last = gathered(["models/a", "run0/", "models/b"])
    assert (first, whole.name, len(whole.names), last) == ("models/a", "run0", 3, "models/b")
    assert gathered(["run0/checkpoint-10"]) == ["run0/checkpoint-10"], "one checkpoint is itself"
    assert gathered(["run0"], {"run0"}) == ["run0"]
    monkeypatch.chdir("run0")
    for names in (["."], ["checkpoint-9", "checkpoint-10", "checkpoint-100"], ["../run0"]):
        (series,) = gathered(names)
        assert series.name.endswith("run0")
        assert len(series.names) == 3
    assert gathered(["."])[0].sources() == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_a_long_series_is_told_in_one_line():
    series = Series("s3://bucket/run0/", tuple(f"step{n}" for n in range(50)), "by step", tuple("abcde"))
    assert series.told() == (
        "s3://bucket/run0: a series of 50 checkpoints, by step: step0, step1, …, step49; "
        "left out: a, b, c, d and 1 more"
    )
    assert series.sources()[0] == "s3://bucket/run0/step0"


def test_a_bucket_holds_a_series(folder):
    import fsspec

    fs = fsspec.filesystem("memory")
    for step in (9, 10):
        fs.pipe_file(f"/bucket/run0/checkpoint-{step}/config.json", b"{}")
    assert series_in("memory://bucket/run0").names == ("checkpoint-9", "checkpoint-10")


@pytest.mark.parametrize("step", ['"7"', "true", "-1", "7.5", str(2**63), "[" * 100_000, "}", "7, 8"])
def test_a_trainers_state_that_tells_nothing(tmp_path, step):
    (tmp_path / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    assert trainer_step(tmp_path) is None


@pytest.mark.parametrize(
    ("state", "tokens"),
    [('{"num_input_tokens_seen": 4096}', 4096), ('{"num_input_tokens_seen": 0}', None), ('{"global_step": 3}', None),
     ('{"num_input_tokens_seen": -1}', None), ('{"num_input_tokens_seen": true}', None), ("{", None)],
)  # fmt: skip
def test_a_trainers_tokens_are_believed_where_it_counted_them(state, tokens, tmp_path):
    (tmp_path / "trainer_state.json").write_text(state)
    assert trainer_tokens(tmp_path) == tokens
