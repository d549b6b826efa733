"""Degeneracy of the trained LayerNorm twin, counted from its parameters and estimated by sampling (devinterp's LLC).

They answer different questions: the count is a certificate of directions, each with its name; the local learning
coefficient is one number for the whole, with all that is degenerate in it. What each says is in `extra_info`.
`pip install 'deadbench[bench]'` brings devinterp; without it the sampling is skipped.
"""

import warnings
from importlib import resources

import pytest

from tests.conftest import TWINS

SOURCE = TWINS / "layernorm/step4096"
DRAWS, CHAINS, BATCH, LENGTH = 50, 2, 4, 128


@pytest.mark.benchmark(group="degeneracy of a twin")
def test_dead_parameters_counted(benchmark):
    from deadbench.suite.checkpoints.checkpoint import Checkpoint
    from deadbench.suite.reads.norms_table import list_norms
    from deadbench.suite.reads.parameters import read_parameters

    def count():
        checkpoint = Checkpoint(str(SOURCE))
        return sum(row["dead_parameters"] for row in list_norms(checkpoint, read_parameters(checkpoint)))

    benchmark.extra_info["dead_parameters"] = benchmark(count)
    assert benchmark.extra_info["dead_parameters"] == 2824


@pytest.mark.benchmark(group="degeneracy of a twin")
@pytest.mark.parametrize("learning_rate", [1e-5, 1e-4, 1e-3])
def test_learning_coefficient_sampled(benchmark, learning_rate):
    sampling = pytest.importorskip("devinterp.slt.llc", reason="pip install 'deadbench[bench]'")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    corpus = resources.files("deadbench.suite").joinpath("data/corpus.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(SOURCE)(corpus[:400_000], verbose=False)["input_ids"]
    starts = range(0, len(ids) - LENGTH, LENGTH)
    data = Dataset.from_dict({"input_ids": [ids[i : i + LENGTH] for i in starts]}).with_format("torch")

    def sample():
        model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype="float32")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own, of the libraries below it
            return sampling.llc(
                model, data, {}, lr=learning_rate, n_beta=30.0, localization=100.0, num_chains=CHAINS, num_draws=DRAWS,
                batch_size=BATCH, device="cpu", num_init_loss_batches=8,
            )  # fmt: skip

    found = benchmark.pedantic(sample, rounds=1)
    told = {name: float(found[name]) for name in ("llc_mean", "llc_std", "init_loss")}
    benchmark.extra_info.update(told)
    assert told["llc_std"] >= 0
