"""`deadbench classify`: bytes and seconds of whole processes, beside loading the same checkpoint with transformers.

`make bench` times them; `make test` runs smaller ones once, for what they assert of the bytes.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, save_tiny
from tests.suite.architectures.test_locate import CASES

pytestmark = pytest.mark.subprocess

# Command-R's shape: 35 B parameters, 70 GB in 30 shards.
COHERE = {
    "model_type": "cohere", "architectures": ["CohereForCausalLM"], "hidden_size": 8192, "intermediate_size": 22528,
    "num_hidden_layers": 40, "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 256000,
    "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "torch_dtype": "float16",
}  # fmt: skip
SHARDS = 30
NEOX = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "num_attention_heads": 8}
LARGE = NEOX | {"hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096, "vocab_size": 12000}
SMALL = NEOX | {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 512, "vocab_size": 5000}
LOAD = """
import sys, transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1])
print(float(model.final_layer_norm.weight.double().square().reciprocal().sum()))
"""


def tensors_of(config):
    """Names and shapes of Cohere's tensors."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{block}.self_attn.{name}.weight", (hidden, hidden)
        yield f"{block}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{block}.mlp.up_proj.weight", (inner, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, inner)
        yield f"{block}.input_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """70 GB on the outside: true headers, sparse files, and the final norm's values."""
    folder = tmp_path_factory.mktemp("huge")
    (folder / "config.json").write_text(json.dumps(COHERE))
    tensors = list(tensors_of(COHERE))
    weight_map, total = {}, 0
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        header, offset = {}, 0
        for tensor, shape in tensors[shard::SHARDS]:
            end = offset + 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
            weight_map[tensor], offset = name, end
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if "model.norm.weight" in header:
                file.seek(8 + len(text) + header["model.norm.weight"]["data_offsets"][0])
                scales = np.random.default_rng(0).uniform(0.3, 2, COHERE["hidden_size"])
                file.write(scales.astype("<f2").tobytes())
            file.truncate(8 + len(text) + offset)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """100 tiny checkpoints of the architectures in CASES, with random scales."""
    root, folders = tmp_path_factory.mktemp("hundred"), []
    for number in range(100):
        model_type, config, *_ = CASES[number % len(CASES)]
        folder = root / f"{number}-{model_type}"
        if number < len(CASES):
            raw = {"model_type": model_type, **config}
            made = save_tiny(folder, raw | {"architectures": [_bare_class(raw)]}, seed=number)
        else:
            made = folder
            made.mkdir()
            for file in folders[number % len(CASES)].iterdir():
                (made / file.name).write_bytes(file.read_bytes())
        folders.append(made)
    return folders


def _bare_class(raw):
    import transformers

    from deadbench.suite.architectures.build import build_config

    return transformers.MODEL_MAPPING[type(build_config(raw))].__name__


def classify(*arguments):
    """A whole process of the command line; returns what it prints of each source."""
    command = [sys.executable, "-m", "deadbench", "classify", "--json", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["sources"]


def check_huge(found):
    assert (found["family"], found["final_norm"], found["final_norm_tensor"]) == (
        "layernorm",
        "norm",
        "model.norm.weight",
    )
    assert found["bytes_total"] > 60e9
    assert found["bytes_read"] < 2e6


def test_seventy_gigabytes_by_the_atlas(benchmark, huge):
    (found,) = benchmark.pedantic(classify, (huge,), rounds=5, warmup_rounds=1)
    check_huge(found)
    assert "atlas of transformers" in found["evidence"][0]


def test_seventy_gigabytes_by_behaviour(benchmark, huge):
    (found,) = benchmark.pedantic(classify, (huge, "--verify"), rounds=3)
    check_huge(found)
    assert "the atlas agrees" in found["evidence"]


@pytest.mark.parametrize("flags", [(), ("--verify",)], ids=["atlas", "behaviour"])
def test_a_hundred_checkpoints_in_one_command(benchmark, hundred, flags):
    folders = hundred if benchmark.enabled else hundred[: len(CASES)]
    found = benchmark.pedantic(classify, (*folders, *flags), rounds=1)
    expected = [case[2] for case in CASES]
    assert [each["final_norm"] for each in found] == [expected[i % len(CASES)] for i in range(len(folders))]
    assert all(each["error"] is None for each in found)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, sized):
    """A checkpoint of 500 MB; a smaller one where nothing is timed."""
    folder = save_tiny(tmp_path_factory.mktemp("loaded") / "model", sized(LARGE, SMALL))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > sized(450e6, 0)
    return folder


def load(folder):
    """What a user does instead: the whole model, for one vector of it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(folder)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.benchmark(group="one vector of a 500 MB checkpoint")
@pytest.mark.parametrize(
    "how", ["deadbench classify", pytest.param("AutoModel.from_pretrained", marks=pytest.mark.bench)]
)
def test_beside_loading_the_model(benchmark, loaded, how):
    if how.startswith("deadbench"):
        (found,) = benchmark.pedantic(classify, (loaded,), rounds=3, warmup_rounds=1)
        assert found["bytes_total"] > 100 * found["bytes_read"]
        assert found["scale_harmonic"] > 0
    else:
        inverse = benchmark.pedantic(load, (loaded,), rounds=2)
        (found,) = classify(loaded)
        assert found["hidden_size"] / inverse == pytest.approx(found["scale_harmonic"], rel=1e-6)
