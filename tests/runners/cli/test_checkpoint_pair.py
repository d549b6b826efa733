"""`deadbench compare` of two checkpoints: a row a norm, exit 1 where a map was left unscaled; results stay results."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from deadbench.runners.census.worker import census_row
from deadbench.runners.cli.checkpoint_pair import are_checkpoints
from deadbench.runners.results.store import ResultStore
from deadbench.suite.schema import to_table
from tests.conftest import TWINS, save_tiny

NORM, MAP = "gpt_neox.layers.1.input_layernorm", "gpt_neox.layers.1.attention.query_key_value"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny model; with one norm's scale moved into its map; and with that moved nowhere."""
    root = tmp_path_factory.mktemp("pair")
    base = save_tiny(root / "base")
    state = load_file(base / "model.safetensors")
    s = state[f"{NORM}.weight"].clone()
    moved = state | {f"{NORM}.weight": state[f"{NORM}.weight"] / s, f"{NORM}.bias": state[f"{NORM}.bias"] / s}
    for name, tensors in (("left", moved), ("moved", moved | {f"{MAP}.weight": state[f"{MAP}.weight"] * s})):
        (root / name).mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, root / name / "model.safetensors")
        (root / name / "config.json").write_text((base / "config.json").read_text())
    return root


def test_a_pair_that_was_scaled_whole(deadbench, pair):
    code, out, err = deadbench("compare", pair / "base", pair / "moved", "--json")
    (row,) = json.loads(out)["scaled_norms"]
    assert (code, row["norm"], row["verdict"], row["scaled"]) == (0, "layers.1.input_layernorm", "turned", 1)
    assert row["predicted_angle"] < 1e-3 < 1 < row["angle"]
    assert "5 norms: 1 turned with all that they feed, 0 broken, 0 of which it cannot be told, 4 the same" in err


def test_a_map_that_was_left_is_a_failure(deadbench, pair):
    code, out, _ = deadbench("compare", pair / "base", pair / "left")
    assert code == 1
    assert "broken" in out
    assert MAP in out
    assert "layers.0" not in out
    code, out, _ = deadbench("compare", pair / "base", pair / "left", "--all", "--format", "csv")
    assert (code, len(out.strip().splitlines())) == (1, 6)


def test_a_pair_that_is_one_checkpoint_is_the_same(deadbench, pair):
    code, out, err = deadbench("compare", pair / "base", pair / "base")
    assert (code, out) == (0, "")
    assert "5 the same" in err


@pytest.mark.parametrize("option", [("--gate", "gate.yaml"), ("--plot", "a.svg"), ("--format", "github")])
def test_what_is_of_result_sets_is_refused(option, deadbench, pair):
    code, _, err = deadbench("compare", pair / "base", pair / "left", *option)
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_which_sides_are_checkpoints(pair, tmp_path, monkeypatch):
    (tmp_path / "results" / "main" / "reads").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    base, twin = str(pair / "base"), str(TWINS / "layernorm" / "step4096")
    assert are_checkpoints(base, twin)
    assert are_checkpoints(base, f"{twin}/model.safetensors")
    assert are_checkpoints(base, "org/name")
    assert are_checkpoints("hf://org/base", "org/name@awq")
    for other in ("results/main", "results/main@step4", "empty", "nowhere", "s3://bucket/results"):
        assert not are_checkpoints(base, other)
    assert not are_checkpoints("results/typo", "results/other")


def test_result_sets_of_a_quantised_pair_show_its_norms(deadbench, pair, tmp_path):
    """Where the checkpoints are still here; two that are plain, or gone, are compared as any two."""
    quantised = tmp_path / "quantised"
    shutil.copytree(pair / "left", quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    for name, source in (("one", pair / "base"), ("plain", pair / "moved"), ("other", quantised)):
        row = census_row(str(source), str(source), "run")
        ResultStore(str(tmp_path / name)).write({"reads": to_table("reads", [row])})
    code, out, err = deadbench("compare", tmp_path / "one", tmp_path / "other", "--json")
    (row,) = json.loads(out)["scaled_norms"]
    assert (code, row["verdict"], row["unscaled"]) == (0, "broken", MAP)
    assert "5 norms: 0 turned with all that they feed, 1 broken" in err
    assert "scaled_norms" not in deadbench("compare", tmp_path / "one", tmp_path / "plain", "--json")[1]
    shutil.rmtree(quantised)
    assert "scaled_norms" not in deadbench("compare", tmp_path / "one", tmp_path / "other", "--json")[1]
