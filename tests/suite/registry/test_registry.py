"""models.yaml: what is in it holds, and every mistake in one is a single line that says what to do."""

import copy
import re

import pytest
import yaml

from deadbench.suite.architectures.build import build_config, build_published, count_parameters
from deadbench.suite.checkpoints.checkpoint import Checkpoint
from deadbench.suite.registry.entries import RegistryError
from deadbench.suite.registry.loading import find_registry, load_registry
from tests.conftest import ROOT

REGISTRY = load_registry(ROOT / "models.yaml")
SERIES = {"pattern": "step{step}", "steps": [0, 1]}
GOOD = {
    "protocols": {"standard": {"tokens": "8D"}},
    "suites": {"s": {"protocol": "standard", "models": ["m", {"model": "n", "reads": ["random"]}]}},
    "models": [
        {
            "id": "m",
            "source": "org/m",
            "family": "layernorm",
            "checkpoints": {"pattern": "step{step}", "steps": [0, 1]},
        },
        {"id": "n", "config": {"model_type": "gpt2"}},
    ],
}


def write(tmp_path, content):
    path = tmp_path / "models.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


DIFFERENT = {yaml.safe_dump(m.config): m for m in REGISTRY.models if m.config}.values()  # a series has one for all


@pytest.mark.parametrize("model", DIFFERENT, ids=lambda m: m.id)
def test_inline_configurations_build_with_the_published_parameter_count(model):
    assert count_parameters(build_published(build_config(model.config), "meta")) == model.parameters


@pytest.mark.parametrize("model", [m for m in REGISTRY.models if not m.config], ids=lambda m: m.id)
def test_bundled_models_are_there_with_their_parameter_count(model):
    names = model.checkpoints.names()
    assert len(names) >= 6
    for name in names:
        checkpoint = Checkpoint(model.source, name, ROOT)
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(checkpoint.names())
    assert count_parameters(build_published(build_config(checkpoint.config()), "meta")) == model.parameters


def test_quick_suite_has_both_families_at_true_dimensions():
    quick = REGISTRY.suites["quick"]
    wanted = {"twin-layernorm", "twin-rmsnorm", "gpt2", "pythia-160m", "vit-base-patch16-224", "smollm2-135m"}
    assert wanted <= {e.model for e in quick.entries()}
    assert REGISTRY.protocols[quick.protocol].tokens == "4D"


def test_paper_suite_is_nine_layernorm_then_five_rmsnorm_from_160m_to_35b():
    paper = [REGISTRY.model(e.model) for e in REGISTRY.suites["paper"].entries()]
    assert [m.family for m in paper] == ["layernorm"] * 9 + ["rmsnorm"] * 5
    assert {m.modality for m in paper} == {"text", "image"}
    sizes = [m.parameters for m in paper]
    assert (min(sizes), max(sizes)) == (162322944, 34980831232)
    assert "google/gemma-4-31B" in {m.source for m in paper}


def test_extended_suite_is_everything_published_and_nothing_hides_what_is_unverified():
    extended = [e.model for suite in ("extended", "polypythias") for e in REGISTRY.suites[suite].entries()]
    published = [m for m in REGISTRY.models if "/" in m.source and not m.source.startswith("suite/")]
    assert sorted(extended) == sorted(m.id for m in published)
    assert len(extended) >= 40
    for model in published:
        # A configuration that was seen on no page is itself on the list.
        assert (model.seen is None) == ("config" in model.unverified) or model.id == "gpt2"
        assert model.seen is None or model.seen.page.startswith("https://")


def test_polypythias_are_nine_seeds_of_five_sizes():
    suite = [REGISTRY.model(e.model) for e in REGISTRY.suites["polypythias"].entries()]
    assert [m.id for m in suite[:10:9]] == ["pythia-14m-seed1", "pythia-31m-seed1"]
    assert len({m.source for m in suite}) == len(suite) == 45
    assert all(m.source == f"EleutherAI/{m.id}" for m in suite)
    assert all(len(m.checkpoints.names()) == 154 and m.main_checkpoint() == "main" for m in suite)
    assert "seed9/" in suite[-1].seen.page


def test_checkpoint_series_of_pythia_and_olmo_2():
    suite = REGISTRY.suites["checkpoints"]
    assert suite.checkpoints
    names = REGISTRY.model("pythia-160m").checkpoints.names()
    assert len(names) == 154
    assert names[:4] + names[-2:] == ["step0", "step1", "step2", "step4", "step142000", "step143000"]
    listed = REGISTRY.model("olmo-2-1124-7b").checkpoints
    found = ["main", "stage1-step928646-tokens3896B", "stage1-step1000-tokens5B", "step150-tokens1B",
             "stage2-ingredient1-step11931-tokens50B", "stage1-step2000-tokens9Bx"]  # fmt: skip
    assert listed.names(found) == ["stage1-step1000-tokens5B", "stage1-step928646-tokens3896B"]


