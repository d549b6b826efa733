"""A protocol's own inputs, and what stands for them: chosen by what can be had, and said in the row."""

import json

import pytest

from deadbench.runners.jobs import given_input
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import failed_read, to_tables
from deadbench.runners.jobs.job import JobError, Overrides
from deadbench.suite.reads.flags import FLAGS
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT

WIKITEXT = "hf:Salesforce/wikitext:wikitext-103-raw-v1"
MODELS = ("twin-layernorm", "pythia-160m", "vit-base-patch16-224")
PATH = ROOT / "models.yaml"
REGISTRY = load_registry(PATH)


def jobs(*models, reads=("random",), path=PATH, suite="paper", **overrides):
    registry = REGISTRY if path == PATH else load_registry(path)
    return build_jobs(registry, path, list(models), suite, list(reads), Overrides(**overrides))


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(given_input, "why_unreachable", lambda spec: None)


def test_without_a_network_the_bundled_inputs_stand_for_the_papers():
    """The twin has its tokenizer here; that of pythia cannot be had, and it is fed random tokens."""
    found = jobs(*MODELS)
    reads = [job.reads[0] for job in found]
    assert [read.input for read in reads] == ["text", "tokens:random", "image"]
    assert [read.protocol_name for read in reads] == [
        "paper[input=text]", "paper[input=tokens:random]", "paper[input=image]"
    ]  # fmt: skip
    assert [read.stands_for for read in reads] == [WIKITEXT, WIKITEXT, "hf:ILSVRC/imagenet-1k::validation"]
    assert f"input '{WIKITEXT}' cannot be reached" in found[0].remarks[-1]
    assert found[0].remarks[-1].endswith("text stands for it")
    told = jobs("twin-layernorm", input="text")[0].reads[0]
    assert told.identity() == reads[0].identity(), "as if it had been asked for"
    assert (told.protocol_name, told.stands_for) == ("paper[input=text]", None)


def test_where_they_can_be_had_the_protocols_own_are_read(online):
    twin, picture = (jobs(model)[0] for model in (MODELS[0], MODELS[2]))
    assert (twin.reads[0].input, twin.reads[0].protocol_name, twin.reads[0].stands_for) == (WIKITEXT, "paper", None)
    assert (picture.reads[0].input, picture.reads[0].protocol_name) == ("hf:ILSVRC/imagenet-1k::validation", "paper")
    assert not twin.remarks
    asked = jobs("twin-layernorm", input=WIKITEXT)[0].reads[0]
    assert (asked.protocol_name, asked.identity()) == ("paper", twin.reads[0].identity())
    assert jobs("twin-layernorm", input="text")[0].reads[0].protocol_name == "paper[input=text]"


def test_nothing_is_asked_of_the_hub_for_reads_without_an_input(monkeypatch):
    monkeypatch.setattr(given_input, "why_unreachable", lambda spec: pytest.fail("asked"))
    job = jobs("twin-layernorm", reads=["parameters"])[0]
    assert (job.reads[0].input, job.reads[0].protocol_name) == (None, "paper")
    assert jobs("twin-layernorm", input="text")[0].reads[0].input == "text"
    assert jobs("twin-layernorm", suite="quick")[0].reads[0].input == "text"


def test_a_row_says_what_stands_for_what():
    (read,) = jobs("vit-base-patch16-224")[0].reads
    row = failed_read(read, "run", 1, "error").row
    assert row["input"] == "image (stands for hf:ILSVRC/imagenet-1k::validation)"
    measured = {"status": "ok", "input": "image (scaled to [-1, 1])", "lambda_v": 1.0, "depth_standard_error": 0.1}
    row = to_tables({"reads": [measured]}, read, "run", 1, None)["reads"].to_pylist()[0]
    assert row["input"] == "image (scaled to [-1, 1]) (stands for hf:ILSVRC/imagenet-1k::validation)"
    assert (row["flags"], "stand-in-input" in FLAGS) == (["stand-in-input"], True)
    (told,) = jobs("vit-base-patch16-224", input="image")[0].reads
    row = to_tables({"reads": [dict(measured)]}, told, "run", 1, None)["reads"].to_pylist()[0]
    assert row["flags"] == []


def test_the_last_input_is_given_whatever_it_needs_and_mistakes_are_one_line(tmp_path):
    def registry(inputs):
        path = tmp_path / "models.yaml"
        protocols = {"standard": {}, "mine": {"inputs": inputs}}
        config = {"model_type": "gpt2", "n_embd": 16}
        models = [{"id": "a", "config": config}, {"id": "b", "config": config, "input": "tokens:random"}]
        suites = {"s": {"protocol": "mine", "models": ["a", "b"]}}
        path.write_text(json.dumps({"protocols": protocols, "suites": suites, "models": models}))
        return path

    a, b = (job.reads[0] for job in jobs(path=registry({"text": ["text", "hf:org/data"]}), suite="s"))
    assert (a.input, a.stands_for) == ("hf:org/data", "text"), "a has no source, and with it no tokenizer"
    assert (b.input, b.protocol_name) == ("tokens:random", "mine"), "a model's own input goes before the protocol's"
    with pytest.raises(JobError, match="a: input 'txt' is unknown; choose text"):
        jobs("a", path=registry({"text": ["text", "txt"]}), suite="s")
    with pytest.raises(JobError, match="input 'image' does not fit a model that reads text"):
        jobs("a", path=registry({"text": ["image"]}), suite="s")
    with pytest.raises(ValueError, match="protocol mine: inputs.text"):
        load_registry(registry({"text": []}))
    with pytest.raises(ValueError, match="protocol mine"):
        load_registry(registry({"smell": ["text"]}))
