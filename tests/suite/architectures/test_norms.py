"""The law of random initialisation, held by real architectures and broken on purpose."""

import numpy as np
import pytest
import transformers

from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.kernel_test import live_norm
from deadbench.suite.architectures.locate import find_final_norm
from deadbench.suite.architectures.norms import EffectiveNorm, departure
from tests.conftest import write_checkpoint
from tests.suite.architectures.test_locate import CASES


@pytest.mark.parametrize(("model_type", "config"), [c[:2] for c in CASES], ids=[c[0] for c in CASES])
def test_transformers_initialises_final_norms_at_one(model_type, config):
    transformers.set_seed(0)
    model = build_model(build_config({"model_type": model_type, **config}))
    final = find_final_norm(model)
    norm = live_norm(model.get_submodule(final.path), final.behaviour, final.hidden_size)
    if model_type == "nemotron" and transformers.__version__ == "5.19.0":  # LayerNorm1P: 1 + 1
        assert "norm at effective scales from 2 to 2 and shifts up to 0" in departure(norm, final.path)
        return
    assert departure(norm, final.path) is None
    assert np.array_equal(norm.scale_D, np.ones(32))
    assert norm.shift_D is None or not norm.shift_D.any()


@pytest.mark.parametrize(
    ("scale", "shift", "message"),
    [
        (np.full(4, 2.0), None, "norm at effective scales from 2 to 2 and shifts up to 0,"),
        (np.array([1, 1, 1, 0.9]), np.zeros(4), "effective scales from 0.9 to 1"),
        (np.ones(4), np.array([0, 0, 0, -0.5]), "shifts up to 0.5"),
    ],
)
def test_another_law_is_said_with_the_version(scale, shift, message):
    said = departure(EffectiveNorm("rmsnorm", scale, shift, 1e-6), "norm")
    assert message in said
    assert transformers.__version__ in said


def test_the_row_of_a_random_read_says_so(tmp_path):
    from tests.runners.worker.test_run import reads

    config = dict(next(case[1] for case in CASES if case[0] == "nemotron"), model_type="nemotron")
    for name, raw, said in (
        ("n", config, transformers.__version__ == "5.19.0"),
        ("l", config | {"model_type": "llama"}, False),
    ):
        folder = write_checkpoint(tmp_path / name, raw)
        rows, _ = reads(folder, "random", tokens=200, input="tokens:random")
        row = next(iter(rows.values()))
        assert row["status"] == "ok", row["error"]
        assert ("not at ones and zeros" in row["engine_detail"]) == said