def test_listed_checkpoints_can_be_thinned(tmp_path):
    content = copy.deepcopy(GOOD)
    content["models"][0] |= {"checkpoints": {"listed": "s{step}", "every": 10}, "revision": "main"}
    model = load_registry(write(tmp_path, content)).model("m")
    assert model.checkpoints.names(["s5", "s20", "s10", "t10"]) == ["s10", "s20"]
    assert model.main_checkpoint() == "main"


def test_a_good_registry_loads(tmp_path):
    registry = load_registry(write(tmp_path, GOOD))
    assert registry.model("m").checkpoints.names() == ["step0", "step1"]
    assert registry.model("m").main_checkpoint() == "step0"
    assert registry.model("n").main_checkpoint() is None
    assert registry.suites["s"].entries()[1].reads == ["random"]
    assert registry.model("nope") is None


def test_one_entry_is_a_model_for_each_seed(tmp_path):
    content = copy.deepcopy(GOOD)
    content["models"].append({"id": "p-seed{seed}", "source": "runs/{seed}", "seeds": {"first": 2, "last": 4}})
    content["suites"]["s"]["models"] += ["p-seed{seed}"]
    content["suites"]["t"] = {"protocol": "standard", "models": [{"model": "p-seed{seed}", "reads": ["random"]}]}
    registry = load_registry(write(tmp_path, content))
    assert [(m.id, m.source) for m in registry.models[2:]] == [(f"p-seed{n}", f"runs/{n}") for n in (2, 3, 4)]
    assert [e.model for e in registry.suites["s"].entries()] == ["m", "n", "p-seed2", "p-seed3", "p-seed4"]
    assert [(e.model, e.reads) for e in registry.suites["t"].entries()] == [
        (f"p-seed{n}", ["random"]) for n in (2, 3, 4)
    ]
    del content["suites"]
    assert len(load_registry(write(tmp_path, content)).suites["all"].models) == 5


def test_a_step_range_is_inclusive(tmp_path):
    content = copy.deepcopy(GOOD)
    content["models"][0]["checkpoints"] = {"pattern": "s{step}", "first": 0, "last": 30, "every": 10}
    assert load_registry(write(tmp_path, content)).model("m").checkpoints.names() == ["s0", "s10", "s20", "s30"]
    content["models"][0]["checkpoints"]["steps"] = [1, 2]
    assert load_registry(write(tmp_path, content)).model("m").checkpoints.names()[:3] == ["s1", "s2", "s0"]


