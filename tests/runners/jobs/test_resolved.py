"""What is settled once: a process runs a model once to know it, whatever reads follow."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from deadbench.runners.jobs import resolved
from deadbench.runners.jobs.build import build_jobs
from deadbench.runners.jobs.events import Finished
from deadbench.runners.jobs.job import Overrides
from deadbench.runners.jobs.resolved import Configuration, dtype_name, num_tokens
from deadbench.runners.worker.run import run_model
from deadbench.suite.architectures import build, locate, resolve, wiring
from deadbench.suite.inputs import feed
from deadbench.suite.registry.loading import load_registry
from tests.conftest import ROOT, save_tiny

VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
       "intermediate_size": 64, "image_size": 32, "architectures": ["ViTForImageClassification"]}  # fmt: skip
CLIP = {
    "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 16,
    "text_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
                    "vocab_size": 99, "max_position_embeddings": 24},
    "vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
                      "image_size": 32, "patch_size": 8},
}  # fmt: skip


@pytest.fixture
def counted(monkeypatch):
    """Calls of what runs a model to know it, in a process that knows nothing yet."""
    calls = Counter()

    def count(name, *places):
        function = getattr(places[0], name)

        def counting(*args, **kwargs):
            calls[name if "meta" not in args else f"{name} on meta"] += 1
            return function(*args, **kwargs)

        for place in places:
            monkeypatch.setattr(place, name, counting)

    count("recorded_calls", locate)
    count("_search", locate)
    count("minimal_inputs", locate, feed)
    count("running_inputs", wiring)
    count("build_model", build, locate, resolve)
    count("build_published", build)
    for known in (resolved.published, resolved.published_wiring, resolved.resolved_without_weights):
        known.cache_clear()
    monkeypatch.setattr(resolved, "_RESOLVED", {})
    return calls


def run(source, reads, **overrides):
    jobs = build_jobs(load_registry(ROOT / "models.yaml"), ROOT / "models.yaml", [str(source)], None, reads,
                      Overrides(**overrides))  # fmt: skip
    finished = [event for event in run_model(jobs[0], "run", 1) if isinstance(event, Finished)]
    assert [event.row["status"] for event in finished] == ["ok"] * len(reads), finished[0].row["error"]
    return [event.row for event in finished]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reads", [["random"], ["trained"], ["random", "trained"]], ids=" and ".join)
@pytest.mark.parametrize(
    ("config", "spec", "tries"),
    [(None, "tokens:random", 1), (VIT, "image", 1), (CLIP, "tokens:random", 5)],
    ids=["neox", "vit", "clip"],
)
def test_a_read_traces_its_model_once(config, spec, tries, reads, counted, tmp_path):
    run(save_tiny(tmp_path / "m", config) if config else save_tiny(tmp_path / "m"), reads, input=spec, tokens=256)
    assert counted["_search"] == 1
    assert counted["minimal_inputs"] == 1
    assert counted["recorded_calls"] == tries, "inputs until one runs"
    assert counted["build_model on meta"] == 0
    assert counted["build_published on meta"] == 1, "for its size, for stray tensors and for its maps"
    # The published model with its heads is another: its maps are followed where dead parameters are counted.
    assert bool(counted["running_inputs"]) == ("random" in reads)


@pytest.mark.parametrize("reads", [["random"], ["random", "trained"]], ids=" and ".join)
def test_streaming_builds_one_model_without_weights(reads, counted, tmp_path):
    run(save_tiny(tmp_path / "m"), reads, input="tokens:random", engine="streaming")
    assert counted["_search"] == counted["recorded_calls"] == counted["minimal_inputs"] == 1
    assert counted["build_model on meta"] == 1


def test_half_a_batch_is_no_second_trace(counted, tmp_path, monkeypatch):
    from deadbench.runners.engines.resident import TorchEngine

    passes, tried = TorchEngine.passes, []

    def short_of_memory(self, *args):
        tried.append(args)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("no memory")
        yield from passes(self, *args)

    monkeypatch.setattr(TorchEngine, "passes", short_of_memory)
    run(save_tiny(tmp_path / "m", VIT), ["trained"], input="image", tokens=256)
    assert len(tried) == 2
    assert counted["_search"] == counted["recorded_calls"] == 1


def test_pictures_are_read_in_the_dtype_that_they_are_stored_in(tmp_path):
    """The minimal input is of the model's dtype, as all input is."""
    folder = save_tiny(tmp_path / "m", VIT)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (row,) = run(folder, ["trained"], input="image", tokens=256)
    assert (row["dtype"], row["family"]) == ("bfloat16", "layernorm")


def test_a_configuration_is_known_by_its_contents():
    one, other = Configuration({"a": 1, "b": [2]}), Configuration({"b": [2], "a": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert one != Configuration({"a": 1, "b": [3]})
    assert list(one.raw) == ["a", "b"]


def test_tokens_are_a_number_or_a_multiple_of_the_width():
    assert (num_tokens(100, 64), num_tokens("8D", 64)) == (100, 512)


def test_the_dtype_is_asked_for_or_stored_or_declared():
    class Declared:
        dtype = torch.float16

    assert dtype_name("float64", Declared, None) == "float64"
    assert dtype_name("auto", Declared, None) == "float16"
    assert dtype_name("auto", object(), {}) == "float32"
