"""Whatever stands in a configuration or a registry, it is read, or refused by an error of ours in one line."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deadbench.suite import yaml_file
from deadbench.suite.architectures.build import build_config, published_class
from deadbench.suite.architectures.objectives import objective
from deadbench.suite.checkpoints.configurations import checked
from deadbench.suite.checkpoints.strict_json import parse_object
from deadbench.suite.errors import ArchitectureError, CheckpointError
from deadbench.suite.registry.entries import RegistryError
from deadbench.suite.registry.loading import load_registry
from deadbench.suite.yaml_file import YamlError, parse_yaml

KEYS = [
    "model_type", "architectures", "hidden_size", "n_layer", "num_hidden_layers", "depths", "dtype", "torch_dtype",
    "layer_norm_eps", "text_config", "vision_config", "quantization_config", "rope_parameters", "id2label", "auto_map",
    "for", "self", "__class__", "\ud800", "\x1b[2J", "num_labels", "attn_implementation", "transformers_version",
]  # fmt: skip
LETTERS = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
WORDS = (
    st.sampled_from(["gpt2", "gpt_neox", "vit", "llama", "float8_e4m3fn", "int8", "\u202e", "\ud800", "a\nb"]) | LETTERS
)
PLAIN = st.none() | st.booleans() | st.integers() | st.just(10**4000) | st.floats() | WORDS
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
CONFIGS = st.dictionaries(st.sampled_from(KEYS) | LETTERS, VALUES, max_size=6)
MODELS = ["gpt2", "gpt_neox", "vit", "llama", "bert"]


def clean(error):
    assert str(error).isprintable()
    assert len(str(error)) <= 500


@pytest.mark.subprocess  # in which extraordinary ones are built
@given(CONFIGS, st.sampled_from([*MODELS, None]))
@settings(max_examples=100, derandomize=True, deadline=None)
@example({"architectures": 3}, "gpt2")
@example({"architectures": {"a": [1]}}, "gpt2")
@example({"n_layer": 10**4000}, "gpt2")
@example({"hidden_size": [[[["\ud800"]]]]}, None)
def test_a_configuration_is_built_or_refused(config, model_type):
    told = config | ({"model_type": model_type} if model_type else {})
    try:
        read = checked(parse_object(json.dumps(told).encode(), "config.json"), "config.json")
        objective(read)
        published_class(build_config(read))
    except (CheckpointError, ArchitectureError) as error:
        clean(error)


@pytest.mark.parametrize("depth", [50, 500, 5000, 100_000])
@pytest.mark.parametrize("form", ['{"a":%s}', '{"a":[%s]}'])
def test_however_deep_a_configuration_is_nested(depth, form):
    opening, closing = form.split("%s")
    raw = (opening * depth + "1" + closing * depth).encode()
    with pytest.raises(CheckpointError, match="nested") as caught:
        checked(parse_object(raw, "config.json"), "config.json")
    clean(caught.value)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_however_deep_a_registry_is_nested(opening):
    """libyaml composes what is nested by calling itself, and would end the process where its stack ends."""
    with pytest.raises(YamlError, match="registry: not YAML .nested too deeply") as caught:
        parse_yaml(opening.encode() * 1_000_000, "registry")
    clean(caught.value)


SCALARS = st.sampled_from([
    "2026-11-01", "2026-13-45", "!!timestamp x", "!!timestamp 2026-11-01", "!!set {a, b}", "!!binary AAAA",
    "!!binary '*'", "!!python/object:os.system {}", "!!omap [a: 1]", "!!pairs [a: 1]", "!unknown x", "9" * 5000,
    "1e999", ".nan", "0x" + "f" * 5000, "[" * 90 + "]" * 90,
    "&a [*a]", "*b", "{? [a]: 1}", "{[a]: 1}",
    "? {a: 1}\n  : 1", '"\\ud800"', '"\\x1b[2J"', '"a\\nb"', "[]", "{}", "~", "", "gpt2", "[1, 2]", "{a: b}", "true",
    "<<: 1", "{<<: [1]}", "12:30:45", "-1", "1.5", "'" + "x" * 3000 + "'",
])  # fmt: skip
PLACES = [
    "models: {}", "models: [{{id: {}}}]", "models: [{{id: m, config: {}}}]", "models: [{{id: m, source: {}}}]",
    "models: [{{id: m, source: a/b, checkpoints: {}}}]", "models: [{{id: m, {}: 1}}]", "{}: 1", "{}",
    "protocols: {}\nmodels: []", "suites: {}\nmodels: []", "suites: {{s: {}}}\nmodels: []",
    "models: [{{id: m, seen: {}}}]",
    "models: [{{id: m, source: a/b, checkpoints: {{pattern: 's{{step}}', steps: {}}}}}]", "models: [{}]",
    "models: [{{id: m, config: {{model_type: gpt2, n_layer: {}}}}}]", "protocols: {{p: {{tokens: {}}}}}\nmodels: []",
]  # fmt: skip


@given(st.sampled_from(PLACES), SCALARS)
@settings(max_examples=200, derandomize=True, deadline=None)
@example(PLACES[2], "!!set {a, b}")
@example(PLACES[2], "!!binary AAAA")
@example(PLACES[14], "2026-11-01")
@example(PLACES[0], "&a [*a]")
def test_a_registry_is_read_or_refused(tmp_path_factory, place, scalar):
    path = tmp_path_factory.getbasetemp() / "strange.yaml"
    path.write_text(place.format(scalar), encoding="utf-8")
    try:
        registry = load_registry(path)
        json.dumps([model.config for model in registry.models])  # what the keys of results are made of
    except RegistryError as error:
        clean(error)


def nest(levels, width, seed):
    """A configuration in which each list holds the one before so many times."""
    lines = [f"    a0: &a0 [{', '.join('1' * seed)}]"]
    lines += [f"    a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(["models:", "- id: m", "  config:", "    model_type: gpt2", *lines, ""])


@given(st.integers(1, 30), st.integers(1, 10), st.integers(1, 10))
@settings(max_examples=30, derandomize=True, deadline=None)
@example(9, 9, 9)
@example(3, 9, 9)
def test_aliases_that_multiply_are_counted_as_what_they_become(tmp_path_factory, levels, width, seed):
    path = tmp_path_factory.getbasetemp() / "aliases.yaml"
    path.write_text(nest(levels, width, seed), encoding="utf-8")
    try:
        load_registry(path)
    except RegistryError as error:
        clean(error)
        assert levels > 3
    else:
        assert width ** (levels - 1) * seed <= 200_000


@pytest.mark.parametrize("tag", ["bool", "int", "float", "null", "str", "map", "seq", "merge", "value"])
@pytest.mark.parametrize("written", ["maybe", "[a]", "{a: b}", '""', "-", "0x", "1:_", "."])
def test_a_yaml_tag_over_what_is_none_of_it_is_a_value_or_one_line(tag, written):
    """PyYAML asks a dict for `maybe` where a bool was said: a KeyError, which named nothing."""
    try:
        parse_yaml(f"models: !!{tag} {written}".encode(), "registry")
    except YamlError as error:
        clean(error)


@pytest.mark.parametrize(
    "digits", ["1" + ":59" * 300_000, "1" + ":59" * 300_000 + ".5", "0b" + "1" * 900_000, "9" * 900_000]
)
def test_a_number_of_a_million_digits_is_refused_before_it_is_one(digits):
    """Five million sixties, in a file of the size that is read, were hours: each makes the number longer."""
    with pytest.raises(YamlError, match=r"registry: not YAML \(line 1: a number of more than 1024 digits\)"):
        parse_yaml(f"models: {digits}".encode(), "registry")


def test_a_file_of_more_values_than_are_written_is_refused_while_it_is_parsed(monkeypatch):
    monkeypatch.setattr(yaml_file, "_MAX_VALUES", 1000)
    assert len(yaml_file.parse_yaml(b"[" + b"a," * 900 + b"]", "x")) == 900
    with pytest.raises(yaml_file.YamlError, match=r"x: not YAML \(more than"):
        yaml_file.parse_yaml(b"[" + b"a," * 1100 + b"*undefined]", "x")