def change(path, value):
    def apply(content):
        *way, last = path
        for part in way:
            content = content[part]
        if isinstance(content, list) and last == "append":
            content.append(value)
        else:
            content[last] = value

    return apply


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        (
            change(("models", 0, "engine"), "vlm"),
            "m: engine 'vlm' is unknown; choose 'auto', 'torch', 'streaming' or 'vllm'",
        ),
        (change(("models", 0, "family"), "batchnorm"), "m: family 'batchnorm' is unknown; choose 'layernorm'"),
        (change(("models", 0, "familly"), "layernorm"), "m: unknown key 'familly'; allowed: checkpoints, config"),
        (change(("models", 1, "id"), "m"), "m: duplicate id"),
        (change(("models", 1, "config"), None), "n: needs a source, an inline config, or both"),
        (change(("models", 1, "config"), {}), "n: config needs a model_type"),
        (change(("models", 0, "gpus"), 0), "m: gpus 0: input should be greater than or equal to 1"),
        (change(("models", 0, "checkpoints"), {"pattern": "x", "steps": [1]}), "m: pattern has no {step}"),
        (
            change(("models", 0, "checkpoints"), {"pattern": "{step}"}),
            "m: give steps, or first, last and every, or both",
        ),
        (change(("models", 0, "checkpoints"), {"listed": "s{step}"}), "m: listed checkpoints need a revision"),
        (change(("models", 0, "checkpoints"), {"listed": "s*"}), "m: listed has no {step}"),
        (change(("models", 0, "unverified"), ["licence"]), "m: unverified 'licence' is no key of this entry"),
        (change(("models", 1, "unverified"), ["config.n_embd"]), "n: unverified 'config.n_embd' is no key of this"),
        (change(("models", 0, "seen"), {"by": "rumour", "page": "x"}), "m: seen.by 'rumour' is unknown; choose"),
        (change(("models", "append"), {"source": "a/b"}), "models[2]: 'id' is missing"),
        (change(("suites", "s", "models", "append"), "x"), "suite s: model 'x' is unknown; choose m or n"),
        (change(("suites", "s", "protocol"), "x"), "suite s: protocol 'x' is unknown; choose standard"),
        (change(("suites", "s", "models", "append"), {"model": "m", "redas": []}), "unknown key 'models.2.redas'"),
        (change(("protocols", "standard", "tokens"), "4x"), "protocol standard: tokens '4x' is neither"),
        (
            change(("protocols", "standard", "taps"), "every:0"),
            "protocol standard: taps 'every:0' is unknown; choose all",
        ),
        (change(("protocols",), {}), "protocols: 'standard' is missing"),
        (change(("models", 0, "seeds"), [1, 2]), "m: seeds need {seed} in id"),
        (
            change(("models", "append"), {"id": "p{seed}", "source": "org/p", "seeds": [1]}),
            "p{seed}: no {seed} in source, revision or checkpoints, so that all seeds are one model",
        ),
        *(
            (
                change(("models", "append"), {"id": "p{seed}", "source": "p{seed}", "seeds": seeds}),
                f"p{{seed}}: seeds {seeds} are neither a list of different numbers nor first and last",
            )
            for seeds in ([1, 1], [], 3, ["1"], [True], [-1], {"first": 1})
        ),
        (change(("sweets",), {}), "unknown key 'sweets'; allowed: models, protocols or suites"),
    ],
)
def test_mistakes_are_one_line_with_file_entry_value_and_choices(mistake, expected, tmp_path):
    content = copy.deepcopy(GOOD)
    mistake(content)
    path = write(tmp_path, content)
    with pytest.raises(RegistryError, match=re.escape(expected)) as caught:
        load_registry(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: [\n", "line 2"),
        ("a: 1\na: 2\n", "line 2: key 'a' is given twice"),
        ("- 1\n", "expected the key models"),
        ("[" * 3000, "nested too deeply"),
        ("\x00", "not allowed"),
    ],
)
def test_files_that_are_no_registry(text, expected, tmp_path):
    with pytest.raises(RegistryError, match=expected):
        load_registry(write(tmp_path, text))


def test_three_lines_are_a_registry(tmp_path):
    registry = load_registry(write(tmp_path, "models:\n  - id: run0\n    source: runs/run0\n"))
    assert registry.default_suite() == "all"
    assert [entry.model for entry in registry.suites["all"].entries()] == ["run0"]
    assert registry.protocols == {"standard": REGISTRY.protocols["standard"]}
    assert REGISTRY.default_suite() == "quick"
    assert load_registry(write(tmp_path, "suites: {}\nmodels: []\n")).default_suite() is None
    with pytest.raises(RegistryError, match=r"m: unknown key 'sauce'"):
        load_registry(write(tmp_path, "models: [{id: m, sauce: x}]"))


def test_where_the_registry_is_looked_for(tmp_path, monkeypatch):
    with pytest.raises(RegistryError, match="no such registry file"):
        find_registry(tmp_path / "none.yaml")
    monkeypatch.chdir(tmp_path)
    assert find_registry() == ROOT / "models.yaml"
    own = write(tmp_path, GOOD)
    assert find_registry().resolve() == own


@pytest.mark.parametrize("eps", ["1e-12", "1E-5", "1.e-5", "1.0e-05", "1e12"])
def test_a_pasted_configuration_keeps_its_numbers(tmp_path, eps):
    """`yaml` alone takes 1e-12, as JSON has it, for text."""
    path = write(
        tmp_path,
        "protocols: {standard: {}}\nsuites: {}\nmodels:\n"
        f'  - {{id: m, revision: 12e45678, config: {{"model_type": "vit", "layer_norm_eps": {eps}}}}}\n',
    )
    (model,) = load_registry(path).models
    assert model.config == {"model_type": "vit", "layer_norm_eps": float(eps)}
    assert model.revision == "12e45678"


def test_a_registry_is_asked_for_its_own_models_and_a_copy_for_the_copys(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text("models:\n- {id: a, source: org/a}\n- {id: b, source: org/b}\n")
    registry = load_registry(path)
    assert (registry.model("b").source, registry.model("c")) == ("org/b", None)
    fewer = registry.model_copy(update={"models": registry.models[:1]})
    assert (fewer.model("a").source, fewer.model("b")) == ("org/a", None)
    assert registry.model("b") is registry.models[1]
