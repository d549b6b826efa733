"""Degeneracy of the trained LayerNorm twin, counted from its parameters and estimated by sampling (devinterp's LLC).

They answer different questions: the count is a certificate of directions, each with its name; the local learning
coefficient is one number for the whole, with all that is degenerate in it. What each says is in `extra_info`. Of the m
weights of a map along one direction alone it is m/2 where the loss is regular in them, and 0 along a LayerNorm's v
(arXiv 2603.27432).
`pip install 'deadbench[bench]'` brings devinterp; without it the sampling is skipped.
"""

import warnings
from importlib import resources

import pytest
import torch
from torch import nn

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


class _Along(nn.Module):
    """A map whose weights move by `amount` along a direction; its bias takes back the constant that this makes."""

    def __init__(self, inner, direction_D, constant):
        super().__init__()
        self.inner, self.constant = inner, constant
        self.register_buffer("direction_D", direction_D)
        self.amount = nn.Parameter(torch.zeros(inner.out_features))

    def forward(self, acts):
        return self.inner(acts) + (acts @ self.direction_D - self.constant).unsqueeze(-1) * self.amount


MAPS = {"layernorm": ("gpt_neox", "dense_h_to_4h"), "rmsnorm": ("model", "gate_proj")}  # after a norm of the last block


def _moved_along(twin, direction):
    """A twin, and the name of the only parameters that are free: a map's weights along a direction, at their best."""
    from transformers import AutoModelForCausalLM

    stem, name = MAPS[twin]
    model = AutoModelForCausalLM.from_pretrained(TWINS / twin / "step4096", dtype="float32").eval()
    block = getattr(model, stem).layers[-1]
    norm, generator = block.post_attention_layernorm, torch.Generator().manual_seed(0)
    scale_D = norm.weight.detach().double()
    along_D = 1 / scale_D if direction == "inverse scale" else torch.randn(64, generator=generator).double()
    along_D = along_D / along_D.norm()
    constant = float(along_D @ norm.bias.detach().double()) if twin == "layernorm" else 0.0
    moved = _Along(getattr(block.mlp, name), along_D.float(), constant)
    setattr(block.mlp, name, moved)
    return model, moved, next(key for key, parameter in model.named_parameters() if parameter is moved.amount)


@pytest.mark.benchmark(group="degeneracy of a map after a norm")
@pytest.mark.parametrize(
    ("twin", "direction"),
    [("layernorm", "inverse scale"), ("layernorm", "random"), ("rmsnorm", "inverse scale"), ("rmsnorm", "random")],
)
def test_learning_coefficient_restricted_to_a_direction(benchmark, twin, direction):
    sampling = pytest.importorskip("devinterp.slt.llc", reason="pip install 'deadbench[bench]'")
    from datasets import Dataset
    from transformers import AutoTokenizer

    corpus = resources.files("deadbench.suite").joinpath("data/corpus.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(TWINS / twin / "step4096")(corpus[:40_000], verbose=False)["input_ids"]
    sequences = [ids[start : start + LENGTH] for start in range(0, 16 * LENGTH, LENGTH)]
    data = Dataset.from_dict({"input_ids": sequences}).with_format(
        "torch"
    )  # one batch: the loss has no noise of its own
    model, moved, key = _moved_along(twin, direction)
    rows = torch.tensor(sequences)
    best = torch.optim.LBFGS([moved.amount], max_iter=40, line_search_fn="strong_wolfe")

    def loss():
        best.zero_grad()
        found = model(rows, labels=rows).loss
        found.backward()
        return found

    best.step(loss)

    def sample():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sampling.llc(
                model, data, {}, lr=1e-4, n_beta=30_000.0, localization=10.0, num_chains=CHAINS, num_draws=DRAWS,
                batch_size=len(rows), device="cpu", num_init_loss_batches=1, param_masks={key: None},
            )  # fmt: skip

    found = float(benchmark.pedantic(sample, rounds=1)["llc_mean"])
    benchmark.extra_info.update(restricted=found, regular=moved.amount.numel() / 2)
    dead = (twin, direction) == ("layernorm", "inverse scale")
    assert abs(found) < 0.1 if dead else found > 5  # 0.1: thirty roundings of the loss in float32
