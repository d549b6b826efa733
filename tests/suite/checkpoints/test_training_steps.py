"""The steps that people's names for checkpoints tell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadbench.suite.checkpoints.training_steps import checkpoint_step, steps_told

FAMILIES = (
    "step{}", "step-{}", "step_{}", "global_step{}", "global_step_{}", "checkpoint-{}", "checkpoint_{}", "iter_{}",
    "iter-{}", "iteration_{}", "ckpt_{}", "ckpt-{}", "ba{}", "ep0-ba{}", "epoch=3-step={}", "epoch=3-step={}.ckpt",
    "stage1-step{}-tokens4B", "step{}-tokens4B", "checkpoint_{}.pt", "runs/1/checkpoint-{}", "checkpoint-{}-merged",
    "{}", "checkpoint_3_{}.pt", "chkpt_{}", "ckpt.{}", "step {}", "{}-steps", "{}steps", "{}.pt",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step1000", 1000), ("global_step20", 20), ("stage1-step150-tokens1B", 150), ("main", None), (None, None),
        ("iter_0001000", 1000), ("0000500", 500), ("TinyLlama-1.1B-step-50K-105b", 50_000), ("Step7", 7),
        ("epoch3", None), ("epoch_2-iter_500", None), ("ep2", None), ("tokens4B", None), ("my-model-7b", None),
        ("pythia-160m", None), ("checkpoint-7b", None), ("v1.5", None), ("checkpoint-1.5", None), ("writer5", None),
        ("9f8e7d6c5b4a39281706f5e4d3c2b1a09f8e7d6c", None), ("1" * 40, None), ("run-3/checkpoint-20/", 20), ("", None),
        ("checkpoint_2_1500", 1500), ("20k-steps", 20_000), ("7.5", None), ("lcm-4-steps", None),
        ("checkpoint.1.5", None),
    ],
)  # fmt: skip
def test_steps_are_read_from_names(name, step):
    assert checkpoint_step(name) == step


@given(st.sampled_from(FAMILIES), st.lists(st.integers(0, 10**9), unique=True), st.integers(1, 10), st.randoms())
def test_shuffled_names_sort_by_their_steps(family, steps, width, random):
    names = [family.format(str(step).zfill(width)) for step in steps]
    random.shuffle(names)
    assert [checkpoint_step(name) for name in sorted(names, key=checkpoint_step)] == sorted(steps)


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["epoch_0_step_500", "epoch_0_step_900", "epoch_1_step_500"], [None] * 3),
        (["step900_epoch9", "step500_epoch10", "step1000"], [None, None, 1000]),
        (["epoch=9-step=500", "epoch=10-step=900", "epoch=10-step=950"], [500, 900, 950]),
        (["ep0-ba5", "ep1-ba5", "last"], [5, 5, None]),
        ([], []),
    ],
)
def test_steps_that_begin_anew_in_each_epoch_are_none_of_training(names, steps):
    assert steps_told(names) == dict(zip(names, steps, strict=True))
