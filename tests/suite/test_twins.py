"""The twins: bit-reproducible from the script and a seed, small, and really trained."""

import filecmp
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from deadbench.suite.twins import CHECKPOINT_STEPS
from deadbench.suite.twins import TWINS as SPECS
from tests.conftest import TWINS


def test_they_stay_under_six_megabytes_and_hold_every_step():
    assert sum(f.stat().st_size for f in TWINS.rglob("*") if f.is_file()) <= 6_000_000
    for twin in SPECS:
        assert {f.name for f in (TWINS / twin).iterdir()} == {f"step{s}" for s in CHECKPOINT_STEPS}
    assert len(CHECKPOINT_STEPS) >= 6


@pytest.mark.subprocess
def test_training_is_bit_reproducible(tmp_path):
    """Two fresh processes, the first sixteen steps: the same bytes."""
    code = (
        "import deadbench.suite.twins as t, sys; from pathlib import Path; from importlib import resources\n"
        "t.CHECKPOINT_STEPS = (0, 16)\n"
        "corpus = resources.files('deadbench.suite').joinpath('data/corpus.txt').read_text(encoding='utf-8')\n"
        "for twin in t.TWINS: t.train_twin(twin, Path(sys.argv[1]), corpus)\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / str(n))], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        for n in (0, 1)
    ]  # fmt: skip
    assert [run.wait() for run in runs] == [0, 0]
    for folder in (Path(twin) / step for twin in SPECS for step in ("step0", "step16")):
        files = sorted(path.name for path in (tmp_path / "0" / folder).iterdir())
        assert files == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        _, mismatch, errors = filecmp.cmpfiles(tmp_path / "0" / folder, tmp_path / "1" / folder, files, False)
        assert (mismatch, errors) == ([], [])


@pytest.mark.parametrize(("twin", "name"), [("layernorm", "gpt_neox.final_layer_norm"), ("rmsnorm", "model.norm")])
def test_training_moved_the_final_scales(twin, name):
    first, last = (load_file(TWINS / twin / f"step{s}" / "model.safetensors") for s in (0, CHECKPOINT_STEPS[-1]))
    assert (first[f"{name}.weight"] == 1).all()
    assert (last[f"{name}.weight"] > 1.2).all()
