"""The atlas against live behaviour, and the configurations that it must leave to it."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import transformers

from deadbench.suite.architectures.build import build_config
from deadbench.suite.architectures.locate import locate_final_norm
from deadbench.suite.atlas.config_keys import nest
from deadbench.suite.atlas.lookup import _atlas, _entries, lookup
from deadbench.suite.atlas.small_configs import small_config
from deadbench.suite.errors import ArchitectureError
from deadbench.suite.reads.classify import classify
from tests.conftest import TINY_NEOX, TWINS, save_tiny
from tests.suite.architectures.test_locate import CASES, OPT

NARROW = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def same(known, live):
    assert known.path == live.path
    assert replace(known.behaviour, evidence=()) == replace(live.behaviour, evidence=())
    assert (known.placement, known.num_blocks) == (live.placement, live.num_blocks)
    assert known.hidden_size in (None, live.hidden_size)  # None: the norm's tensor says it


@pytest.mark.parametrize(("model_type", "config"), [case[:2] for case in CASES], ids=[case[0] for case in CASES])
def test_where_the_atlas_answers_behaviour_says_the_same(model_type, config):
    raw = {"model_type": model_type, **config}
    known = lookup(raw)
    if known is None:
        pytest.skip("left to behaviour")
    else:
        same(known, locate_final_norm(build_config(raw)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(_entries())[::20])
def test_a_sample_of_the_atlas_says_what_the_installed_transformers_does(model_type):
    """Small, another eps, other switches: wherever the atlas answers, behaviour says the same."""
    try:
        small = small_config(model_type)
    except ArchitectureError as error:
        pytest.skip(str(error))
    entry = _entries()[model_type][0]
    rng = random.Random(model_type)
    switches = [key for key, value in small.items() if isinstance(value, bool)]
    trials = [{}] + [{key: not small[key]} for key in rng.sample(switches, min(3, len(switches)))]
    if isinstance(entry["eps"], str):
        trials.append({entry["eps"]: 3e-4})
    answered = 0
    for changed in trials:
        raw = nest(small | changed) | {"model_type": model_type}
        known = lookup(raw)
        if known is None:
            continue
        try:
            live = locate_final_norm(build_config(raw))
        except ArchitectureError:
            continue
        if live.family != "undetermined":
            same(known, live)
            answered += 1
    assert answered


def test_the_atlas_is_of_the_transformers_that_is_tested():
    assert _atlas()["transformers"] == transformers.__version__
    assert len(_entries()) > 200


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "nonesuch"},
        {},
        {"model_type": "opt", "do_layer_norm_before": "perhaps"},
        {"model_type": "gpt2", "unheard_of_switch": True},
        {"model_type": "gpt2", "n_embd": "wide"},
        {"model_type": "llama", "num_hidden_layers": None},
    ],
)
def test_what_the_atlas_does_not_cover_is_left_to_behaviour(config):
    assert lookup(config) is None


@pytest.mark.parametrize(
    ("switches", "path", "placement"),
    [
        ({}, "decoder.final_layer_norm", "pre"),
        ({"do_layer_norm_before": False}, "decoder.layers.1.final_layer_norm", "post"),
        ({"_remove_final_layer_norm": True}, None, None),
    ],
)
def test_both_sides_of_a_switch_are_known(switches, path, placement):
    raw = {"model_type": "opt", **OPT, "num_attention_heads": 4, **switches}
    known = lookup(raw)
    assert (known.path, known.placement) == (path, placement)
    same(known, locate_final_norm(build_config(raw)))
    if path is None:
        assert "decoder.layers.1 (OPTDecoderLayer), which is no normalisation" in known.reason


def test_stale_keys_and_aliases_of_published_configurations_are_understood():
    found = lookup(
        {"model_type": "gpt2", "hidden_size": 48, "num_hidden_layers": 3, "layer_norm_epsilon": 1e12, "n_ctx": 9,
         "architectures": ["GPT2LMHeadModel"], "torch_dtype": "float16", "summary_first_dropout": 0.1}
    )  # fmt: skip
    assert (found.path, found.hidden_size, found.num_blocks, found.behaviour.eps) == ("ln_f", 48, 3, 1e12)
    assert any("transformers" in text for text in found.evidence)


@pytest.mark.subprocess
def test_classify_by_the_atlas_imports_neither_torch_nor_transformers():
    code = (
        "import json, sys\nfrom deadbench.runners.cli.main import main\n"
        "sys.argv = ['deadbench', 'classify', sys.argv[1], '--json']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "slow = [m for m in ('torch', 'transformers', 'polars', 'ray') if m in sys.modules]\n"
        "print(json.dumps(slow), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(TWINS / "layernorm/step4096")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert json.loads(done.stdout)["sources"][0]["family"] == "layernorm"


def test_verify_resolves_by_behaviour_and_says_whether_the_atlas_agrees(tmp_path):
    source = str(save_tiny(tmp_path / "m"))
    known, live = classify(source)[0], classify(source, verify=True)[0]
    assert "the atlas agrees" in live["evidence"]
    ours = ("evidence", "seconds")
    assert {k: v for k, v in known.items() if k not in ours} == {k: v for k, v in live.items() if k not in ours}


def test_behaviour_overrules_the_atlas(tmp_path, monkeypatch):
    source = str(save_tiny(tmp_path / "m"))
    monkeypatch.setitem(_entries(), "gpt_neox", [_entries()["gpt_neox"][0] | {"family": "rmsnorm"}])
    result = classify(source, verify=True)[0]
    assert result["family"] == "layernorm"
    assert any("is overruled" in text for text in result["evidence"])


def test_a_stored_bias_that_the_architecture_lacks_is_undetermined(tmp_path):
    from safetensors.numpy import load_file, save_file

    config = TINY_NEOX | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2}
    folder = save_tiny(tmp_path / "m", config)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.bias": tensors["model.norm.weight"]}, folder / "model.safetensors")
    result = classify(str(folder))[0]
    assert result["family"] == "undetermined"
    assert "stores model.norm.bias" in " ".join(result["evidence"])


def test_a_nested_default_is_not_taken_for_its_parents():
    # Idefics2's own text configuration has eps 1e-5; one that is given as a mistral without an eps has mistral's 1e-6.
    text = {"model_type": "mistral", "hidden_size": 32, "num_hidden_layers": 2}
    assert lookup({"model_type": "idefics2", "text_config": text}) is None
