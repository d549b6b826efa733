"""Block streaming beside the resident model: seconds of one read's passes, and the peak memory of a process of each.

`make bench` times a 0.8 GB model; `make test` runs a small one once, for what it asserts.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

ONE_PASS = """
import json, sys, time, torch, warnings
from deadbench.runners.jobs.events import peak_host_bytes
from deadbench.runners.engines.registry import make_engine
from deadbench.runners.engines.base import Swept
from deadbench.suite.architectures.build import build_config, build_model
from deadbench.suite.architectures.locate import find_final_norm, locate_final_norm
from deadbench.suite.inputs.tokens import token_batches
engine, config = make_engine(sys.argv[1]), build_config(json.loads(sys.argv[2]))
tiny = build_config(json.loads(sys.argv[2]) | {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1})
find_final_norm(build_model(tiny))
final = locate_final_norm(config).path
before = peak_host_bytes()
batches = token_batches("tokens:random", vocab_size=config.vocab_size, num_tokens=2 * config.hidden_size,
                        sequence_length=256, seed=0, tokenizer_folder=None, batch_tokens=256).batches
started = time.perf_counter()
model = engine.load_random(config, 0, torch.float32)
norm = model.get_submodule(final)
total = sum(float(step[1].output_BTD.double().square().sum())
            for step in engine.passes(model, norm, batches) if not isinstance(step, Swept))
seconds = time.perf_counter() - started
print(json.dumps([seconds, peak_host_bytes() - before, total]))
"""
SMALL = {"hidden_size": 256, "num_hidden_layers": 24, "vocab_size": 1000}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 16, "vocab_size": 8192}


def one_pass(engine, shape):
    D = shape["hidden_size"]
    config = {"model_type": "gpt_neox", "intermediate_size": 4 * D, "num_attention_heads": D // 64} | shape
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ONE_PASS, engine, json.dumps(config)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.benchmark(group="random init and one pass over 2D tokens, GPT-NeoX of 0.8 GB, process of its own")
@pytest.mark.parametrize("engine", ["torch", "streaming"])
def test_block_streaming_beside_resident(benchmark, engine):
    shape = LARGE if benchmark.enabled else SMALL
    seconds, peak, total = benchmark.pedantic(one_pass, args=(engine, shape), rounds=3 if benchmark.enabled else 1)
    resident_seconds, resident_peak, resident_total = one_pass("torch", shape)
    assert total == resident_total, "not the same model"
    benchmark.extra_info |= {
        "seconds of resident": seconds / resident_seconds,
        "peak GB above an idle process": peak / 1e9,
        "peak of resident": peak / resident_peak,
    }
    if benchmark.enabled and engine == "streaming":
        assert peak <= resident_peak / 4
