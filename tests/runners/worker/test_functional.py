"""The functional read of whole models: along the dead direction nothing moves, along every control it does."""

import pytest

from tests.conftest import TWINS, write_checkpoint
from tests.runners.worker.test_run import read_tables
from tests.suite.reads.test_dead_parameters import ARCHITECTURES, SMALL, SPECIAL

LLAMA = SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | SPECIAL
# The square of the output's change, like the KL, goes with the square of the step.
MARGIN = 1e6


def change(row):
    return row["output_change"] ** 2 if row["kl"] is None else row["kl"]


def by_site(rows):
    sites = {}
    for row in rows:
        sites.setdefault(row["site"], {})[row["direction"], row["step"]] = row
    return sites


def assert_dead(rows):
    """Every site of a LayerNorm: at every step the control moves the output a million times more."""
    sites = by_site(rows)
    for name, site in sites.items():
        for (direction, step), row in site.items():
            assert row["family"] == "layernorm"
            if direction == "compensated":
                assert change(site["random", step]) > MARGIN * change(row), (name, step)
    return sites


def test_the_twins_layernorm_is_dead_and_its_rmsnorm_is_not():
    tables = read_tables(TWINS / "layernorm/step4096", "functional", tokens=32)
    sites = assert_dead(tables["functional"])
    assert len(sites) == 9  # the head, and two maps in each of four blocks
    head = sites["lm_head"]["compensated", 1.0]
    assert (head["weights"], head["has_bias"], head["tied"], head["compensation"]) == ("trained", False, False, "added")
    assert (head["kl"] < 1e-28, head["fisher"] < 1e-28, head["num_tokens"]) == (True, True, 32)
    for site in sites.values():
        assert change(site["uncompensated", 1.0]) > MARGIN * change(site["compensated", 1.0])
    row = tables["reads"][0]
    assert (row["dtype"], row["num_tokens"], row["family"], row["read"]) == ("float64", 32, "layernorm", "functional")
    verdicts = {(r["direction"], r["verdict"]) for r in tables["functional"]}
    assert verdicts == {
        ("compensated", "gauge"), ("uncompensated", "regular"), ("random", "regular"), ("planted-unit", "singular")
    }  # fmt: skip

    control = by_site(read_tables(TWINS / "rmsnorm/step4096", "functional", tokens=32)["functional"])
    assert {(d, r["verdict"]) for site in control.values() for (d, _), r in site.items()} == {
        ("inverse-scale-rms", "regular"), ("random", "regular"),
        ("planted-unit", "singular"), ("planted-chain", "singular"),
    }  # fmt: skip
    chain = control["model.layers.0.mlp.gate_proj"]["planted-chain", 1.0]
    assert chain["kl_order"] == pytest.approx(3, abs=0.1)
    for site in control.values():
        assert change(site["inverse-scale-rms", 1.0]) > 1e-3 * change(site["random", 1.0])


@pytest.mark.slow
def test_minilm_has_no_head_and_its_last_hidden_state_does_not_move(minilm):
    rows = read_tables(minilm, "functional", tokens=32)["functional"]
    sites = assert_dead(rows)
    assert {row["kl"] for row in rows} == {None}
    assert "pooler.dense" not in sites  # nothing of what is measured depends on it
    assert len(sites) >= 11


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_at_random_initialisation_are_dead_too(name, tmp_path):
    source = write_checkpoint(tmp_path / name, ARCHITECTURES[name][0])
    spec = "image" if name == "vit" else "tokens:random"
    sites = assert_dead(read_tables(source, "functional", tokens=48, input=spec)["functional"])
    rows = [row for site in sites.values() for row in site.values()]
    assert {row["weights"] for row in rows} == {"random"}
    # At initialisation the shift is zero: the bias has nothing to make good, and its lack does no harm.
    assert {row["compensation"] for row in rows} == {"none"}
    heads = {row["site"]: row["tied"] for row in rows if row["fisher"] is not None}
    assert heads == HEADS[name]


# Replayed heads, and whether they share the embedding's matrix; a classifier of one position in many is run whole.
HEADS = {"gpt_neox": {"lm_head": False}, "gpt2": {"lm_head": True}, "bert": {"cls.predictions.decoder": True},
         "opt": {"lm_head": True}, "bloom": {"lm_head": True}, "vit": {}}  # fmt: skip


def test_weights_that_cannot_be_read_are_no_random_initialisation(tmp_path):
    from deadbench.runners.jobs.build import build_jobs
    from deadbench.runners.jobs.events import Finished
    from deadbench.runners.jobs.job import Overrides
    from deadbench.runners.worker.run import run_model
    from deadbench.suite.registry.loading import load_registry
    from tests.runners.worker.test_run import REGISTRY

    source = write_checkpoint(tmp_path / "m", LLAMA)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    spec = Overrides(input="tokens:random", tokens=8)
    jobs = build_jobs(load_registry(REGISTRY), REGISTRY, [str(source)], None, ["functional"], spec)
    (event,) = (e for e in run_model(jobs[0], "run", 1) if isinstance(e, Finished))
    assert event.row["status"] == "failed"
    assert "not written by torch.save" in event.row["error"]


def test_the_parameters_read_counts_what_the_norms_make_dead():
    tables = read_tables(TWINS / "layernorm/step4096", "parameters")
    row = tables["reads"][0]
    assert row["dead_parameters"] == sum(norm["dead_parameters"] for norm in tables["norms"]) == 2824
    assert row["dead_parameters_share"] == 2824 / row["num_parameters"]
    assert read_tables(TWINS / "rmsnorm/step4096", "parameters")["reads"][0]["dead_parameters"] == 0
